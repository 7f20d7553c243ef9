"""Measures what batches cost, before any request runs: which batch sizes pay, and on a CPU how its cores are best used.

Two things bound the batch sizes: time, where larger ones are no faster a row, and on a GPU memory, see
`rollflow.device.memory`.

Measurements are kept for the process: by the model's signature, image size, dtype, device, threads and kind of decoder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollflow.device.memory import Memory, Room
from rollflow.device.workers import Lanes
from rollflow.errors import ModelError
from rollflow.models import FlowModel, Geometry, recompute
from rollflow.models.acceleration import eagerly
from rollflow.models.layout import Layout
from rollflow.models.recompute import Saved

# A batch must be this much faster a row than one of half its rows; three in a row that are not end the search, or one
# that takes `LONG`: FLUX's would take minutes to time.
GAIN = 1.03
LONG = 0.5  # seconds
SHORT = 0.1  # seconds of a batch up to which sizes are timed and kept in any case: a timing may mislead
ROUNDS = 2  # in which a CPU's lanes are compared, in turns; each option's best counts
ALIKE = 0.01  # relative difference of two ways to compute the same, in 16 bits
TIMED = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # sizes that are timed; what lies between is interpolated
PROBE = 16  # rows of the batch by which a CPU's lanes, and a dtype, are chosen
DTYPE_SECONDS = 5.0  # of a row, above which the dtypes are not compared; of all runs of one, what they are bounded by
# Yields work for a lane, is sent its seconds, or None where it did not fit into the memory.
Timing = Generator[Callable[[], float | None], float | None, dict[int, float]]
_seconds_by: dict[tuple, dict[int, float]] = {}
_peaks_by: dict[tuple, dict[int, int]] = {}  # the bytes that they took
_lanes: dict[tuple, tuple[int, int]] = {}


def measured(
    model: FlowModel, geometry: Geometry, conditioning: Any, buckets: tuple[int, ...], threads: int, preview: bool,
    keep_all: bool, room: Room | None = None,
) -> Timing:  # fmt: skip
    """Seconds of forward and decode at each bucket, on a lane, up to the largest that pays and fits.

    What is compiled is measured as if it were not: `as_served` compiles for the buckets that are left.

    Args:
        model: the model.
        geometry: of the batches.
        conditioning: of any prompt.
        buckets: batch sizes, ascending.
        threads: cores of a lane.
        preview: whether the light decoder is the one that counts.
        keep_all: whether to keep buckets that are no faster a row than smaller ones.
        room: which of them fit into the memory.

    Raises:
        ModelError: not even the smallest fits.
    """
    key, room = (*_key(model), geometry, buckets, threads, preview, keep_all), room or Room()
    if key in _seconds_by:
        room.peaks.update(_peaks_by[key])  # how much is free by now is another matter
        known = _seconds_by[key]
        return {b: seconds for b, seconds in known.items() if b == min(known) or room.fits(b)}
    timed = buckets if keep_all else [b for b in buckets if b in TIMED or b == buckets[0]]
    seconds: dict[int, float] = {}
    slower = 0
    for bucket in timed:
        if not room.fits(bucket):
            break
        repetitions = 4 if bucket <= 8 and max(seconds.values(), default=0.0) <= SHORT else 2
        work = partial(_eager_seconds, model, geometry, conditioning, bucket, preview, repetitions)
        took = yield partial(room.run, bucket, work)
        if took is None:
            _check_any(seconds, bucket, geometry)
            break
        seconds[bucket] = took
        slower = 0 if bucket == best(seconds) else slower + 1
        if slower >= (1 if took > LONG else 3) and took > SHORT and not keep_all:
            break
    kept = seconds if keep_all else earning(seconds)
    found = {b: float(np.interp(b, [*seconds], [*seconds.values()])) for b in buckets if b <= max(kept)}
    if model.capabilities.compiled:  # for each size anew: none between those that were timed
        found = dict(kept)
    if model.capabilities.signature is not None and room.full is None:  # another time there may be more memory
        _seconds_by[key], _peaks_by[key] = found, dict(room.peaks)
    return found


def best(seconds: Mapping[int, float]) -> int:
    """The batch size, of ascending ones, from which on none is faster a row by `GAIN` for each doubling of its rows."""
    found = min(seconds)
    for bucket in seconds:
        if bucket / seconds[bucket] > GAIN ** math.log2(bucket / found) * found / seconds[found]:
            found = bucket
    return found


def earning(seconds: Mapping[int, float]) -> dict[int, float]:
    """The batch sizes up to the best, and to the largest of a short batch: larger ones only take longer, and memory."""
    largest = max(best(seconds), *(bucket for bucket in seconds if seconds[bucket] <= SHORT), 0)
    return {bucket: each for bucket, each in seconds.items() if bucket <= largest}


def as_served(
    buckets: Iterable[int], model: FlowModel, geometry: Geometry, conditioning: Any, preview: bool,
    replay: Callable[[int], Any] | None, room: Room,
) -> Timing:  # fmt: skip
    """The seconds of buckets, ascending, compiled, or of `replay`, which evaluates and decodes one by CUDA graphs."""
    seconds: dict[int, float] = {}
    for bucket in buckets:
        if replay is None:
            work = partial(_seconds, model, geometry, conditioning, bucket, preview, 4)
        else:
            work = partial(_shortest, model, 4, partial(replay, bucket))
        took = yield partial(room.run, bucket, work)
        if took is None:
            _check_any(seconds, bucket, geometry)
            break
        seconds[bucket] = took
    return seconds


def guided(model: FlowModel, geometry: Geometry, conditioning: Any, memory: Memory) -> tuple[Saved, int]:
    """What the forward and decode of one guided row keep for its gradient, and the bytes that they take besides.

    It runs them, and keeps nothing: it takes no more memory than a plain row. A network that computes something else
    where its blocks are to be computed again, as diffusers' Chroma loses its mask there, is taken to have no regions.
    """
    found: list[list[Tensor]] = []

    def evaluate() -> None:
        found.append([value.detach().clone() for value in _evaluated(model, geometry, conditioning)])

    memory.start()
    saved, working = recompute.saved(evaluate), memory.peak()
    with torch.no_grad():
        plain = _evaluated(model, geometry, conditioning)
    if not all(_alike(*pair) for pair in zip(found[0], plain, strict=True)):
        saved = Saved(saved.whole, saved.whole, 0)
    return saved, working


def _evaluated(model: FlowModel, geometry: Geometry, conditioning: Any) -> tuple[Tensor, Tensor]:
    """Velocity and image of one row, differentiable with respect to its state; see `rollflow.device.guided.run`."""
    one, generator = torch.ones(1, device=model.device), torch.Generator().manual_seed(0)
    x = torch.randn(1, geometry.token, geometry.channel, generator=generator).to(model.device).requires_grad_(True)
    u = model.velocity(x.to(model.dtype), one * model.capabilities.timed, [conditioning], one, geometry).float()
    latents = model.layout.decodable(x - u, geometry)
    return u, model.decode(latents.to(model.dtype) if isinstance(model.layout, Layout) else latents)


def _alike(found: Tensor, plain: Tensor) -> bool:
    """Whether two results differ by their rounding alone; without data they are taken to."""
    return found.is_meta or bool((found - plain).abs().max() <= ALIKE * plain.abs().max())


def _check_any(seconds: dict[int, float], bucket: int, geometry: Geometry) -> None:
    if not seconds:
        rest = "make the engine with smaller buckets" if bucket > 1 else "ask for a smaller size, or free some of it"
        raise ModelError(f"a batch of {bucket} rows of {geometry} does not fit into the device's memory: {rest}")


def best_lanes(
    model: FlowModel, geometry: Geometry, conditioning: Any, preview: bool, check: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """How many lanes and threads a lane compute the most rows a second on this CPU.

    It waits for the lanes, and takes the cores of the thread that calls it.

    Args:
        model: the model.
        geometry: of the batches.
        conditioning: of any prompt.
        preview: whether the light decoder is the one that counts.
        check: called before each timing; what it raises ends the comparison.
    """
    cores = torch.get_num_threads()
    key = (*_key(model), geometry, cores, preview)
    if key not in _lanes:
        options = [Lanes(model.device, count, cores // count) for count in (1, 2, 4, 8) if count <= cores]
        work = (model, geometry, conditioning, PROBE, preview)
        rates = [0.0] * len(options)
        try:
            for _ in range(1 + ROUNDS):
                for i, lanes in enumerate(options):
                    check()
                    start = time.perf_counter()
                    for running in [lanes.run(_eager_seconds, *work) for _ in range(lanes.count)]:
                        running.result()
                    rates[i] = max(rates[i], lanes.count / (time.perf_counter() - start))
        finally:
            for lanes in options:
                lanes.close()
        chosen = options[rates.index(max(rates))]
        if model.capabilities.signature is None:
            return chosen.count, chosen.threads
        _lanes[key] = chosen.count, chosen.threads
    return _lanes[key]


def best_dtype(
    make: Callable[[torch.dtype], FlowModel], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> torch.dtype:
    """The faster of float32 and bfloat16 for forward and decode.

    On a GPU whose matrix units multiply bfloat16 (compute capability 8.0 and later) it is bfloat16, unmeasured: float32
    takes several times as long, and twice the memory. Elsewhere both are timed, unless a row takes longer than
    `DTYPE_SECONDS`: then it is the default of the device. A batch of `PROBE` rows is timed where all its runs together
    are expected to take no longer than that, else one row.
    """
    default, other = torch.float32, torch.bfloat16
    if device.type == "cuda":
        default, other = other, default
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return default
    seconds: dict[torch.dtype, float] = {}
    rows, runs = 1, 4
    for dtype in (default, other):
        model = make(dtype)
        lanes = Lanes(model.device, 1, 1)
        timed = (_seconds, model, model.geometry(None, None), model.encode([""])[0])
        try:
            if not seconds:
                row = lanes.run(*timed, 1, False, 1, clock).result()
                if row > DTYPE_SECONDS:
                    return default
                rows = PROBE if PROBE * runs * row <= DTYPE_SECONDS else 1
            seconds[dtype] = lanes.run(*timed, rows, False, runs, clock).result()
        finally:
            lanes.close()
    return min(seconds, key=lambda dtype: seconds[dtype])


def _key(model: FlowModel) -> tuple:
    return (model.capabilities.signature, model.dtype, str(model.device))


@torch.no_grad()
def _seconds(
    model: FlowModel, geometry: Geometry, conditioning: Any, bucket: int, preview: bool,
    repetitions: int = 1, clock: Callable[[], float] = time.perf_counter,
) -> float:  # fmt: skip
    """The shortest of a few runs of forward and decode; the first of all also loads what loads lazily."""
    x = torch.randn(bucket, geometry.token, geometry.channel, device=model.device).to(model.dtype)
    latents = torch.zeros(bucket, *model.layout.shape(geometry), device=model.device, dtype=model.dtype)
    tau = torch.full((bucket,), model.capabilities.timed, device=model.device)
    guidance = torch.zeros(bucket, device=model.device)
    decode = model.preview if preview else model.decode  # type: ignore[attr-defined]

    def run() -> None:
        model.velocity(x, tau, [conditioning] * bucket, guidance, geometry)
        decode(latents)

    return _shortest(model, repetitions, run, clock)


def _shortest(
    model: FlowModel, repetitions: int, run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> float:
    times: list[float] = []
    for _ in range(repetitions):
        _wait(model)
        start = clock()
        run()
        _wait(model)
        times.append(clock() - start)
    return min(times)


def _eager_seconds(*of: Any) -> float:
    with eagerly():
        return _seconds(*of)


def _wait(model: FlowModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
