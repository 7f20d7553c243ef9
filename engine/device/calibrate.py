"""Measures what batches cost, before any request runs: which batch sizes pay, and on a CPU how its cores are best used.

Two things bound the batch sizes: time, where larger ones are no faster a row, and on a GPU memory, see
`rollflow.device.memory`.

Measurements are kept for the process: by the model's signature, image size, dtype, device, threads and kind of decoder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollflow.device.memory import Memory, Room
from rollflow.device.workers import Lanes
from rollflow.errors import ModelError
from rollflow.models import FlowModel, Geometry, recompute
from rollflow.models.layout import Layout
from rollflow.models.recompute import Saved

GAIN = 1.03  # a larger batch must be this much faster a row than all smaller ones, or three in a row end the search
SHORT = 0.1  # seconds of a batch up to which sizes are timed and kept in any case: a timing may mislead
ROUNDS = 2  # in which a CPU's lanes are compared, in turns; each option's best counts
TIMED = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # sizes that are timed; what lies between is interpolated
ALIKE = 0.01  # relative difference of two ways to compute the same, in 16 bits
PROBE = 16  # rows of the batch by which a CPU's lanes are chosen
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
    best = slower = 0
    for bucket in timed:
        if not room.fits(bucket):
            break
        repetitions = 4 if bucket <= 8 else 2
        work = partial(_seconds, model, geometry, conditioning, bucket, preview, repetitions)
        took = yield partial(room.run, bucket, work)
        if took is None:
            _check_any(seconds, bucket, geometry)
            break
        seconds[bucket] = took
        if not best or bucket / seconds[bucket] > GAIN * best / seconds[best]:
            best, slower = bucket, 0
        else:
            slower += 1
        if slower == 3 and seconds[bucket] > SHORT and not keep_all:
            break
    largest = max([best, *(bucket for bucket in seconds if keep_all or seconds[bucket] <= SHORT)])
    found = {b: float(np.interp(b, [*seconds], [*seconds.values()])) for b in buckets if b <= largest}
    if model.capabilities.signature is not None and room.full is None:  # another time there may be more memory
        _seconds_by[key], _peaks_by[key] = found, dict(room.peaks)
    return found


def replayed(
    buckets: Iterable[int], model: FlowModel, geometry: Geometry, conditioning: Any, preview: bool,
    replay: Callable[[int], Any], room: Room,
) -> Timing:  # fmt: skip
    """The seconds of buckets, ascending, where the forward is a replay of the bucket's CUDA graph."""
    seconds: dict[int, float] = {}
    for bucket in buckets:
        work = partial(_seconds, model, geometry, conditioning, bucket, preview, 4, partial(replay, bucket))
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
                    for running in [lanes.run(_seconds, *work) for _ in range(lanes.count)]:
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


def best_dtype(make: Callable[[torch.dtype], FlowModel]) -> torch.dtype:
    """The faster of float32 and bfloat16 for a batch's forward and decode."""
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make(dtype)
        lanes = Lanes(model.device, 1, 1)
        work = (model, model.geometry(None, None), model.encode([""])[0], PROBE, False)
        seconds[dtype] = lanes.run(_seconds, *work, 4).result()
        lanes.close()
    return min(seconds, key=lambda dtype: seconds[dtype])


def _key(model: FlowModel) -> tuple:
    return (model.capabilities.signature, model.dtype, str(model.device))


@torch.no_grad()
def _seconds(
    model: FlowModel, geometry: Geometry, conditioning: Any, bucket: int, preview: bool,
    repetitions: int = 1, forward: Callable[[], Any] | None = None,
) -> float:  # fmt: skip
    """The shortest of a few runs of forward and decode; the first of all also loads what loads lazily."""
    x = torch.randn(bucket, geometry.token, geometry.channel, device=model.device).to(model.dtype)
    latents = torch.zeros(bucket, *model.layout.shape(geometry), device=model.device, dtype=model.dtype)
    tau = torch.full((bucket,), model.capabilities.timed, device=model.device)
    guidance = torch.zeros(bucket, device=model.device)
    decode = model.preview if preview else model.decode  # type: ignore[attr-defined]
    times: list[float] = []
    for _ in range(repetitions):
        _wait(model)
        start = time.perf_counter()
        if forward is None:
            model.velocity(x, tau, [conditioning] * bucket, guidance, geometry)
        else:
            forward()
        decode(latents)
        _wait(model)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(model: FlowModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
