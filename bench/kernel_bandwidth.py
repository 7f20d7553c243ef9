"""How near the kernels come to the speed of the memory: `python -m rollflow.bench kernels`.

All three operators do little arithmetic on much memory, so the figure of each is bytes over seconds: the bytes that its
contract must move, whatever a cache or a compiler saves or adds, next to a plain copy on the same device, and the
seconds next to those of the same expression in eager torch.

On a CUDA device a contender's calls are captured in one CUDA graph and its replays timed with events, at least
`LEAST_SECONDS` of them back to back: device time, without the host's time to launch, which for small sizes is longer
and which both contenders would pay (plain torch once a kernel, so eager torch is slower than it looks here). The calls
rotate over so many working sets, slots of one pool and outputs alike, that `SWEPT` bytes lie between two uses of one:
the L2 cache holds none of them. On a CPU the operators run their reference in torch and numpy, the calls are timed one
by one on a single working set, and the figures say nothing of the kernels.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rollflow import kernels
from rollflow.bench import kernel_static, outputs
from rollflow.bench.environment import environment
from rollflow.errors import RequestError, shown
from rollflow.models.layout import Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SWEPT = 2**28  # bytes between two uses of a working set: twice the largest L2 cache there is
LEAST_SECONDS = 0.01  # of one timing: far more than a clock's resolution and a graph's start
LEAST_LAUNCHES = 16  # in one graph, so that the gap between two replays does not count
COPIED = {"cuda": 2**27, "cpu": 2**24}  # float32 elements of the copy that sets the scale: 512 and 64 MiB
STEP = (0.9, -0.1, 0.3, 1.1)  # (a, b, k, inverse scale) of a stochastic step: every term is there
MEAN = (1.0, -0.4)  # (p, q) of a posterior mean
SCALING, SHIFT = 0.3611, 0.1159  # of FLUX's autoencoder; any others take as long
PATCH = (1, 2, 2)  # of FLUX's tokens

Call = Callable[[int], Tensor]  # on the working set of that number


class Size(NamedTuple):
    """Rows of a batch, tokens of a row (a square number) and channels of a token (a multiple of 4)."""

    rows: int
    token: int
    channel: int


SIZES = tuple(  # the built-in model, FLUX at 512 x 512 and at 1024 x 1024 pixels
    Size(rows, token, channel)
    for token, channel, batches in ((16, 32, (16, 64, 256)), (1024, 64, (4, 16, 64)), (4096, 64, (1, 8, 32, 64)))
    for rows in batches
)
QUICK = tuple(next(size for size in SIZES if size.token == token) for token in (16, 1024, 4096))


class Workload(NamedTuple):
    """A kernel at one size: the same work by the operator and by plain torch, and the bytes a call must move.

    `fused` and `unfused` take the number of a working set, 0 to `sets - 1`, and return their output.
    """

    kernel: str
    size: Size
    dtype: torch.dtype
    bytes: int
    sets: int
    fused: Call
    unfused: Call


@dataclass(frozen=True)
class Kernels:
    """Measures the memory bandwidth of propose, finish and noise against a device copy and against plain torch.

    A CPU runs the operators' reference: a figure from there says nothing about the kernels.
    """

    device: str | None = None
    """cpu, cuda or cuda:N; by default cuda where torch sees one, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the model's inputs and outputs and of the latents; by default bfloat16 on cuda, float32 on cpu."""
    repetitions: int = 5
    """How often each contender is timed, in turns; the median counts."""
    warm_up: int = 3
    """Calls of each contender before the first that is timed; on cuda at least one on each working set."""
    quick: bool = False
    """The smallest batch of each geometry alone."""
    static: bool = False
    """Measure nothing: compile for A100, H100 and B200, here, and predict from bytes and instructions."""
    json: Path | None = None
    """A file for the numbers."""

    def __call__(self) -> None:
        """Measures the copy and every kernel at every size, prints the table, writes the file.

        Raises:
            RequestError: there is no such device, or a count is less than 1.
        """
        if self.static:
            return self._predict()
        device, dtype = self._checked()
        outputs.check_file(self.json)
        console = Console()
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            where = {**environment(), "measured_on": str(device)}
            copy = copying(device)
            (seconds,) = seconds_a_call([copy.fused], 1, device, self.repetitions, self.warm_up)
            bandwidth = copy.bytes / seconds / 1e9
            del copy  # its buffers are the largest of all
            rows = [
                self.row(build(size, dtype, device, SWEPT if device.type == "cuda" else 1), device, bandwidth)
                for build in (proposing, finishing, drawing)
                for size in (QUICK if self.quick else SIZES)
            ]
        console.print(_table(rows))
        console.print(f"a copy moves {bandwidth:.1f} GB/s on {where['device']} ({device})")
        if device.type == "cpu":
            console.print("on a CPU the operators run their reference: these figures say nothing about the kernels")
        if self.json:
            report = {"environment": where, "copy_gigabytes_per_second": bandwidth, "rows": rows}
            self.json.write_text(json.dumps(report, indent=1) + "\n")

    def _predict(self) -> None:
        outputs.check_file(self.json)
        sizes, dtype = QUICK if self.quick else SIZES, DTYPES[self.dtype or "bfloat16"]
        works = [
            kernel_static.Work(name, *size, PATCH[1:], dtype, _moved(name, size, dtype))
            for name in ("propose", "finish", "noise")
            for size in sizes
        ]
        rows = kernel_static.rows(works)
        Console(width=120).print(kernel_static.table(rows))
        if self.json:
            self.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")

    def _checked(self) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype that were asked for, or that stand for none."""
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise RequestError(f"no device {shown(self.device)}: choose cpu, cuda or cuda:N") from error
        if device.type not in COPIED:
            raise RequestError(f"no kernels for device {shown(self.device)}: choose cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RequestError(f"no device {shown(self.device)}: torch sees {torch.cuda.device_count()} CUDA devices")
        if min(self.repetitions, self.warm_up) < 1:
            raise RequestError(f"repetitions={self.repetitions}, warm_up={self.warm_up}: at least 1 each")
        return device, DTYPES[self.dtype or ("bfloat16" if device.type == "cuda" else "float32")]

    def row(self, work: Workload, device: torch.device, copy: float) -> dict[str, Any]:
        calls = [work.fused, work.unfused]
        fused, unfused = seconds_a_call(calls, work.sets, device, self.repetitions, self.warm_up)
        return {
            "kernel": work.kernel,
            **work.size._asdict(),
            "dtype": str(work.dtype).removeprefix("torch."),
            "seconds": fused,
            "bytes": work.bytes,
            "gigabytes_per_second": work.bytes / fused / 1e9,
            "of_copy": work.bytes / fused / 1e9 / copy,
            "over_torch": unfused / fused,
        }


def seconds_a_call(
    calls: Sequence[Call], sets: int, device: torch.device, repetitions: int, warm_up: int
) -> list[float]:
    """Seconds of one call of each contender: medians over `repetitions` timings, the contenders in turns."""
    bursts = [(_captured if device.type == "cuda" else _looped)(call, sets, warm_up) for call in calls]
    taken = [[burst() for burst in bursts] for _ in range(repetitions)]
    return [statistics.median(of_one) for of_one in zip(*taken, strict=True)]


def _looped(call: Call, sets: int, warm_up: int) -> Callable[[], float]:
    """Calls timed by the host's clock, for a device that works while the host waits."""

    def burst(calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            call(i % sets)
        return (time.perf_counter() - start) / calls

    burst(warm_up)
    return partial(burst, math.ceil(LEAST_SECONDS / burst(1)))


def _captured(call: Call, sets: int, warm_up: int) -> Callable[[], float]:
    """Calls captured in a CUDA graph, its replays timed by the device's clock."""
    for i in range(max(warm_up, sets)):  # every set: Triton compiles anew where a pointer's alignment differs,
        call(i % sets)  # and a capture may neither compile nor load a module
    launches = sets * math.ceil(LEAST_LAUNCHES / sets)
    graph = torch.cuda.CUDAGraph()
    held: list[Tensor | None] = [None] * sets  # else every output would lie where the last one lay, in the cache
    with torch.cuda.graph(graph):
        for i in range(launches):
            held[i % sets] = call(i % sets)

    def burst(replays: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()  # not timed: the device works on it while the host queues the others
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / (replays * launches)

    burst(1)  # the first replay uploads the graph
    return partial(burst, math.ceil(LEAST_SECONDS / (burst(1) * launches)))


def copying(device: torch.device) -> Workload:
    """The copy of one large float32 buffer to another: bytes read and bytes written. There is but one way to do it."""
    size = Size(1, COPIED[device.type], 1)
    source, target = (torch.zeros(size, device=device) for _ in range(2))

    def copy(_: int) -> Tensor:
        return target.copy_(source)

    return Workload("copy", size, torch.float32, 2 * 4 * source.numel(), 1, copy, copy)


def proposing(size: Size, dtype: torch.dtype, device: torch.device, swept: int) -> Workload:
    """A stochastic step of every row, from its own parent to a child of its own; `swept` as in `SWEPT`."""
    rows, token, channel = size
    parent = torch.arange(rows)
    coefficients = torch.tensor(STEP).repeat(rows, 1)
    moved = propose_bytes(parent, parent + rows, coefficients, token * channel, dtype)
    sets = math.ceil(swept / moved)
    parents = (2 * rows * torch.arange(sets)[:, None] + parent).to(device)
    children, coefficients = parents + rows, coefficients.to(device)
    keys = torch.arange(sets * rows, device=device).view(sets, rows)
    x_pool, u_pool = (torch.randn(2 * rows * sets, token, channel, device=device) for _ in range(2))
    u_pool = u_pool.to(dtype)

    def fused(i: int) -> Tensor:
        return kernels.propose(x_pool, u_pool, parents[i], children[i], coefficients, keys[i], keys[i], dtype)

    def unfused(i: int) -> Tensor:
        return unfused_propose(x_pool, u_pool, parents[i], children[i], coefficients, dtype)

    return Workload("propose", size, dtype, moved, sets, fused, unfused)


def finishing(size: Size, dtype: torch.dtype, device: torch.device, swept: int) -> Workload:
    """The posterior mean of every row, unpacked to square latents; `swept` as in `SWEPT`."""
    rows, token, channel = size
    slot, (_, y, x) = torch.arange(rows), PATCH
    shape = (y * math.isqrt(token), x * math.isqrt(token), y, x)
    latent = channel // (y * x)
    affine = Layout(PATCH, (SCALING,) * latent, (SHIFT,) * latent).affine(device)
    moved = finish_bytes(slot, token * channel, dtype)
    sets = math.ceil(swept / moved)
    slots = (rows * torch.arange(sets)[:, None] + slot).to(device)
    coefficients = torch.tensor(MEAN, device=device).repeat(rows, 1)
    x_pool, u_pool = (torch.randn(rows * sets, token, channel, device=device) for _ in range(2))
    u_pool = u_pool.to(dtype)
    u = u_pool.clone().view(sets, *size)

    def fused(i: int) -> Tensor:
        return kernels.finish(u[i], x_pool, u_pool, slots[i], coefficients, *shape, *affine, dtype)

    def unfused(i: int) -> Tensor:
        return unfused_finish(u[i], x_pool, u_pool, slots[i], coefficients, *shape, *affine, dtype)

    return Workload("finish", size, dtype, moved, sets, fused, unfused)


def drawing(size: Size, dtype: torch.dtype, device: torch.device, swept: int) -> Workload:
    """Noise of every row, which is float32 whatever `dtype` is; `swept` as in `SWEPT`."""
    rows, token, channel = size
    moved = noise_bytes(rows, token * channel)
    sets = math.ceil(swept / moved)
    keys = torch.arange(sets * rows, device=device).view(sets, rows)

    def fused(i: int) -> Tensor:
        return kernels.noise(keys[i], keys[i], token, channel)

    def unfused(i: int) -> Tensor:
        return torch.randn(rows, token, channel, device=device)

    return Workload("noise", size, torch.float32, moved, sets, fused, unfused)


def propose_bytes(
    parent: Int64[Tensor, " row"],
    child: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 4"],
    elements: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that `rollflow.kernels.propose` must move for rows of `elements` elements, u and input of `dtype`.

    It reads the parent's x where a is not 0 and its u where b is not 0, writes the child's x unless the row is padding,
    and writes every row of the model's input. The row's indices and coefficients, 48 bytes, are not counted.
    """
    related = (child >= 0) & (parent >= 0)
    x, u = (int((related & (coefficients[:, term] != 0)).sum()) for term in (0, 1))
    written = int((child >= 0).sum())
    return elements * (4 * (x + written) + dtype.itemsize * (u + len(parent)))


def finish_bytes(slot: Int64[Tensor, " row"], elements: int, dtype: torch.dtype) -> int:
    """Bytes that `rollflow.kernels.finish` must move for rows of `elements` elements, all but x of `dtype`.

    It reads u and x and writes the pool's u unless the row is padding, and writes every row of the latents. The row's
    slot and coefficients, 16 bytes, are not counted, nor are scaling and shift, which all rows share.
    """
    live = int((slot >= 0).sum())
    return elements * (live * (2 * dtype.itemsize + 4) + len(slot) * dtype.itemsize)


def _moved(kernel: str, size: Size, dtype: torch.dtype) -> int:
    """Bytes that a kernel must move where every row has a parent and a child."""
    rows, elements = torch.arange(size.rows), size.token * size.channel
    if kernel == "propose":
        return propose_bytes(rows, rows, torch.tensor(STEP).repeat(size.rows, 1), elements, dtype)
    return finish_bytes(rows, elements, dtype) if kernel == "finish" else noise_bytes(size.rows, elements)


def noise_bytes(rows: int, elements: int) -> int:
    """Bytes that `rollflow.kernels.noise` must write for rows of `elements` elements; it reads none that count."""
    return 4 * rows * elements


def unfused_propose(
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    parent: Int64[Tensor, " row"],
    child: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 4"],
    dtype: torch.dtype,
    draw: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Float[Tensor, "row token channel"]:
    """What `rollflow.kernels.propose` does, an eager operation at a time, with the noise of `draw(like)`.

    Every row must have a parent and a child, and all memory that it reads must be finite.
    """
    a, b, k, inverse_scale = coefficients[:, :, None, None].unbind(1)
    x, u = x_pool[parent], u_pool[parent]
    state = a * x + b * u + k * draw(x)
    x_pool[child] = state
    return (state * inverse_scale).to(dtype)


def unfused_finish(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    height: int,
    width: int,
    patch_y: int,
    patch_x: int,
    inverse_scaling: Float32[Tensor, " latent"],
    shift: Float32[Tensor, " latent"],
    dtype: torch.dtype,
) -> Float[Tensor, "row latent height width"]:
    """What `rollflow.kernels.finish` does, an eager operation at a time. Every row must have a slot."""
    p, q = coefficients[:, :, None, None].unbind(1)
    u_pool[slot] = u
    x0_hat = p * x_pool[slot] + q * u
    patches = x0_hat.view(len(u), height // patch_y, width // patch_x, -1, patch_y, patch_x)
    latents = patches.permute(0, 3, 1, 4, 2, 5).reshape(len(u), -1, height, width)
    return (latents * inverse_scaling[:, None, None] + shift[:, None, None]).to(dtype)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="memory bandwidth of the kernels; size: rows x token x channel")
    for column in ("kernel", "size", "dtype", "µs", "GB/s", "of a copy", "over torch"):
        table.add_column(column, justify="left" if column in ("kernel", "dtype") else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["kernel"],
            f"{row['rows']} x {row['token']} x {row['channel']}",
            row["dtype"],
            f"{1e6 * row['seconds']:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{100 * row['of_copy']:.0f} %",
            f"{row['over_torch']:.2f}x",
        )
    return table
