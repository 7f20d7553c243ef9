"""The bookkeeping of graphs: order, buffers, fallback; with a capture that replays by calling the function again."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rollflow import kernels
from rollflow.device.batch import Tables
from rollflow.device.cuda_graphs import Captured, Graphs
from rollflow.device.storage import Storage
from rollflow.errors import ModelError
from rollflow.models.layout import Layout
from rollflow.row import NONE

TOKENS, CHANNELS, SLOTS = 4, 12, 24
BUCKETS = (1, 2, 4, 8)


class FakeCapture:
    """Holds the function and runs it at a replay; until then its output is poison."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.pools: list[object] = []
        self.replays = 0

    def __call__(self, function: Callable[[], Tensor], pool: object) -> Captured:
        output = function()
        self.rows.append(len(output))
        self.pools.append(pool)
        output.fill_(math.nan)

        def replay() -> None:
            self.replays += 1
            output.copy_(function())

        return Captured(replay, output, pool or object(), output.nbytes)


def particles() -> Storage:
    """Slots of random states and velocities."""
    pool = Storage(SLOTS, TOKENS, CHANNELS, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    pool.x.normal_(generator=generator)
    pool.u.normal_(generator=generator)
    return pool


LAYOUT = Layout((1, 2, 2), (0.4, 0.5, 2.0), (0.1, -0.2, 0.0))


def step_of(pool: Storage) -> Callable[..., Tensor]:
    """Propose, a made-up velocity and finish: the runner's step with a model of one line."""
    affine = LAYOUT.affine(torch.device("cpu"))

    def step(integers: Tensor, floats: Tensor, pooled: Tensor, sequence: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        tables = Tables(integers, floats)
        parent, child, seed, key = tables.integers.unbind(0)
        x = kernels.propose(pool.x, pool.u, parent, child, tables.coefficients, seed, key, torch.float32)
        u = torch.tanh(x * tables.tau[:, None, None]) + pooled[:, None] + sequence.mean(1, keepdim=True)
        return kernels.finish(u, pool.x, pool.u, child, tables.posterior, 4, 4, 2, 2, *affine, torch.float32)

    return step


def batch(bucket: int, live: int, seed: int = 0, text: int = 3) -> tuple[Tensor, ...]:
    """Inputs of `live` rows and padding: children go to other slots than parents, every third row is of the prior."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)
    integers = torch.full((4, bucket), NONE)
    integers[0, :live], integers[1, :live] = slots[:live], slots[live : 2 * live]
    integers[0, :live:3] = NONE
    integers[2:, :live] = torch.randint(2**62, (2, live), generator=generator)
    floats = torch.rand(8 * bucket, generator=generator)
    conditioning = torch.randn(bucket, text + 1, CHANNELS, generator=generator)
    return integers, floats, conditioning[:, 0], conditioning[:, 1:]


def padding(bucket: int) -> tuple[Tensor, ...]:
    return batch(bucket, 0)


def recorded(pool: Storage) -> tuple[Graphs, FakeCapture]:
    capture = FakeCapture()
    graphs = Graphs(step_of(pool), capture)
    graphs.record(BUCKETS, padding)
    return graphs, capture


def test_largest_first_and_one_memory_pool() -> None:
    graphs, capture = recorded(particles())
    assert capture.rows == [8, 4, 2, 1]
    assert capture.pools[0] is None and capture.pools[1] is not None
    assert all(pool is capture.pools[1] for pool in capture.pools[1:])
    assert list(graphs.memory) == [8, 4, 2, 1]
    for bucket, size in graphs.memory.items():  # static inputs, and the output that the fake reports
        assert size == sum(value.nbytes for value in padding(bucket)) + bucket * TOKENS * CHANNELS * 4


def test_recording_writes_no_slot() -> None:
    pool = particles()
    x, u = pool.x.clone(), pool.u.clone()
    recorded(pool)
    assert torch.equal(pool.x, x) and torch.equal(pool.u, u)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_replay_is_the_step(bucket: int) -> None:
    """With new inputs each time, any number of live rows, and slots that no row names as they were."""
    ours, theirs = particles(), particles()
    graphs, capture = recorded(ours)
    step = step_of(theirs)
    for seed, live in enumerate((bucket, max(1, bucket - 1), 0, bucket)):
        inputs = batch(bucket, live, seed)
        named = inputs[0][1, :live]
        others = torch.ones(SLOTS, dtype=torch.bool).index_fill(0, named, False)
        before = ours.x[others].clone(), ours.u[others].clone()
        with torch.no_grad():
            expected = step(*inputs)
        graphs._graphs[bucket][1].output.fill_(math.nan)
        assert torch.equal(graphs.run(*inputs), expected)
        assert torch.equal(ours.x, theirs.x) and torch.equal(ours.u, theirs.u)
        assert torch.equal(ours.x[others], before[0]) and torch.equal(ours.u[others], before[1])
        assert not expected[live:].any()
    assert capture.replays == 4


def test_static_buffers_are_its_own_and_stay() -> None:
    expanded = torch.zeros(1, 1, CHANNELS).expand(8, 3, CHANNELS)
    made = (*batch(8, 0)[:3], expanded)  # what is given may be of any strides
    graphs = Graphs(step_of(particles()), FakeCapture())
    graphs.record([8], lambda bucket: made)
    static = graphs._graphs[8][0]
    addresses = [value.data_ptr() for value in static]
    assert all(value.is_contiguous() for value in static)
    assert not {value.data_ptr() for value in made} & set(addresses)
    for seed in range(3):
        inputs = batch(8, 8, seed)
        graphs.run(*inputs)
        assert [value.data_ptr() for value in graphs._graphs[8][0]] == addresses
        assert all(torch.equal(buffer, value) for buffer, value in zip(static, inputs, strict=True))


def test_the_result_outlives_the_next_replay() -> None:
    graphs, _ = recorded(particles())
    first = graphs.run(*batch(4, 4, 0))
    kept = first.clone()
    second = graphs.run(*batch(4, 4, 1))
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr() != graphs._graphs[4][1].output.data_ptr()


def changed(inputs: tuple[Tensor, ...], place: int, value: Tensor) -> tuple[Tensor, ...]:
    return (*inputs[:place], value, *inputs[place + 1 :])


FITTING = batch(4, 2)
MISFITS = {
    r"bucket: \[1, 2, 4, 8\] were captured, 3 was given": batch(3, 2),
    r"shape of floats: .*\[32\].* captured, .*\[33\].* given": changed(FITTING, 1, torch.zeros(33)),
    r"shape of conditioning 1: .*\[4, 3, 12\].* captured, .*\[4, 5, 12\].* given": batch(4, 2, text=5),
    r"dtype of conditioning 0: torch.float32 .* torch.float64 .*bucket 4": changed(FITTING, 2, FITTING[2].double()),
    r"device of conditioning 0: cpu was captured, meta was given": changed(FITTING, 2, FITTING[2].to("meta")),
    r"number of input tensors: 4 were captured, 3 were given": FITTING[:3],
}


@pytest.mark.parametrize("message", MISFITS)
def test_what_does_not_fit_runs_eagerly_and_says_why(message: str) -> None:
    eager: list[tuple[Tensor, ...]] = []

    def step(*inputs: Tensor) -> Tensor:
        eager.append(inputs)
        return inputs[0].double()

    capture = FakeCapture()
    graphs = Graphs(step, capture)
    graphs.record(BUCKETS, padding)
    eager.clear()
    given = MISFITS[message]
    with pytest.warns(RuntimeWarning, match=f"no CUDA graph fits this batch, {message}.*launched one by one"):
        result = graphs.run(*given)
    assert torch.equal(result, given[0].double()) and capture.replays == 0
    assert len(eager) == 1 and all(ours is theirs for ours, theirs in zip(eager[0], given, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs.run(*given)
        graphs.run(*batch(5, 1))  # nor for another reason
        graphs.run(*FITTING)
    assert capture.replays == 1


def test_the_fallback_is_the_same_step() -> None:
    ours, theirs = particles(), particles()
    graphs, _ = recorded(ours)
    inputs = batch(6, 5)
    with pytest.warns(RuntimeWarning, match="bucket"), torch.autocast("cpu"):
        result = graphs.run(*inputs)
    with torch.no_grad():
        assert torch.equal(result, step_of(theirs)(*inputs))
    assert torch.equal(ours.x, theirs.x) and torch.equal(ours.u, theirs.u)


def test_a_step_that_cannot_be_captured() -> None:
    def refuse(function: Callable[[], Tensor], pool: object) -> Captured:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(ModelError, match=r"8 rows cannot be captured .*not permitted.*graphs=False"):
        Graphs(step_of(particles()), refuse).record(BUCKETS, padding)
