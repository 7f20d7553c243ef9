"""One CUDA graph a bucket: propose, the transformer's forward and finish of a batch, in one launch; or a decoder's.

An eager step launches each of its kernels from Python, hundreds for a small transformer and thousands for a large one;
where the kernels are short, the device waits for the launches. A graph holds them all. It also holds the addresses of
its inputs and its output, so inputs are copied to static buffers, and the output is copied away before the next replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollflow.errors import ModelError

_CAPTURING = Lock()
WARM_UPS = 3  # runs before a capture, as many as torch's own graphed callables make


class Captured(NamedTuple):
    """A function without arguments that the device holds.

    Attributes:
        replay: runs it again, on what its inputs' memory holds by then; the result is written to `output`.
        output: the result of the last replay; undefined before the first.
        pool: handle of the memory pool that holds its intermediate results and `output`.
        memory: bytes of device memory that this added.
    """

    replay: Callable[[], None]
    output: Tensor
    pool: Any
    memory: int


# From a function, and the handle of the memory pool to share (None: a new one), to what was captured.
Capture = Callable[[Callable[[], Tensor], Any], Captured]


class Graphs:
    """A function of batches, such as a step, captured once a bucket.

    The graphs share one pool of memory, and each has one set of buffers: `record` and `run` belong to one thread, and
    `run` to one stream, on which copies and replays are in order.

    Args:
        step: from `(integers, floats, *conditioning)` on the device (see `rollflow.device.runner.Tables`) to a new
            tensor. What else it uses (model, particle pool, geometry) is part of the capture and must stay where it
            is. It must not synchronise with the host nor branch on values, and writes only the slots that `integers`
            name.
        capture: captures a function.
        names: of the first inputs, for messages.
        rows: which dimension of the first input counts the rows.

    Attributes:
        memory: bytes of device memory by bucket: static inputs, and what the capture added. The captures share memory,
            so all but the first add little.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        capture: Capture | None = None,
        names: tuple[str, ...] = ("integers", "floats"),
        rows: int = 1,
    ):
        self.step, self._capture, self._names, self._rows = step, capture or cuda_capture, names, rows
        self.memory: dict[int, int] = {}
        self._graphs: dict[int, tuple[tuple[Tensor, ...], Captured]] = {}  # by bucket: static inputs, capture
        self._pool: Any = None
        self._warned = False

    def record(self, buckets: Iterable[int], make: Callable[[int], tuple[Tensor, ...]]) -> None:
        """Captures the step of every bucket. Never while serving: it waits for the device and empties torch's cache.

        The largest comes first: the memory of its intermediate results then holds those of all others.

        Args:
            buckets: batch sizes.
            make: the inputs of a batch of this size, of padding alone (slots of -1). The step really runs on them
                before the capture, and padding is what makes it leave every particle as it is.

        Raises:
            ModelError: the step cannot be captured. torch's allocator may go on believing that a capture is under way,
                and hold back memory that several streams used: go on in a new process.
        """
        for bucket in sorted(set(buckets), reverse=True):
            with torch.no_grad():  # static: contiguous, of their own, and outside the pool that replays write to
                inputs = tuple(value.clone(memory_format=torch.contiguous_format) for value in make(bucket))
            try:
                captured = self._capture(partial(self._eager, *inputs), self._pool)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise ModelError(
                    f"the step of {bucket} rows cannot be captured as a CUDA graph ({reason}): make the engine with "
                    "graphs=False, or, where memory ran out, with smaller buckets or fewer slots"
                ) from error
            self._pool = captured.pool
            self._graphs[bucket] = inputs, captured
            self.memory[bucket] = captured.memory + sum(value.nbytes for value in inputs)

    @property
    def total(self) -> int:
        """Bytes of device memory of all buckets; of any thread."""
        return sum([*self.memory.values()])

    def __contains__(self, bucket: object) -> bool:
        return bucket in self._graphs

    @torch.no_grad()
    def run(self, *given: Tensor) -> Tensor:
        """`step` of these inputs, by a replay on the current stream; the result is the caller's to keep.

        Inputs that no graph was captured for run eagerly, with a warning at the first.
        """
        bucket = given[0].shape[self._rows]
        if bucket not in self._graphs:
            return self._fall_back(f"bucket: {sorted(self._graphs)} were captured, {bucket} was given", given)
        static, captured = self._graphs[bucket]
        if (difference := _difference(static, given, self._names)) is not None:
            return self._fall_back(f"{difference} (bucket {bucket})", given)
        for buffer, value in zip(static, given, strict=True):
            buffer.copy_(value, non_blocking=True)
        captured.replay()
        return captured.output.clone()  # another stream may still decode it when the next replay writes

    def _eager(self, *inputs: Tensor) -> Tensor:
        """What is captured, and what runs where no graph fits: one function, so that both compute the same."""
        with torch.no_grad(), torch.autocast(inputs[0].device.type, enabled=False):
            return self.step(*inputs)

    def _fall_back(self, difference: str, given: tuple[Tensor, ...]) -> Tensor:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"no CUDA graph fits this batch, {difference}: its kernels are launched one by one, which is slower "
                "where they are short. This warning comes once",
                RuntimeWarning,
                stacklevel=4,  # the caller of `run`, whose decorator is a frame of its own
            )
        return self._eager(*given)


def cuda_capture(function: Callable[[], Tensor], pool: Any) -> Captured:
    """A CUDA graph of `function`, which first runs a few times.

    Those runs compile Triton kernels and compiled regions, load libraries and make the tensors that are made at first
    use: a capture either forbids that or would own it. Works in any thread, on that thread's device, and leaves other
    threads free to use it. Hooks of modules and NVTX ranges run here and not at a replay: mark around the replay.

    Raises:
        RuntimeError: something that the function does cannot be captured, or memory runs out.
    """
    with _CAPTURING:  # on streams that all engines of a device share
        return _captured(function, pool)


def _captured(function: Callable[[], Tensor], pool: Any) -> Captured:
    preparing, capturing = _streams(torch.cuda.current_device())
    preparing.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(preparing):  # around the capture too: one that fails would leave the thread on its stream
        for _ in range(WARM_UPS):
            function()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what those runs held is not the graph's
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=capturing, capture_error_mode="thread_local"):
            output = function()
        added = torch.cuda.memory_reserved() - before
    torch.cuda.synchronize()
    return Captured(graph.replay, output, graph.pool(), added)


@cache
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """A device's streams for the runs before captures, and for captures.

    Two, because cuBLAS has a workspace a stream: that of captures then lies in a pool of graphs, where it stays. And
    always the same two, because torch hands out 32 in turn: more would come to be those that others run on.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


def _difference(captured: tuple[Tensor, ...], given: tuple[Tensor, ...], names: tuple[str, ...]) -> str | None:
    """Which field of the signature differs, if one does; strides are no part of it, as inputs are copied."""
    if len(captured) != len(given):
        return f"number of input tensors: {len(captured)} were captured, {len(given)} were given"
    for place, (ours, theirs) in enumerate(zip(captured, given, strict=True)):
        for field in ("shape", "dtype", "device"):
            if (was := getattr(ours, field)) != (now := getattr(theirs, field)):
                name = names[place] if place < len(names) else f"conditioning {place - len(names)}"
                return f"{field} of {name}: {was} was captured, {now} was given"
    return None
