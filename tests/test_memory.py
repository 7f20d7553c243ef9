"""Batch sizes by free memory: foretold from smaller batches, by a card that a test makes as large as it likes."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny import SIZE, Tiny, assert_sound, bon, engine

from rollflow import ModelError
from rollflow.cli.profiling import graph_lines
from rollflow.device import calibrate
from rollflow.device.memory import SHARE, CudaMemory, Room
from rollflow.models import Capabilities

SIZES = (1, 2, 4, 8, 16, 32)
BASE, EACH = 30, 10  # bytes of a batch, and of each of its rows


class Card:
    """A device of so many free bytes; what it says of them may be more than the truth."""

    def __init__(self, free, says=None):
        self.has, self.says, self.most, self.released = free, says, 0, 0

    def take(self, rows):
        if BASE + EACH * rows > self.has:
            raise torch.OutOfMemoryError(f"{rows} rows do not fit")
        self.most = max(self.most, BASE + EACH * rows)

    def start(self):
        self.most = 0

    def peak(self):
        return self.most

    def free(self):
        return self.has if self.says is None else self.says

    def release(self):
        self.released += 1


class OnCard(Tiny):
    """A model that can be measured, and takes of a card; knows which batches it was given."""

    def __init__(self, card, signature):
        self.card, self.sizes = card, []
        self.capabilities = Capabilities(signature=f"test_memory: {signature}")

    def velocity(self, x, tau, conditioning, guidance, geometry):
        self.sizes.append(len(x))
        self.card.take(len(x))
        return super().velocity(x, tau, conditioning, guidance, geometry)


def on_card(card, signature, **options):
    """An engine on a card in place of this machine's memory."""
    made = engine(OnCard(card, signature), **{"buckets": SIZES, **options})
    assert made._host.preparations.memory is None  # on a CPU nothing is foretold
    made._host.preparations.memory = card
    return made


def run(timing):
    """What a measurement finds, its work done at once as a lane does it."""
    took = None
    while True:
        try:
            work = timing.send(took)
        except StopIteration as stop:
            return stop.value
        took = work()


def test_what_a_batch_needs_lies_on_the_line_through_the_last_two():
    room = Room(Card(1000))
    assert room.needed(8) == 0 and room.fits(10**9)  # the first is tried
    room.peaks[2] = 50
    assert room.needed(4) == 100 and room.needed(2) == 50
    room.peaks[1] = 40
    assert room.needed(4) == 70 and room.needed(10) == 130 and room.needed(1) == 40
    room.peaks[8] = 50  # no more than a smaller one
    assert room.needed(16) == 50


@pytest.mark.parametrize(("batches", "held"), [(1, 0), (2, 0), (1, 300), (3, 100)])
def test_a_batch_fits_into_a_share_of_what_is_free(batches, held):
    room = Room(Card(1000), batches, lambda: held)
    room.peaks |= {1: 40, 2: 50}
    most = int((SHARE * (1000 - held) / batches - BASE) // EACH)
    assert room.fits(most) and room.full is None
    assert not room.fits(most + 1) and room.full == most + 1
    assert not room.fits(most + 9) and room.full == most + 1
    assert Room().fits(10**9)  # nothing is known of the memory


def test_no_batch_is_tried_that_is_known_not_to_fit():
    card = Card(1000)  # 16 rows take 190, and 32 rows 350; two at a time 700
    with on_card(card, "foretold", lanes=2) as made, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.generate(bon(40)).committed_nfe == 40
        assert made.stats().buckets == {(8, 8): SIZES} and made.stats().bounds == {(8, 8): "sizes"}
    card = Card(700)
    with on_card(card, "foretold: less", lanes=2) as made:
        with pytest.warns(RuntimeWarning, match="batches of 32 rows of 8x8 do not fit .* batch sizes 32 are not used"):
            assert made.generate(bon(40)).committed_nfe == 40
        assert max(made.model.sizes) == 16 and card.released == 0
        assert made.stats().buckets == {(8, 8): SIZES[:-1]} and made.stats().bounds == {(8, 8): "memory"}
        assert_sound(made)


@pytest.mark.parametrize("known", [True, False])
def test_running_out_of_memory_while_measuring_ends_the_list(known):
    card = Card(BASE + EACH * 10, says=10**9)
    made = on_card(card, f"full: {known}")
    if not known:
        made._host.preparations.memory = None
    with made:
        with pytest.warns(RuntimeWarning, match="batches of 16 rows .* sizes 16, 32 are not used"):
            assert made.generate(bon(40)).committed_nfe == 40
        assert made.model.sizes.count(16) == 1 and 32 not in made.model.sizes and card.released == known
        assert made.stats().buckets == {(8, 8): (1, 2, 4, 8)} and made.stats().bounds == {(8, 8): "memory"}
        assert_sound(made)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ((16,), "a batch of 16 rows of 8x8 does not fit .*: make the engine with smaller buckets"),
        ((1, 2), "a batch of 1 rows of 8x8 does not fit into the device's memory: ask for a smaller size"),
    ],
)
def test_where_not_even_the_smallest_fits_requests_fail_until_it_does(buckets, message):
    card = Card(0)
    with on_card(card, f"none: {buckets}", buckets=buckets) as made:
        with pytest.raises(ModelError, match=message):
            made.generate(bon())
        card.has = 10**6
        assert made.generate(bon()).committed_nfe == 4
        assert made.stats().bounds == {(8, 8): "sizes"}


def test_what_was_measured_is_kept_and_what_is_free_is_not():
    card = Card(10**6)
    model = OnCard(card, "kept")

    def measured():
        room = Room(card)
        found = run(calibrate.measured(model, SIZE, None, SIZES, 1, False, True, room))
        return tuple(found), room.full, len(model.sizes)

    assert measured() == (SIZES, None, len(model.sizes)) and model.sizes
    count = len(model.sizes)
    card.has = 200
    assert measured() == ((1, 2, 4, 8), 16, count)  # 16 rows take 190, more than 90 % of it
    card.has = 10
    assert measured() == ((1,), 2, count)  # one is always left
    card.has = 10**6
    assert measured() == (SIZES, None, count)
    other = OnCard(Card(200), "bound by memory")
    for _ in range(2):  # what a full device bounded is not kept
        before = len(other.sizes)
        room = Room(other.card)
        assert tuple(run(calibrate.measured(other, SIZE, None, SIZES, 1, False, True, room))) == (1, 2, 4, 8)
        assert len(other.sizes) > before


@pytest.mark.parametrize(("free", "bound"), [(10**6, "time"), (250, "time"), (120, "memory")])
def test_stats_say_whether_time_or_memory_bound_the_sizes(monkeypatch, free, bound):
    """A row takes least in batches of four; from eight rows on, a batch is too long to be kept for its own sake."""
    times = {1: 0.06, 2: 0.08, 4: 0.1, 8: 0.4, 16: 1.0, 32: 2.0}

    def seconds(model, geometry, conditioning, bucket, preview, repetitions):
        model.card.take(bucket)
        return times[bucket]

    monkeypatch.setattr(calibrate, "_seconds", seconds)
    with on_card(Card(free), f"bound: {free}") as made:
        made._host.preparations._keep = False  # as with batch sizes that the caller did not choose
        made.warm_up()
        assert max(made.stats().buckets[8, 8]) == 4 and made.stats().bounds == {(8, 8): bound}


def test_a_batch_that_does_not_fit_later_bounds_the_sizes_too():
    card = Card(10**6)
    with on_card(card, "later") as made:
        made.warm_up()
        assert made.stats().bounds == {(8, 8): "sizes"}
        card.has = BASE + EACH * 8
        with pytest.warns(RuntimeWarning, match="did not fit into the device's memory and was split"):
            assert made.generate(bon(40)).committed_nfe == 40
        assert made.stats().bounds == {(8, 8): "memory"}


def test_the_first_run_of_all_is_no_part_of_a_batch():
    calls, card = [], Card(10**6)
    room = Room(card)

    def work():
        calls.append(1)
        card.most += 10 if len(calls) > 1 else 500  # workspaces of libraries, which stay
        return 1.0

    assert room.run(1, work) == room.run(2, work) == 1.0
    assert room.peaks == {1: 10, 2: 10} and len(calls) == 3


def test_a_gpu_has_what_is_free_and_what_its_allocator_does_not_use(monkeypatch):
    now, device = {"allocated": 100, "most": 900}, torch.device("cuda", 1)

    def asked(name, value):
        def ask(where):
            assert where == device
            return value() if callable(value) else value

        monkeypatch.setattr(torch.cuda, name, ask)

    asked("mem_get_info", (5000, 9000))
    asked("memory_reserved", 1100)
    asked("memory_allocated", lambda: now["allocated"])
    asked("reset_peak_memory_stats", lambda: now.update(most=now["allocated"]))
    asked("max_memory_allocated", lambda: now["most"])
    memory = CudaMemory(device)
    assert memory.free() == 6000
    memory.start()
    assert memory.peak() == 0
    now["most"] = 350
    assert memory.peak() == 250


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_gpu():
    memory = CudaMemory(torch.device("cuda", torch.cuda.current_device()))
    kept = torch.empty(2**20, device="cuda")
    memory.start()
    free = memory.free()
    large = torch.empty(2**24, dtype=torch.uint8, device="cuda")
    assert memory.peak() == 2**24 and free - memory.free() >= 2**24 - 2**21
    del large
    assert memory.peak() == 2**24 and memory.free() >= free - 2**21 and kept.numel()
    memory.release()


def test_the_memory_of_cuda_graphs_is_told():
    with on_card(Card(10**6), "graphs") as made:
        made.warm_up()
        assert made.stats().graph_memory == {}
        made._host.runner.graphs[SIZE] = SimpleNamespace(total=4 * 2**20)
        assert made.stats().graph_memory == {(8, 8): 4 * 2**20}
        with made.profile() as profile:
            pass
        assert profile.recording.about["sizes"][0]["graph_bytes"] == 4 * 2**20
        assert "CUDA graphs of 8x8 hold 4 MiB" in [*graph_lines(profile.recording)]
