"""The order of streams, without a GPU: the runner's own code on streams and events of a test, watched by a sanitizer.

torch's sanitizer of races between streams is told of every operation, and which stream was the current one. Work on
lanes comes before that of judges, as where a host is ahead of its device. Whatever orders two streams is taken away in
turn, and must be missed.
"""

from collections import defaultdict, deque
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from test_caching import Keeping
from test_graphs import FakeCapture
from tiny import SIZE, Tiny, brightness
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from rollflow.copies import Download
from rollflow.device.judges import Judges
from rollflow.device.runner import Runner
from rollflow.device.streams import Streams
from rollflow.device.workers import Lanes
from rollflow.draw import Guide
from rollflow.models import Capabilities
from rollflow.profile.ledger import Ledger
from rollflow.rewards import FunctionReward
from rollflow.row import NONE, Brief, Candidate, Failed, Free, Landed, Mixture, Row, Show, Shown
from rollflow.sde import Step

HOST = 0  # the stream that is current on every thread that chose none


class Stream:
    def __init__(self, gpu, priority=0):
        self.gpu, self.priority, self.number = gpu, priority, next(gpu.numbers)
        gpu.handler._handle_stream_creation(self.number)

    def wait_stream(self, other):
        event = Event(self.gpu)
        event.record(other)
        self.gpu.order("wait_stream", self.gpu.handler._handle_event_wait, event.number, self.number)

    def wait_event(self, event):
        self.gpu.order("wait_event", self.gpu.handler._handle_event_wait, event.number, self.number)


class Event:
    def __init__(self, gpu, enable_timing=False, blocking=False):
        self.gpu, self.blocking, self.number = gpu, blocking, next(gpu.numbers)
        gpu.handler._handle_event_creation(self.number)

    def record(self, stream):
        self.gpu.handler._handle_event_record(self.number, stream.number)

    def synchronize(self):
        self.gpu.waited.append(self)
        self.gpu.order("synchronize", self.gpu.handler._handle_event_synchronization, self.number)


class Gpu(TorchDispatchMode):
    """A GPU that is not there, in place of that of `torch.cuda`. One kind of order may be taken from it."""

    def __init__(self, monkeypatch, without=None):
        super().__init__()
        self.handler, self.numbers, self.without = EventHandler(), count(), without
        self.races, self.waited, self.used, self.kept = [], [], defaultdict(list), []
        self.current = Stream(self)
        assert self.current.number == HOST
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Stream", lambda device, priority=0: Stream(self, priority))
        monkeypatch.setattr(cuda, "Event", lambda **options: Event(self, **options))
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(cuda, "stream", self.on)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.record(tensor, stream))
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda like, device, pin_memory: self.held(empty_like(like)))

    def order(self, kind, ordered, *args):
        if kind != self.without:
            ordered(*args)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def held(self, tensor):
        self.used[address(tensor)] = None  # nobody else gets its memory while the test runs
        return tensor

    def record(self, tensor, stream):
        self.order("record_stream", self.use, tensor, stream.number, True)

    def use(self, tensor, stream, recorded=False):
        """Remembers who used memory: the first stream owns it, and others must be known to it before they use it."""
        self.kept.append(tensor)  # or another tensor would have its address
        known = self.used[address(tensor)]
        if known is not None and stream not in known:
            if known and not recorded:
                self.races.append(f"stream {stream} uses memory of stream {known[0]}, which may give it away meanwhile")
            known.append(stream)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, schema = kwargs or {}, function._schema
        read, written, names = set(), set(), {}

        def access(value, declared):
            view = declared.alias_info is not None and not declared.alias_info.is_write
            for tensor in tree_flatten(value)[0]:
                if isinstance(tensor, torch.Tensor) and not view and tensor.numel():
                    (written if declared in outputs or declared.alias_info is not None else read).add(address(tensor))
                    names.setdefault(address(tensor), []).append(str(declared.name))
                    self.use(tensor, self.current.number)

        outputs = schema.returns
        for i, declared in enumerate(schema.arguments):
            access(args[i] if i < len(args) else kwargs.get(declared.name), declared)
        made = function(*args, **kwargs)
        for value, declared in zip(made if len(outputs) > 1 else [made], outputs, strict=False):
            access(value, declared)
        found = self.handler._handle_kernel_launch(
            self.current.number, read - written, written, set(), str(schema), names
        )
        self.races += [str(race) for race in found]
        return made


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class Queue:
    """A pool whose threads are the test's."""

    def __init__(self):
        self.threads, self.work = [], deque()

    def post(self, work, *args):
        self.work.append((work, args))

    def fill(self, count):
        pass

    def give_up(self, thread):
        pass


class ByHand(Lanes):
    """Lanes that work when they are told to: all that is there for lanes, then what is there for judges."""

    def __init__(self):
        self.count, self.threads, self.abandoned, self.parallel = 1, 1, 0, False
        self._lanes, self._judges, self._watcher = Queue(), Queue(), Queue()
        self._judging = Judges(self._judges)

    def work(self):
        pools = [self._lanes, self._judges, self._watcher]
        while (pool := next((pool for pool in pools if pool.work), None)) is not None:
            work, args = pool.work.popleft()
            work(*args)


class Graphed(Tiny):
    capabilities = Capabilities(graphable=True)

    def collate(self, conditioning):
        return (torch.zeros(len(conditioning)),)

    def forward(self, x, tau, collated, guidance, geometry):
        return self.velocity(x, tau, [], guidance, geometry)


class Shared(torch.Tensor):
    """The output of a graph, if nobody copied it away."""

    def clone(self):
        return self.as_subclass(torch.Tensor)


BRIEF = Brief(0, "a", SIZE, 1, 1.0, None, FunctionReward(brightness))
STEP = Step(0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 1.0, -0.5)


def rows(slots, brief=BRIEF, **options):
    return [Row(brief, slot, slot, NONE, slot, STEP, **options) for slot in slots]


def contrast(images, prompts):
    """A reward of guided rows alone, whose turn comes while that of the others is taken."""
    return images.var((1, 2, 3))


def search(gpu, graphs):
    """Two batches, a guided one, one that needs more than a step, the images of a search: what the runner reported."""
    lanes, events = ByHand(), []
    runner = Runner(Graphed(), (4,), Ledger(), lanes)
    runner.streams = Streams(torch.device("cuda"))
    runner.use(lanes)
    with gpu:
        with gpu.on(Stream(gpu)):  # of whoever lets a request in
            runner.allocate(SIZE, 16)
        storage = runner.storage(SIZE)
        gpu.held(storage.x), gpu.held(storage.u)
        if graphs:
            runner.record(SIZE, [4], None, FakeCapture())
            if gpu.without == "clone":
                static, captured = runner.graphs[SIZE]._graphs[4]
                runner.graphs[SIZE]._graphs[4] = static, captured._replace(output=captured.output.as_subclass(Shared))
        runner.submit(rows(range(4)), events.append)
        runner.submit([*rows([4, 5]), *rows([6, 7], scored=False)], events.append)
        runner.submit([row._replace(parent=1, mixture=Mixture((2, 3), False)) for row in rows([8])], events.append)
        guided = replace(BRIEF, reward=FunctionReward(contrast))
        runner.submit(rows([9, 10], guided, kind="guided", guide=Guide(1.0), reach=1.0), events.append)
        show = Show(BRIEF, tuple(Candidate(slot, 1.0, -0.5, 0) for slot in (0, 5)))
        runner.submit_images([show], events.append)
        lanes.work()
        peeked = runner.peek(Candidate(1, 1.0, -0.5, 0), BRIEF)
    assert peeked.shape == (3, 8, 8)
    return runner, events


@pytest.mark.parametrize("graphs", [False, True])
def test_streams_wait_for_what_they_use(monkeypatch, graphs):
    gpu = Gpu(monkeypatch)
    _, events = search(gpu, graphs)
    assert not gpu.races, gpu.races[0]
    failed = [event.error for event in events if isinstance(event, Failed)]
    assert not failed, failed
    assert sum(len(event.rows) for event in events if isinstance(event, Landed)) == 11
    assert sum(len(event.shows) for event in events if isinstance(event, Shown)) == 1


@pytest.mark.parametrize(
    ("without", "graphs"),
    [
        ("wait_stream", False), ("wait_event", False), ("synchronize", False), ("record_stream", False),
        ("download", False), ("clone", True),
    ],
)  # fmt: skip
def test_an_order_that_is_missing_is_a_race(monkeypatch, without, graphs):
    gpu = Gpu(monkeypatch, without)
    if without == "download":
        monkeypatch.setattr(Download, "wait", lambda self: self._host)
    search(gpu, graphs)
    assert gpu.races


def test_a_lane_without_images_is_free_when_the_device_has_done_its_batch(monkeypatch):
    gpu, lanes, events = Gpu(monkeypatch), ByHand(), []
    runner = Runner(Graphed(), (4,), Ledger(), lanes)
    runner.streams = Streams(torch.device("cuda"))
    runner.use(lanes)
    with gpu:
        runner.allocate(SIZE, 16)
        runner.submit(rows(range(4), scored=False), events.append)
        work, args = lanes._lanes.work.popleft()
        work(*args)
        assert [type(event) for event in events] == [Landed] and not gpu.waited
        lanes.work()
    assert [type(event) for event in events] == [Landed, Free] and gpu.waited


def test_a_capture_waits_for_nothing_outside_of_it(monkeypatch):
    """An event of another stream that was recorded before would make CUDA refuse it, with a cache too."""
    gpu, lanes = Gpu(monkeypatch), ByHand()
    size, capturing = replace(SIZE, kept=12), []
    model = Keeping()
    runner = Runner(model, (4,), Ledger(), lanes)
    runner.streams = Streams(torch.device("cuda"))
    runner.use(lanes)
    after = runner.streams.after

    def watched(mark):
        assert not capturing, "a wait inside of a capture"
        after(mark)

    class Capture(FakeCapture):
        def __call__(self, function, pool):
            capturing.append(True)
            try:
                return super().__call__(function, pool)
            finally:
                capturing.clear()

    monkeypatch.setattr(runner.streams, "after", watched)
    with gpu:
        runner.allocate(size, 16)
        runner.record(size, [4], None, Capture())
    assert size in runner.graphs and size in runner.cached_graphs


def test_decoding_and_rewards_go_first_and_waits_leave_the_core_to_others(monkeypatch):
    gpu = Gpu(monkeypatch)
    runner, _ = search(gpu, False)
    assert runner.streams.side.priority == runner.streams.judging.priority == -1
    assert runner.streams.side is not runner.streams.judging
    assert gpu.waited and all(event.blocking for event in gpu.waited)


def test_a_cpu_has_no_streams():
    streams, images = Streams(torch.device("cpu")), torch.ones(2)
    assert streams.side is streams.judging is streams.mark() is streams.to_judges(images) is None
    streams.after(None)
    with streams.beside(images):
        pass
