"""What the tests of the contract share: a model of almost no cost, a clock and a device that a test works by hand."""

import threading
from collections import defaultdict, deque

import torch

from rollflow.engine import Engine
from rollflow.loop import Loop
from rollflow.models import FlowModel, Geometry
from rollflow.models.layout import Layout
from rollflow.plan import plan
from rollflow.preparing import Preparations
from rollflow.profile.ledger import Ledger
from rollflow.request import Request
from rollflow.row import Done, Free, Landed, Outcome, Shown
from rollflow.schedule.cost import CostModel
from rollflow.ticket import Finished, Refused, Started

SIZE = Geometry(8, 8, 8, 8, 16, 12)
PATIENCE = 30  # seconds after which a test that waits for something gives up; none is meant to wait that long


class Tiny(FlowModel):
    """A model of almost no cost, with as many latents as pixels."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)

    def geometry(self, height=None, width=None):
        height, width = height or 8, width or 8
        return Geometry(height, width, height, width, height * width // 4, 12)

    def check_prompt(self, prompt):
        pass

    def encode(self, prompts):
        return [None for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        return x * tau[:, None, None]

    def decode(self, latents):
        return latents.sigmoid()


def brightness(images, prompts):
    """A reward that never fails."""
    return images.mean((1, 2, 3))


def bon(nfe=4, **options):
    """A request of one batch: `nfe` samples of the prior, all at once."""
    return Request("a", **{"reward": brightness, "method": "bon", "steps": 1, "nfe": nfe, **options})


def rbf(nfe=12, **options):
    """A request of many batches: one after another."""
    return Request("a", **{"reward": brightness, "method": "rbf", "steps": 4, "nfe": nfe, **options})


def engine(model=None, **options):
    """An engine whose results depend on no other request, bit for bit."""
    return Engine(model or Tiny(), **{"lanes": 1, "buckets": (8,), **options})


def fingerprint(result):
    """All that a search decided, and every bit of its image."""
    return repr(result.history), result.reward, result.stopped, result.pixels.numpy().tobytes()


def ended(job):
    """Waits until nothing of a job is left in its engine; returns the job."""
    try:
        job.best(PATIENCE)
    except Exception as error:
        assert job.status == "failed", error
    return job


def assert_sound(engine, threads=None):
    """Nothing of any request is left in an engine, no thread was lost, and it still works."""
    stats = engine.stats()
    assert (stats.queued, stats.running, stats.rows, stats.live, stats.promised) == (0, 0, 0, 0, 0), stats
    assert threads is None or len(engine.lanes.alive) == threads
    assert all(thread.is_alive() for thread in engine.lanes.alive)
    assert engine.generate(bon()).committed_nfe == 4


class Gate:
    """A reward that says when it is called, and answers when it is let go."""

    def __init__(self, closed=True):
        self.called, self.open = threading.Event(), threading.Event()
        if not closed:
            self.open.set()

    def __call__(self, images, prompts):
        self.called.set()
        assert self.open.wait(PATIENCE), "nobody opened the gate"
        return images.mean((1, 2, 3))


class Lockstep:
    """A reward that is called once for each update that was read, so that a slow machine skips none."""

    def __init__(self):
        self.read = threading.Semaphore(1)

    def __call__(self, images, prompts):
        assert self.read.acquire(timeout=PATIENCE), "nobody read the update"
        return images.mean((1, 2, 3))

    def follow(self, job):
        """Yields the updates of a job, and lets it go on after each."""
        try:
            for update in job:
                yield update
                self.read.release()
        finally:
            self.read.release(1000)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now

    def pass_in(self, engine, seconds):
        """Lets time pass for an engine, which has noticed it when this returns."""
        engine.stats()  # what has happened so far has happened before
        self.now += seconds
        engine.stats()
        engine.stats()  # the first ends the step that was waiting, the second the one that looked at the clock


class Prepared(Preparations):
    """Every prompt is encoded and every size measured."""

    def __init__(self, cost):
        self.conditioning, self.costs, self.chores = defaultdict(lambda: None), {SIZE: cost}, deque()
        self.cost = lambda geometry, guided=False: cost

    def known(self, text, geometry):
        return self.conditioning[text]

    def company(self, conditioning, guidance, *given):
        return conditioning, *given

    def want(self, text, geometry, then):
        then(None)


class Hand:
    """A device without a model: its batches are answered when a test says so, each row by what `score` gives."""

    judge, preview, parallel = None, False, False

    def __init__(self, score=lambda row: float(row.number), lanes=1, largest=4, seconds=1.0):
        self.lanes, self.score = lanes, score
        self.cost = CostModel({bucket: seconds * bucket for bucket in range(1, largest + 1)})
        self.held, self.shows, self.served = [], [], []
        self.hold_images = False

    def bucket(self, rows, geometry, guided=False):
        return self.cost.bucket(rows)

    def allocate(self, geometry, slots):
        pass

    def peek(self, candidate, geometry):
        return None

    def submit(self, rows, report, attempt=0):
        self.served += [row.brief.seed for row in rows]
        self.held.append((rows, report))

    def answer(self):
        rows, report = self.held.pop(0)
        report(Free())
        report(Landed(rows, [self.score(row) if row.scored else None for row in rows]))

    def submit_images(self, shows, report):
        self.shows.append((shows, report))
        if not self.hold_images:
            self.show()

    def show(self):
        shows, report = self.shows.pop(0)
        report(Free())
        pixels = torch.zeros(3, 8, 8)
        report(Shown(shows, [Outcome(pixels, pixels.to(torch.uint8), 0.0, None) for _ in shows]))

    def submit_work(self, work, then, report, kind="other"):
        report(Done(then, work()))
        report(Free())


class Told(list):
    """The news of one request, in order."""

    @property
    def began(self):
        return any(isinstance(news, Started) for news in self)

    @property
    def finished(self):
        return next((news for news in self if isinstance(news, Finished)), None)

    @property
    def error(self):
        return next((news.error for news in self if isinstance(news, Refused)), None)


class Driven:
    """A loop that a test drives by hand, with its device and its clock."""

    def __init__(self, device=None, slots=4096, max_queued=None):
        self.device, self.clock, self.tickets = device or Hand(), Clock(), {}
        self.loop = Loop(
            self.device, Prepared(self.device.cost), Ledger(), lambda geometry: slots, max_queued, self.clock
        )

    def submit(self, request, resize=None):
        """Hands a request in; returns its news to come."""
        told = Told()
        self.tickets[id(told)] = self.loop.submit(plan(request), SIZE, told.append, resize=resize)
        return told

    def cancel(self, told):
        self.loop.cancel(self.tickets[id(told)])
        self.settle()

    def settle(self):
        """Steps until the loop waits for the device or the clock."""
        self.loop.step(0)
        while not self.loop.inbox.empty():
            self.loop.step(0)

    def tick(self, seconds=0.0):
        """The device answers a batch, if it has one, and time passes."""
        self.settle()
        self.clock.now += seconds
        if self.device.held:
            self.device.answer()
        self.settle()

    def run(self, seconds=0.0):
        """Until the device has nothing to do."""
        self.settle()
        while self.device.held:
            self.tick(seconds)

    def assert_empty(self):
        """Nothing of any request is left."""
        found = self.loop.snapshot()
        assert (found.queued, found.running, found.rows, found.live, found.promised) == (0, 0, 0, 0, 0), found
