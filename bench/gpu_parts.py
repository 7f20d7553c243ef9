"""What the parts of `python -m rollflow.bench gpu` share, and those that measure kernels and bare networks.

Each part is a generator of rows, so that what it measured before an error or the end of its time is kept. A part asks
its `Deadline` before it starts something long. Where there is no CUDA, a function that is called again stands in for a
CUDA graph: the same code runs, and its figures say nothing about graphs.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollflow import rewards
from rollflow.bench import geometries, kernel_bandwidth, kernel_bytes, prompt_sets
from rollflow.bench.baselines import bare_decode, bare_forward, bare_reward
from rollflow.bench.measure import resident_memory
from rollflow.device.cuda_graphs import Capture, Captured, cuda_capture
from rollflow.models import acceleration
from rollflow.models.flux import FluxModel

Row = dict[str, Any]

CHEAPER = 1.03  # a larger bucket must be this much faster a row than all smaller ones, or two in a row end the search
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)  # of the bare networks: the engine's, and one more
QUICK_BUCKETS = (1, 2)
MATMUL_SIDE = 8192
COMPILING = 25.0  # seconds that a first compilation is given


class Deadline:
    """A time by which a part should be over. Nothing is interrupted: whoever starts something long asks first.

    Args:
        seconds: from now on.
        within: another one, which this does not outlive, and whose clock it goes by.
        clock: seconds.
    """

    def __init__(self, seconds: float, within: Deadline | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock: Callable[[], float] = clock if within is None else within.clock
        end = self.clock() + seconds
        self._end: float = end if within is None else min(end, within._end)

    @property
    def left(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self._end - self.clock())

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether something that takes this long would be done in time."""
        return self.left > seconds


class Measure(NamedTuple):
    """How a run is timed: on which device, over how many bursts (the median counts), of how many seconds at least."""

    device: torch.device
    repetitions: int
    least: float

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one run, back to back with others. The first of all is not timed."""
        self._burst(run, 1)
        runs = math.ceil(self.least / max(1e-9, self._burst(run, 1))) or 1
        return statistics.median(self._burst(run, runs) for _ in range(self.repetitions))

    def once(self, run: Callable[[], object]) -> float:
        """Of the very first run, until the device is done."""
        return self._burst(run, 1)

    def _burst(self, run: Callable[[], object], runs: int) -> float:
        wait(self.device)
        start = time.perf_counter()
        for _ in range(runs):
            run()
        wait(self.device)
        return (time.perf_counter() - start) / runs


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Gives back what nobody holds any more, and what torch's compiler keeps."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated(device: torch.device) -> int:
    """Bytes of device memory in tensors, without a GPU those resident in the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_memory()


def called_again(function: Callable[[], Tensor], pool: Any) -> Captured:
    """Stands in for `rollflow.device.cuda_graphs.cuda_capture` without CUDA: a replay calls the function again."""
    output = function()

    def replay() -> None:
        output.copy_(function())

    return Captured(replay, output, pool, 0)


def capture(device: torch.device) -> Capture:
    """CUDA graphs, or what stands in for them."""
    return cuda_capture if device.type == "cuda" else called_again


def bandwidth(device: torch.device, repetitions: int, quick: bool, deadline: Deadline) -> Iterator[Row]:
    """The copy that sets the scale, and the rows of `python -m rollflow.bench kernels`, the largest sizes first."""
    command = kernel_bandwidth.Kernels(device=str(device), repetitions=repetitions)
    copy = kernel_bandwidth.copying(device)
    (seconds,) = kernel_bandwidth.seconds_a_call([copy.fused], 1, device, repetitions, 3)
    figure = copy.bytes / seconds / 1e9
    yield {"kernel": "copy", "bytes": copy.bytes, "seconds": seconds, "gigabytes_per_second": figure}
    del copy  # its buffers are the largest of all
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    swept = kernel_bandwidth.SWEPT if device.type == "cuda" else 1
    sizes = kernel_bytes.QUICK[:2] if quick else kernel_bytes.SIZES
    for size in sorted(sizes, key=math.prod, reverse=True):
        for build in (kernel_bandwidth.proposing, kernel_bandwidth.finishing, kernel_bandwidth.drawing):
            if not deadline.allows(3.0):
                return
            yield command.row(build(size, dtype, device, swept), device, figure)


def matmul(measure: Measure, side: int, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices, normal numbers as in a network: zeros would let the clock rise."""
    left, right = (torch.randn(side, side, device=measure.device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / measure.seconds(partial(torch.mm, left, right, out=product))


class Subject:
    """A geometry's model and reward on a device, and what a row was measured to cost in each of their parts.

    Attributes:
        alone: the pipeline for the sequential loop.
        seconds: of a row at the best bucket, by part: transformer, decode, reward, of models with a light decoder
            preview. What failed is missing.
        best: the bucket at which the eager transformer does the most rows a second.
        paying: the buckets up to the last that is notably faster a row than all before it, two of them at least; None
            where none was measured.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, shrink: int, quick: bool):
        self.name, self.of, self.device = name, geometries.geometry(name).shrunk(shrink), device
        built_in = self.of.built_in
        light = None if built_in else geometries.light_decoder(name, device, dtype, shrink)
        pipeline = geometries.pipeline(name, device, dtype, shrink)
        # With a decoder of its own, as it comes: engines lay theirs out channels last, which torch's own group
        # normalisation on a GPU does not like.
        self.alone = copy.copy(pipeline)
        self.alone.vae = copy.deepcopy(pipeline.vae)
        self.model = FluxModel(pipeline, light)
        self.model.pipeline.set_progress_bar_config(disable=True)
        self.reward = rewards.make("count" if built_in else geometries.clip_reward(device, dtype, shrink))
        self.sizes = QUICK_BUCKETS if quick else BUCKETS
        self.row: Row = {"geometry": self.of.name, "dtype": str(dtype).removeprefix("torch.")}
        self.seconds: dict[str, float] = {}
        self.eager: dict[int, float] = {}

    @property
    def best(self) -> int:
        return max(self.eager, key=lambda bucket: bucket / self.eager[bucket], default=1)

    @property
    def paying(self) -> tuple[int, ...] | None:
        best, rate = 2, 0.0
        for bucket, seconds in self.eager.items():
            if bucket / seconds > CHEAPER * rate:
                best, rate = max(best, bucket), bucket / seconds
        return tuple(size for size in self.sizes if size <= best) if self.eager else None

    def bare(self, part: str, mode: str, bucket: int, seconds: float, **more: Any) -> Row:
        """The row of a bare part, whose cost is kept. What is compiled later is no measure of searches before."""
        if not mode.startswith("compiled"):
            self.seconds[part] = min(seconds / bucket, self.seconds.get(part, math.inf))
        rate = bucket / seconds
        measured = {"nfe_per_second": rate, "milliseconds_per_nfe": 1000 / rate, "seconds": seconds}
        return {"contender": f"bare {part}", **self.row, "mode": mode, "bucket": bucket, **measured, **more}


def built(subject: Subject, seconds: float, before: int) -> Row:
    """What it took to make a geometry's networks, and their memory."""
    memory = max(0, allocated(subject.device) - before)
    sizes = {"parameters": geometries.parameters(subject.of), "flops": geometries.flops(subject.of)}
    return {"contender": "build", **subject.row, "seconds": seconds, "peak_memory_bytes": memory, **sizes}


def ascending(
    make: Callable[[int], Callable[[], object]], sizes: Sequence[int], measure: Measure, deadline: Deadline
) -> Iterator[tuple[int, float | None]]:
    """Buckets and the seconds of a run, until a row no longer gets cheaper, or time runs out.

    Where memory runs out, the last bucket comes with None.
    """
    best, slower, last = math.inf, 0, 0.0
    for bucket in sizes:
        if slower == 2 or not deadline.allows(2 * (measure.repetitions + 2) * last):
            return
        try:
            seconds = measure.seconds(make(bucket))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield bucket, None
            return
        yield bucket, seconds
        last, slower = seconds, 0 if seconds / bucket * CHEAPER < best else slower + 1
        best = min(best, seconds / bucket)


def transformer(subject: Subject, peak: float | None, measure: Measure, deadline: Deadline) -> Iterator[Row]:
    """The bare transformer at each bucket, eager. `mfu` is a share of the matrix product's measured `peak`."""
    for bucket, seconds in ascending(partial(bare_forward, subject.model), subject.sizes, measure, deadline):
        if seconds is None:
            yield _no_memory(subject, "transformer", bucket)
        else:
            subject.eager[bucket] = seconds
            yield subject.bare("transformer", "eager", bucket, seconds, **_mfu(subject, bucket, seconds, peak))


def graphs(subject: Subject, peak: float | None, measure: Measure, deadline: Deadline) -> Iterator[Row]:
    """The same buckets as CUDA graphs that share memory, the largest first; `graph_bytes` is what each added."""
    held: list[tuple[Captured, object]] = []  # the memory that they share lives as long as one of them
    for bucket in sorted(subject.eager, reverse=True):
        if not deadline.allows((measure.repetitions + 6) * subject.eager[bucket] + 2 * measure.least):
            continue
        captured, inputs = _captured(subject, bucket, held[0][0].pool if held else None)
        held.append((captured, inputs))
        seconds = measure.seconds(captured.replay)
        more = {**_mfu(subject, bucket, seconds, peak), "graph_bytes": captured.memory}
        yield subject.bare("transformer", "graph", bucket, seconds, **more)


def decode_and_reward(subject: Subject, measure: Measure, deadline: Deadline) -> Iterator[Row]:
    """Rows a second of the decoders and of the reward; the reward's scores come to the host."""
    of, prompt = subject.of, prompt_sets.load("medium", 1)

    def judge(bucket: int) -> Callable[[], None]:
        generator = torch.Generator(subject.device).manual_seed(0)
        images = torch.rand(bucket, 3, of.height, of.width, device=subject.device, generator=generator)
        return bare_reward(subject.reward, images, prompt * bucket)

    parts: dict[str, Callable[[int], Callable[[], object]]] = {
        "decode": partial(bare_decode, subject.model),
        "reward": judge,
    }
    if subject.model.capabilities.preview:
        parts["preview"] = partial(bare_decode, subject.model, preview=True)
    for part, make in parts.items():
        for bucket, seconds in ascending(make, subject.sizes, measure, Deadline(deadline.left / 2, deadline)):
            if seconds is None:
                yield _no_memory(subject, part, bucket)
            else:
                yield subject.bare(part, "eager", bucket, seconds)


def compiled(subject: Subject, peak: float | None, quick: bool, measure: Measure, deadline: Deadline) -> Iterator[Row]:
    """The transformer with compiled blocks, alone and in a CUDA graph, at its best bucket and at one row.

    The blocks stay compiled: this comes last. `compile_seconds` are those of the first forward.
    """
    acceleration.compile_blocks(subject.model.transformer, "regional")
    for bucket in dict.fromkeys((subject.best,) if quick else (subject.best, 1)):
        if not deadline.allows(COMPILING if bucket == subject.best else COMPILING / 2):
            return
        first = measure.once(bare_forward(subject.model, bucket))
        seconds = measure.seconds(bare_forward(subject.model, bucket))
        more = {**_mfu(subject, bucket, seconds, peak), "compile_seconds": first}
        yield subject.bare("transformer", "compiled", bucket, seconds, **more)
        captured, inputs = _captured(subject, bucket, None)
        seconds = measure.seconds(captured.replay)
        more = {**_mfu(subject, bucket, seconds, peak), "graph_bytes": captured.memory}
        yield subject.bare("transformer", "compiled + graph", bucket, seconds, **more)
        del captured, inputs


def _captured(subject: Subject, bucket: int, pool: Any) -> tuple[Captured, object]:
    """A bare forward as a graph, and what holds its inputs: a graph knows their addresses, and does not own them."""
    forward, nothing = bare_forward(subject.model, bucket), torch.zeros(1, device=subject.device)

    def step() -> Tensor:
        forward()
        return nothing.clone()

    return capture(subject.device)(step, pool), step


def _mfu(subject: Subject, bucket: int, seconds: float, peak: float | None) -> Row:
    """What share of the matrix product's FLOP/s the transformer reaches, where they are known."""
    rate = geometries.flops(subject.of) * bucket / seconds
    return {"teraflops": rate / 1e12, **({"mfu": rate / peak} if peak else {})}


def _no_memory(subject: Subject, part: str, bucket: int) -> Row:
    return {"contender": f"bare {part}", **subject.row, "mode": "eager", "bucket": bucket, "error": "out of memory"}
