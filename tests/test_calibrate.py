"""What is measured before the first request: which batch sizes earn their place, and which dtype, in bounded time."""

import pytest
import torch
from tiny import Tiny

from rollflow.device import calibrate
from rollflow.device.calibrate import DTYPE_SECONDS, PROBE, best_dtype, earning, measured

# Seconds of forward and decode on an H100, from the bench's row rates: FLUX.1 at 1024^2, and a launch-bound model.
FLUX = {1: 0.186, 2: 0.358, 4: 0.706, 8: 1.385, 16: 2.74, 24: 4.1, 32: 5.5}
SMALL = {1: 0.012, 2: 0.012, 4: 0.013, 8: 0.013, 16: 0.014, 24: 0.018, 32: 0.024, 48: 0.036, 64: 0.048}


def sizes(costs, monkeypatch):
    """Those that are kept, and those that were timed."""
    timed = []

    def seconds(model, geometry, conditioning, bucket, *rest):
        timed.append(bucket)
        return costs[bucket]

    monkeypatch.setattr(calibrate, "_seconds", seconds)
    timing, answer = measured(Tiny(), Tiny().geometry(), None, (*costs,), 1, False, False), None
    while True:
        try:
            work = timing.send(answer)
        except StopIteration as stop:
            return [*stop.value], timed
        answer = work()


@pytest.mark.parametrize(
    ("costs", "kept"),
    [
        (FLUX, [1, 2]),  # 3.9 % are gained by two rows, 1.4 to 1.9 % by each further doubling
        (SMALL, [*SMALL]),  # short batches are kept: a timing may mislead
        ({size: 10 * seconds for size, seconds in SMALL.items()}, [1, 2, 4, 8, 16, 24]),
        ({1: 0.2, 2: 0.4, 4: 0.6}, [1, 2, 4]),  # one that gains nothing, below one that does
    ],
)
def test_a_batch_size_must_gain_three_percent_for_each_doubling(costs, kept, monkeypatch):
    assert sizes(costs, monkeypatch)[0] == kept
    assert [*earning(costs)] == kept


def test_three_sizes_in_a_row_that_gain_nothing_end_the_search_or_one_that_is_long(monkeypatch):
    assert sizes({size: seconds / 5 for size, seconds in FLUX.items()}, monkeypatch)[1] == [1, 2, 4, 8, 16]
    assert sizes(FLUX, monkeypatch)[1] == [1, 2, 4]


class Slow(Tiny):
    """A model whose rows take what a clock of its own says."""

    def __init__(self, dtype, clock, seconds):
        self.dtype, self.clock, self.seconds = dtype, clock, seconds

    def velocity(self, x, tau, conditioning, guidance, geometry):
        self.clock.now += len(x) * self.seconds
        self.clock.rows.append(len(x))
        return x


class Clock:
    def __init__(self):
        self.now, self.rows, self.made = 0.0, [], []

    def __call__(self):
        return self.now

    def dtype(self, float32, bfloat16, device="cpu"):
        """What is chosen where a row takes so many seconds."""
        seconds = {torch.float32: float32, torch.bfloat16: bfloat16}

        def make(dtype):
            self.made.append(dtype)
            return Slow(dtype, self, seconds[dtype])

        return best_dtype(make, torch.device(device), self)


def test_dtypes_are_compared_on_batches_where_that_is_quick():
    clock = Clock()
    assert clock.dtype(0.002, 0.001) == torch.bfloat16 and PROBE in clock.rows
    assert Clock().dtype(0.001, 0.002) == torch.float32


def test_dtypes_of_a_slow_model_are_compared_by_a_row_or_not_at_all():
    clock = Clock()
    assert clock.dtype(1.0, 0.9) == torch.bfloat16 and {*clock.rows} == {1}
    assert clock.now < 3 * DTYPE_SECONDS
    clock = Clock()
    assert clock.dtype(60.0, 30.0) == torch.float32
    assert clock.now == 60 and clock.made == [torch.float32]


@pytest.mark.parametrize(("capability", "timed"), [((9, 0), 0), ((8, 0), 0), ((7, 5), 2)])
def test_a_gpu_made_for_bfloat16_times_nothing(monkeypatch, capability, timed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    clock = Clock()
    assert clock.dtype(0.001, 0.004, "cuda") == (torch.float32 if timed else torch.bfloat16)
    assert len(clock.made) == timed
