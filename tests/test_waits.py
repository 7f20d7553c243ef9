"""Where a thread of the engine waits for the device, without one: what a lane asks of tensors that hold nothing.

On torch's meta device a number cannot be read at all, and a copy between it and the host stands for one between a GPU
and the host: it waits unless it is asked not to, and comes from or goes to pinned memory.
"""

from dataclasses import replace

import pytest
import torch
from test_streams import BRIEF, STEP, ByHand, contrast
from tiny import SIZE, Tiny
from torch.utils._python_dispatch import TorchDispatchMode

from rollflow import copies, kernels
from rollflow.device import judge, moves
from rollflow.device.runner import Runner
from rollflow.device.storage import Storage
from rollflow.draw import Guide
from rollflow.models import cfg
from rollflow.profile.ledger import Ledger
from rollflow.rewards import FunctionReward
from rollflow.row import NONE, Candidate, Failed, Landed, Mixture, Row, Show, Start

META = torch.device("meta")
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


class Waits(TorchDispatchMode):
    """Notes what would wait for a GPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found, self.copies, self.pinned = [], 0, set()
        monkeypatch.setattr(torch.Tensor, "pin_memory", self.pin(torch.Tensor.clone))
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            monkeypatch.setattr(torch.Tensor, name, self.watched(name, getattr(torch.Tensor, name)))
        monkeypatch.setattr(torch, "tensor", self.made(torch.tensor))
        monkeypatch.setattr(torch.Tensor, "__getitem__", self.taken(torch.Tensor.__getitem__))

    def pin(self, clone):
        def pinned(tensor):
            made = clone(tensor)
            self.pinned.add(made.untyped_storage().data_ptr())
            return made

        return pinned

    def watched(self, name, method):
        def call(tensor, *args):
            if tensor.device == META:
                self.found.append(name)
                return {"tolist": [0.0] * len(tensor) if tensor.ndim else 0.0, "cpu": tensor}.get(name, True)
            return method(tensor, *args)

        return call

    def made(self, tensor):
        def make(*args, device=None, **options):
            if device is not None and torch.device(device) == META:
                self.found.append("torch.tensor")
            return tensor(*args, device=device, **options)

        return make

    def taken(self, get):
        def take(tensor, index):
            places = index if isinstance(index, tuple) else (index,)
            if tensor.device == META and any(isinstance(one, list) for one in places):
                self.found.append("an index of numbers")
            return get(tensor, index)

        return take

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.removeprefix("aten::")
        if name in READS and args[0].device == META:
            self.found.append(name)
            return True
        if name in ("_to_copy", "copy_"):
            to, source = (kwargs.get("device"), args[0]) if name == "_to_copy" else (args[0].device, args[1])
            if to is not None and torch.device(to) != source.device:
                self.copies += 1
                pinned = source.device == META or source.untyped_storage().data_ptr() in self.pinned
                if not (pinned and (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))):
                    self.found.append(f"a blocking {name} of {tuple(source.shape)}")
        if name.startswith("index") and any(i is not None and i.device != META for i in indices(args)):
            self.found.append("an index of the host")
        return function(*args, **kwargs)


def indices(args):
    """Those of an indexing of a tensor on the device."""
    given = args[1] if len(args) > 1 and args[0].device == META else []
    return [one for one in given if isinstance(one, torch.Tensor)] if isinstance(given, list | tuple) else []


class Far(Tiny):
    device = META


class Downloads:
    """In place of `rollflow.copies.Download`: nothing can be had of the meta device, so all numbers are 1."""

    made = 0

    def __init__(self, *tensors):
        type(self).made += 1
        self.tensors = tensors

    def wait(self):
        return tuple(torch.ones(tensor.shape, dtype=tensor.dtype) for tensor in self.tensors)


def started():
    """A request that starts from an image, of which it keeps a part, with noise of its own."""
    state = torch.zeros(16, 12, device=META)
    latents = torch.zeros(3, 8, 8, device=META)
    start = Start(state, torch.ones_like(state), latents, torch.ones_like(latents))
    return replace(BRIEF, start=start, latents=torch.zeros(2, 16, 12))


ROW = Row(BRIEF, 0, 5, NONE, 0, STEP)
BATCHES = {
    "plain": [ROW._replace(slot=slot) for slot in range(3)],
    "some judged": [ROW, ROW._replace(slot=1, scored=False)],
    "given noise": [ROW._replace(brief=replace(BRIEF, latents=torch.zeros(2, 16, 12)), given=1)],
    "from an image": [ROW._replace(brief=started()), ROW._replace(brief=started(), given=0)],
    "known noise": [ROW._replace(brief=replace(started(), latents=None), parent=1)],
    "mixed": [ROW._replace(parent=1, mixture=Mixture((2, 3), coarse)) for coarse in (False, True)],
    "moved": [ROW._replace(parent=1, moved=True)],
}


@pytest.fixture
def runner(monkeypatch):
    Downloads.made = 0
    for module in (judge, __import__("rollflow.device.guided", fromlist=[""])):
        monkeypatch.setattr(module, "Download", Downloads)
    made = Runner(Far(), (4,), Ledger(), ByHand())
    made.allocate(SIZE, 16)
    assert made.storage(SIZE).move.device == META
    return made


def on_lane(runner, waits, submit):
    """Does what is there for the lane alone; returns what it reported."""
    events = []
    submit(events.append)
    with waits:
        (work, args) = runner.threads._lanes.work.popleft()
        work(*args)
    failed = [event.error for event in events if isinstance(event, Failed)]
    assert not failed, failed[0].__cause__
    return events


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_makes_its_lane_wait_for_nothing(monkeypatch, runner, kind):
    waits = Waits(monkeypatch)
    on_lane(runner, waits, lambda report: runner.submit(BATCHES[kind], report))
    assert not waits.found
    assert waits.copies >= 2 and Downloads.made == 0  # at least its two tables


def test_images_make_their_lane_wait_for_nothing(monkeypatch, runner):
    waits = Waits(monkeypatch)
    show = Show(BRIEF, tuple(Candidate(slot, 1.0, -0.5, 0) for slot in range(6)))  # of two batches
    on_lane(runner, waits, lambda report: runner.submit_images([show], report))
    assert not waits.found and waits.copies == 4


@pytest.mark.parametrize("guide", [Guide(2.0), Guide(0.5, normalised=True, clip=0.1)])
def test_a_guided_batch_makes_its_lane_wait_once(monkeypatch, runner, guide):
    """At its end, for scores and gradients together: not before the backward is on its way."""
    waits, brief = Waits(monkeypatch), replace(BRIEF, reward=FunctionReward(contrast))
    rows = [ROW._replace(brief=brief, slot=slot, kind="guided", guide=guide, reach=1.0) for slot in range(3)]
    events = on_lane(runner, waits, lambda report: runner.submit(rows, report))
    assert not waits.found and Downloads.made == 1
    (landed,) = [event for event in events if isinstance(event, Landed)]
    assert landed.scores == [1.0] * 3 and not landed.invalid


def test_a_guided_velocity_copies_its_index_without_a_wait(monkeypatch):
    waits, model = Waits(monkeypatch), cfg.ClassifierFree(Far())
    pairs = [cfg.Pair(None, one) for one in (None, torch.zeros(1))]
    x, numbers = torch.zeros(2, 16, 12, device=META), torch.ones(2, device=META)
    with waits:
        assert model.velocity(x, numbers, pairs, numbers, SIZE).shape == x.shape
    assert not waits.found and waits.copies == 1


def test_waits_are_seen(monkeypatch):
    """Each that the engine once had."""
    waits, far = Waits(monkeypatch), torch.zeros(4, device=META)
    seen = [
        lambda: torch.tensor([1], device=META),
        lambda: torch.zeros(2).to(META),
        lambda: torch.zeros(2).to(META, non_blocking=True),  # of memory that is not pinned
        lambda: far.copy_(torch.zeros(4)),
        lambda: far[[1, 2]],
        lambda: far[torch.tensor([1])],
        lambda: far.sum().item(),
        lambda: bool(far.sum() == 0),
        lambda: far.tolist(),
        lambda: far.cpu(),
    ]
    with waits:
        for i, wait in enumerate(seen):
            wait()
            assert len(waits.found) == i + 1, waits.found
        copies.upload(torch.zeros(2), META)
        far.copy_(torch.zeros(4).pin_memory(), non_blocking=True)
    assert len(waits.found) == len(seen)


def test_noise_of_a_row_by_itself_is_that_of_its_batch():
    """Though its seed and its key, which needs all 64 bits, are filled in on the device."""
    seeds, keys = torch.tensor([3, 7]), torch.tensor([1, moves.KNOWN + 1])
    alone = moves._drawn(7, moves.KNOWN + 1, Storage(1, 16, 12, torch.device("cpu")))
    assert torch.equal(alone, kernels.noise(seeds, keys, 16, 12)[1])
