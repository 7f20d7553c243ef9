"""What an engine is made with: batch sizes, slots, lanes and threads, their defaults and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rollflow.errors import RequestError
from rollflow.methods.budget import whole
from rollflow.models import Geometry

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # each of which is measured, and on a GPU has a graph of its own
CPU_BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
REPRODUCIBLE_BUCKET = 16
MOST_LANES = 4  # on a CPU, where nothing was measured
POOL_SLOTS = 4096
POOL_BYTES = 2**30


def batch_sizes(buckets: Any, reproducible: bool, on_cpu: bool) -> tuple[int, ...]:
    """The batch sizes of a forward, ascending: those given, or what is usual on this kind of device.

    Raises:
        RequestError: they are no ascending whole numbers, or a reproducible engine is to have several.
    """
    if buckets is None:
        return (REPRODUCIBLE_BUCKET,) if reproducible else CPU_BUCKETS if on_cpu else BUCKETS
    if not isinstance(buckets, Iterable) or isinstance(buckets, str):
        raise RequestError(f"buckets={buckets!r}: they must be a list of ascending batch sizes of at least 1")
    sizes = [whole("each of the buckets", bucket, 1) for bucket in buckets]
    if not sizes or sizes != sorted(set(sizes)):
        raise RequestError(f"buckets={sizes}: they must be ascending batch sizes of at least 1")
    if reproducible and (len(sizes) > 1 or sizes[0] % 8):
        raise RequestError(f"buckets={sizes}: a reproducible engine has a single batch size, a multiple of 8")
    return tuple(sizes)


def lanes_and_threads(device: torch.device, lanes: int | None, threads: int | None) -> tuple[int, int]:
    """Lanes and threads of each: on a CPU all cores, on a GPU two cohorts that alternate."""
    if device.type != "cpu":
        return whole("lanes", 2 if lanes is None else lanes, 1), 1
    cores = torch.get_num_threads()
    if lanes is None:
        lanes = min(MOST_LANES, cores if threads is None else max(1, cores // whole("threads", threads, 1)))
    lanes = whole("lanes", lanes, 1)
    return lanes, max(1, cores // lanes) if threads is None else whole("threads", threads, 1)


def slots_of(slots: int | None, geometry: Geometry) -> int:
    """How many particles of a geometry can live at once: as asked, or what fits into the bound of their memory."""
    each = geometry.token * geometry.channel * 8
    return slots or max(64, min(POOL_SLOTS, POOL_BYTES // each))


def keep_pages() -> None:
    """Makes glibc keep freed activations instead of giving their pages back at every batch.

    Freeing a block of nearly 32 MiB raises malloc's thresholds for good: smaller blocks then come from the heap, which
    is trimmed above 64 MiB only (mallopt(3), M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
