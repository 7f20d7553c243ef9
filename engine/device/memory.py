"""How many rows of a batch fit into a device's memory, before one is tried.

Of plain rows that is foretold from what smaller batches took, of guided ones from what one row keeps for its gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from rollflow.models import Geometry
from rollflow.models.recompute import Saved

SHARE = 0.9  # of the free memory that is counted on: allocators lose some to gaps, and kernels have workspaces


@runtime_checkable
class Memory(Protocol):
    """What a device says of its memory, in bytes."""

    def start(self) -> None:
        """Follows what is in use from now on."""
        ...

    def peak(self) -> int:
        """The most that was in use at a time since `start`, beyond what was in use then."""
        ...

    def free(self) -> int:
        """What new tensors can still have."""
        ...

    def release(self) -> None:
        """Gives back what is kept for later use."""
        ...


class CudaMemory:
    """That of a GPU, as torch's caching allocator sees it.

    `start` resets the peak that `torch.cuda.max_memory_allocated` tells. What others of the process take meanwhile,
    such as rewards, counts as taken by the batch.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device):
        self._device, self._before = device, 0

    def start(self) -> None:
        """See `Memory.start`."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """See `Memory.peak`."""
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def free(self) -> int:
        """What the device has free, and what the allocator holds and does not use."""
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + unused

    def release(self) -> None:
        """See `Memory.release`."""
        torch.cuda.empty_cache()


class Room:
    """Which batches of one image size fit.

    A batch that was not run yet is taken to need what lies on the line through the two largest that were; after the
    first, as much a row. It fits where as many such batches as run at a time take at most `SHARE` of what is free.

    Args:
        memory: of the device; None where nothing is known of it, and every batch is tried.
        batches: how many are on the device at a time.
        held: bytes that count as free and are not, such as those of CUDA graphs.

    Attributes:
        peaks: bytes that were in use at most by batches that were run, by their rows.
        full: the rows of the smallest batch that does not fit, as was foretold or seen; None while all do.
    """

    def __init__(self, memory: Memory | None = None, batches: int = 1, held: Callable[[], int] = lambda: 0):
        self._memory, self._batches, self._held = memory, batches, held
        self.peaks: dict[int, int] = {}
        self.full: int | None = None

    def needed(self, rows: int) -> float:
        """Bytes that a batch of this many rows is expected to need; 0 where none was run yet."""
        if not self.peaks or rows in self.peaks:
            return self.peaks.get(rows, 0)
        *smaller, last = sorted(self.peaks)
        if not smaller:
            return self.peaks[last] * rows / last
        slope = (self.peaks[last] - self.peaks[smaller[-1]]) / (last - smaller[-1])
        return self.peaks[last] + max(0.0, slope) * (rows - last)

    def fits(self, rows: int) -> bool:
        """Whether a batch of this many rows is expected to fit."""
        if self._memory is None or not self.peaks:
            return True
        fits = self._batches * self.needed(rows) <= SHARE * (self._memory.free() - self._held())
        if not fits:
            self._fill(rows)
        return fits

    def most(self, each: float) -> int:
        """How many rows of so many bytes fit, by the same share."""
        assert self._memory is not None, "asked only of a device that says what it has"
        return max(0, int(SHARE * (self._memory.free() - self._held()) // (self._batches * max(each, 1))))

    def run(self, rows: int, work: Callable[[], float]) -> float | None:
        """What `work` gives, a batch of this many rows on a lane; None if it did not fit."""
        found = None
        try:
            if self._memory is not None:
                if not self.peaks:
                    work()  # what libraries take at their first call stays, and is no part of a batch
                self._memory.start()
            found = work()
        except torch.OutOfMemoryError:
            self._fill(rows)
        if self._memory is not None:  # out of the handler, whose error holds the batch's tensors
            if found is None:
                self._memory.release()
            else:
                self.peaks.setdefault(rows, self._memory.peak())
        return found

    def _fill(self, rows: int) -> None:
        self.full = rows if self.full is None else min(rows, self.full)


class Guidance(NamedTuple):
    """How guided rows of an image size run.

    Attributes:
        sizes: of their batches, ascending.
        recomputed: whether blocks are computed again in the backward pass, which adds about a forward to it.
    """

    sizes: tuple[int, ...]
    recomputed: bool


def guidance(saved: Saved, working: int, sizes: Sequence[int], room: Room) -> Guidance:
    """The batch sizes of guided rows: those for which everything that one row saves fits as often.

    Where not even the smallest does, blocks are computed again; where that does not suffice, a batch is as large as
    does, and of at least one row. What rewards keep for their gradients is not known and has what `SHARE` leaves.

    Args:
        saved: what one row keeps.
        working: bytes that a row's forward and decode take besides.
        sizes: of plain batches, ascending.
        room: what fits.
    """
    again = saved.kept + saved.region
    most = 0
    for each, recomputed in ((saved.whole, False), (again, True)):
        most = max(most, room.most(each + working))
        if fitting := tuple(size for size in sizes if size <= most):
            return Guidance(fitting, recomputed)
    return Guidance((max(1, most),), again < saved.whole)


def warn_of_recomputing(geometry: Geometry) -> None:
    """One guided row did not fit as it was foretold."""
    with suppress(RuntimeWarning):  # where warnings are errors, this thread is nobody's to raise it to
        warnings.warn(
            f"a guided row of {geometry} did not fit into the device's memory: from now on, blocks of the networks are "
            "computed again in the backward pass of guided rows of this size, about one more forward each",
            RuntimeWarning,
            stacklevel=2,
        )
