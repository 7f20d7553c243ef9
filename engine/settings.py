"""What an engine is made with: batch sizes, slots, lanes and threads, their defaults and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch

from rollflow import checks
from rollflow.errors import RequestError, shown
from rollflow.models import Geometry, Traits, known
from rollflow.values import whole

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # each of which is measured, and on a GPU has a graph of its own
CPU_BUCKETS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
REPRODUCIBLE_BUCKET = 16
MOST_LANES = 4  # on a CPU, where nothing was measured
MOST_ROWS, MOST_SIZES = 4096, 256  # of a batch; of batch sizes
MOST_THREADS = 256  # lanes, and cores of a lane
POOL_SLOTS = 4096
POOL_BYTES = 2**30
KEPT_BYTES = 2**32  # of particles of requests with a cache, with what is kept of their evaluations


def batch_sizes(buckets: Any, reproducible: bool, on_cpu: bool) -> tuple[int, ...]:
    """The batch sizes of a forward, ascending: those given, or what is usual on this kind of device.

    Raises:
        RequestError: they are no ascending whole numbers, or a reproducible engine is to have several.
    """
    if buckets is None:
        return (REPRODUCIBLE_BUCKET,) if reproducible else CPU_BUCKETS if on_cpu else BUCKETS
    if not isinstance(buckets, Iterable) or isinstance(buckets, str | bytes | bytearray | Mapping):
        raise RequestError(f"buckets={shown(buckets)}: they must be a list of ascending batch sizes of at least 1")
    given = checks.listed(islice(buckets, MOST_SIZES + 1), "buckets")
    sizes = [whole("each of the buckets", bucket, 1, MOST_ROWS) for bucket in given]
    if not sizes or len(sizes) > MOST_SIZES or sizes != sorted(set(sizes)):
        raise RequestError(
            f"buckets={shown(sizes)}: they must be ascending batch sizes of at least 1, at most {MOST_SIZES} of them"
        )
    if reproducible and (len(sizes) > 1 or sizes[0] % 8):
        raise RequestError(f"buckets={shown(sizes)}: a reproducible engine has a single batch size, a multiple of 8")
    return tuple(sizes)


def lanes_and_threads(device: torch.device, lanes: int | None, threads: int | None) -> tuple[int, int]:
    """Lanes and threads of each: on a CPU all cores, on a GPU two cohorts that alternate."""
    if device.type != "cpu":
        return whole("lanes", 2 if lanes is None else lanes, 1, MOST_THREADS), 1
    cores = torch.get_num_threads()
    threads = None if threads is None else whole("threads", threads, 1, MOST_THREADS)
    if lanes is None:
        lanes = min(MOST_LANES, cores if threads is None else max(1, cores // threads))
    lanes = whole("lanes", lanes, 1, MOST_THREADS)
    return lanes, max(1, cores // lanes) if threads is None else threads


def checked_traits(traits: Traits | None) -> Traits:
    """What searches should know of the model; by default what holds for any.

    Raises:
        RequestError: they are none, or their numbers are out of range.
    """
    if traits is None:
        return Traits()
    if not isinstance(traits, Traits):
        raise RequestError(f"traits={shown(traits)}: they must be rollflow.models.Traits")
    return replace(known.checked(asdict(traits)), steps=whole("traits.steps", traits.steps, 1, checks.MOST_STEPS))


def bytes_of_slot(geometry: Geometry, velocity: torch.dtype) -> int:
    """What a particle's state takes, in float32, with its velocity in a dtype; without what is kept for a cache."""
    return geometry.token * geometry.channel * (4 + velocity.itemsize)


def slots_of(
    slots: int | None,
    geometry: Geometry,
    velocity: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> int:
    """How many particles of a geometry can live at once: as asked, or what fits into the bound of their memory.

    Args:
        slots: what was asked.
        geometry: of the particles.
        velocity: the dtype that their velocities are kept in.
        dtype: the model's, of what is kept for a cache.
    """
    each = bytes_of_slot(geometry, velocity)
    most = POOL_BYTES // each
    if geometry.kept:
        most = min(most, KEPT_BYTES // (each + geometry.token * geometry.kept * dtype.itemsize))
    return slots or max(64, min(POOL_SLOTS, most))


def keep_pages() -> None:
    """Makes glibc keep freed activations instead of giving their pages back at every batch.

    Freeing a block of nearly 32 MiB raises malloc's thresholds for good: smaller blocks then come from the heap, which
    is trimmed above 64 MiB only (mallopt(3), M_MMAP_THRESHOLD). Elsewhere it does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def on_device(device: Any) -> torch.device:
    """The device of a name; by default CUDA where there is one.

    Raises:
        RequestError: it is neither a CPU nor a CUDA device that torch finds.
    """
    if not (device is None or isinstance(device, str | torch.device)):
        raise RequestError(f"device {shown(device)}: choose cpu, cuda or cuda:N")
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"device {shown(device)}: choose cpu, cuda or cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device {str(found)!r}: choose cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device {str(found)!r}: torch finds no CUDA device here; choose cpu")
    return found


def floats(dtype: Any) -> Any:
    """A dtype of the networks as it was given: None, "auto" or floats of torch's.

    Raises:
        RequestError: it is something else.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return dtype
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise RequestError(f"dtype={shown(dtype)}: it must be a torch.dtype of floats, such as torch.bfloat16, or 'auto'")
