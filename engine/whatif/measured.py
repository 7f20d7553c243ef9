"""What a recording says that things cost alone: batches by size, calls of rewards, the loop's own work.

What was recorded was slowed down by what ran beside it. The share of the processor that everything had is known from
the recording itself, so that its seconds can be turned into those that it takes alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import siegelslopes

from rollflow.errors import RequestError
from rollflow.models import Geometry
from rollflow.profile.accounts import is_chore
from rollflow.profile.recording import Recording
from rollflow.profile.records import WORK

FULL, LIGHT = "full", "preview"
LAUNCHED = ("propose", "forward", "finish", "decode")
COMPUTES = 0.3  # a reward whose thread uses a core for less of its time waits for a server; others, for a core


@dataclass(frozen=True)
class Curve:
    """Seconds by size, from the sizes that were measured; others lie between, or beyond as `usual` has it.

    Attributes:
        known: seconds by size, ascending.
        usual: what is assumed of the form beyond them: seconds by size.
    """

    known: Mapping[int, float]
    usual: Mapping[int, float]

    def __call__(self, size: int) -> float:
        """Seconds of a size."""
        if not self.known:
            return 0.0
        if (found := self.known.get(size)) is not None:
            return found
        sizes = [*self.known]
        place = bisect_left(sizes, size)
        if 0 < place < len(sizes):
            low, high = sizes[place - 1], sizes[place]
            part = (size - low) / (high - low)
            return (1 - part) * self.known[low] + part * self.known[high]
        near = sizes[0] if place == 0 else sizes[-1]
        return self.known[near] * self._usual(size) / self._usual(near)

    def _usual(self, size: int) -> float:
        sizes = sorted(self.usual)
        if len(sizes) > 1 and sizes[0] <= size <= sizes[-1]:
            return float(np.interp(size, sizes, [self.usual[one] for one in sizes]))
        if len(self.known) > 2:
            slope, constant = np.polyfit([*self.known], [*self.known.values()], 1)
            if slope > 0 and constant >= 0:
                return float(constant + slope * size)
        return 4.0 + size  # as `rollflow.schedule.cost.CostModel.assumed`


def curve(sizes: np.ndarray, seconds: np.ndarray, usual: Mapping[int, float]) -> Curve:
    """The means of samples, smoothed where few samples make them noisy: none is below that of a smaller size.

    A sample counts as twice the median of its size at most: whatever interrupted it was not its own.
    """
    keep = ~np.isnan(seconds) & (seconds > 0)
    sizes, seconds = sizes[keep], seconds[keep]
    known, weights = [], []
    for size in np.unique(sizes):
        own = seconds[sizes == size]
        known.append(float(np.minimum(own, 2 * np.median(own)).mean()))
        weights.append(int((sizes == size).sum()))
    rising = _rising(known, weights)
    return Curve(dict(zip(np.unique(sizes).tolist(), rising, strict=True)), usual)


def line(sizes: np.ndarray, seconds: np.ndarray) -> Curve:
    """A constant and so much an image, by repeated medians (Siegel 1982), of the faster quarter of the samples.

    A call of a reward after a pause finds its data pushed out of the caches; one of a thread that judges all the time
    does not: what a call takes then is what counts where rewards do.
    """
    keep = ~np.isnan(seconds) & (seconds > 0)
    sizes, seconds = sizes[keep].astype(float), seconds[keep]
    if len(np.unique(sizes)) < 3:
        return curve(sizes.astype(np.int64), seconds, {})
    slope = max(0.0, float(siegelslopes(seconds, sizes).slope))
    constant = max(0.0, float(np.quantile(seconds - slope * sizes, 0.25)))
    known = sorted({1, 2 * int(sizes.max()), *map(int, sizes)})
    return Curve({size: constant + slope * size for size in known}, {})


def _rising(values: list[float], weights: list[int]) -> list[float]:
    """The nearest sequence that does not fall, by pooling of adjacent violators."""
    pools: list[list[float]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, weight_of, many = pools.pop()
            last = pools[-1]
            total = last[1] + weight_of
            pools[-1] = [(last[0] * last[1] + mean * weight_of) / total, total, last[2] + many]
    return [mean for mean, _, many in pools for _ in range(int(many))]


class Alone:
    """Turns seconds that were recorded into those of the same work with nothing beside it.

    Args:
        recording: what ran.
    """

    def __init__(self, recording: Recording):
        about, batches, calls = recording.about, recording.batches, recording.calls
        self.gpu = not str(about["device"]).startswith("cpu")
        cores = float(about["cores"])
        rows = batches[~np.isnan(batches["ended"])]
        active: list[tuple[np.ndarray, np.ndarray, Any]] = [
            (rows["started"], rows["ended"], float(0 if self.gpu else about["threads"]))
        ]
        took = np.maximum(calls["ended"] - calls["started"], 1e-9)
        active.append((calls["started"], calls["ended"], np.minimum(1.0, np.nan_to_num(calls["cpu"]) / took)))
        decided = batches[~np.isnan(batches["decide_ended"])]
        active.append((decided["decide_ended"] - decided["decide_seconds"], decided["decide_ended"], 1.0))
        self._cpu = _Share(active, cores)
        on_device = [
            (b, b + batches[f"{stage}_device_seconds"], 1.0)
            for stage in ("forward", "decode", "reward", "backward")
            if not np.isnan(b := batches[f"{stage}_device_started"]).all()
        ]
        self._gpu = _Share(on_device, 1.0)

    def stage(self, batches: np.ndarray, stage: str) -> np.ndarray:
        """Seconds of a stage in each batch, alone: on CUDA those of the device."""
        device = f"{stage}_device_seconds"
        if self.gpu and device in (batches.dtype.names or ()):
            start = batches[f"{stage}_device_started"]
            return np.where(
                np.isnan(start), batches[f"{stage}_seconds"], self._gpu.alone(start, start + batches[device])
            )
        start, end, seconds = (batches[f"{stage}_{what}"] for what in ("started", "ended", "seconds"))
        span = np.maximum(end - start, 1e-12)
        return np.where(seconds > 0, self._cpu.alone(start, end) * seconds / span, 0.0)

    def spans(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Seconds of spans of the host, alone."""
        return self._cpu.alone(start, end)


class _Share:
    """What share of a processor everything had, over time."""

    def __init__(self, active: Sequence[tuple[np.ndarray, np.ndarray, Any]], units: float):
        starts = [np.broadcast_to(demand, start.shape) for start, _, demand in active]
        times = np.concatenate([np.zeros(0), *(one for start, end, _ in active for one in (start, end))])
        steps = np.concatenate([np.zeros(0), *(one for demand in starts for one in (demand, -demand))])
        good = ~np.isnan(times)
        order = np.argsort(times[good], kind="stable")
        self._times, demand = times[good][order], np.cumsum(steps[good][order])
        share = np.where(demand > units, units / np.maximum(demand, 1e-9), 1.0)
        spans = np.diff(self._times)
        self._work = np.concatenate([[0.0], np.cumsum(spans * share[:-1])]) if len(spans) else np.zeros(len(times))

    def alone(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        if len(self._times) < 2:
            return end - start
        return self._at(end) - self._at(start)

    def _at(self, when: np.ndarray) -> np.ndarray:
        inside = np.interp(when, self._times, self._work)
        return inside + np.minimum(0.0, when - self._times[0]) + np.maximum(0.0, when - self._times[-1])


@dataclass(frozen=True)
class Size:
    """What batches of one image size cost, alone.

    Attributes:
        geometry: of the images.
        slots: of particles.
        warmed: seconds of a batch (forward and decode) by bucket, as the engine had measured them.
        forward: of plain batches, by bucket.
        around: propose, finish and what else a lane does of them, by bucket.
        guided, guided_decode: of guided rows, by bucket; what goes backward counts in proportion to both.
        decode: by decoder, the decoding of so many images, padding included.
        images: what making images of finished searches takes besides decoding.
    """

    geometry: Geometry
    slots: int
    warmed: Mapping[int, float]
    forward: Curve
    around: Curve
    guided: Curve
    guided_decode: Curve
    decode: Mapping[str, Curve]
    images: float


@dataclass(frozen=True)
class Measured:
    """Seconds of everything, alone.

    Attributes:
        sizes: by image size, clips by (height, width, frames).
        rewards: by term, of a call by its number of images.
        waiting: by term, the share of its calls in which it waits and uses no core.
        choose: of the loop, to choose a batch.
        decide: of the loop, to take a row back.
        turnaround: of a lane, from a batch that was chosen to its start where the lane was free.
        encode: of a prompt; 0 where none was encoded.
    """

    sizes: Mapping[tuple[int, int, int], Size]
    rewards: Mapping[str, Curve]
    waiting: Mapping[str, float]
    choose: float
    decide: float
    turnaround: float
    encode: float


def measure(recording: Recording) -> Measured:
    """What a recording says that things cost.

    Raises:
        RequestError: no batch of rows is in it.
    """
    alone, about = Alone(recording), recording.about
    rows, batches = recording.rows, recording.batches[~np.isnan(recording.batches["ended"])]
    batches = batches[~np.isin(batches["batch"], rows["batch"][rows["cached"]])]  # their requests are not replayed
    plain = batches[batches["work"] == WORK.index("rows")]
    if not len(plain) and not (batches["work"] == WORK.index("guided")).any():
        raise RequestError("nothing ran in this recording: record at least one request")
    sizes = {}
    for one in about["sizes"]:
        shape = one["geometry"].get("shape")
        geometry = Geometry(**{**one["geometry"], "shape": None if shape is None else tuple(shape)})
        key = geometry.height, geometry.width, geometry.frames or 0
        own = batches[(batches["height"] == key[0]) & (batches["width"] == key[1]) & (batches["frames"] == key[2])]
        if len(own):
            warmed = {int(bucket): float(seconds) for bucket, seconds in one["seconds"].items()}
            sizes[key] = _size(geometry, int(one["slots"]), warmed, own, bool(about["preview"]), alone)
    calls = recording.calls[~recording.calls["failed"]]
    took, cpu = alone.spans(calls["started"], calls["ended"]), np.nan_to_num(calls["cpu"])
    rewards, waiting = {}, {}
    for term in np.unique(calls["reward"]):
        mine = calls["reward"] == term
        computes = float(cpu[mine].sum()) / max(float(took[mine].sum()), 1e-9)
        waits = computes < COMPUTES and not alone.gpu
        images = calls["images"][mine]
        rewards[str(term)] = curve(images, took[mine], {}) if waits or alone.gpu else line(images, cpu[mine])
        waiting[str(term)] = 1.0 - computes if waits else 0.0
    work = batches[~is_chore(batches)]
    prompt = batches[batches["work"] == WORK.index("encode")]
    free = work[(work["idle"] > 0) & (work["submitted"] >= work["started"] - np.nan_to_num(work["idle"]))]
    decided = work[work["decide_seconds"] > 0]
    return Measured(
        sizes,
        rewards,
        waiting,
        choose=_median(np.maximum(0.0, work["submitted"] - work["chosen"])),
        decide=float(decided["decide_seconds"].sum() / max(1, decided["rows"].sum())),
        turnaround=_median(free["started"] - free["submitted"]),
        encode=float(alone.spans(prompt["started"], prompt["ended"]).mean()) if len(prompt) else 0.0,
    )


def _size(
    geometry: Geometry, slots: int, warmed: Mapping[int, float], own: np.ndarray, preview: bool, alone: Alone
) -> Size:
    plain = own[own["work"] == WORK.index("rows")]
    guided = own[own["work"] == WORK.index("guided")]
    shown = own[own["work"] == WORK.index("images")]
    if alone.gpu:  # a lane is taken until the device is done: what the host does of it is its launches
        around = sum(plain[f"{stage}_seconds"] for stage in LAUNCHED)
        rest = shown["decode_seconds"]
    else:
        around = alone.stage(plain, "propose") + alone.stage(plain, "finish") + np.nan_to_num(plain["host"])
        rest = alone.spans(shown["started"], shown["ended"]) - alone.stage(shown, "decode")
    half = {bucket: seconds / 2 for bucket, seconds in warmed.items()}
    scored = plain["judged"]
    buckets = np.array(sorted(warmed))
    padded = buckets[np.minimum(np.searchsorted(buckets, np.maximum(scored, 1)), len(buckets) - 1)]
    judged = scored > 0
    decode = {}
    kind = LIGHT if preview else FULL
    decode[kind] = curve(padded[judged], alone.stage(plain, "decode")[judged], half)
    full = shown[shown["bucket"] <= buckets[-1]]
    of_images = buckets[np.minimum(np.searchsorted(buckets, full["bucket"]), len(buckets) - 1)]
    if kind == LIGHT or not decode[FULL].known:
        decode[FULL] = curve(of_images, alone.stage(full, "decode"), half)
    network, pixels, back = (alone.stage(guided, stage) for stage in ("forward", "decode", "backward"))
    share = pixels / np.maximum(network + pixels, 1e-12)
    rest_of = alone.stage(guided, "propose") + alone.stage(guided, "finish") + np.nan_to_num(guided["host"])
    return Size(
        geometry,
        slots,
        warmed,
        curve(plain["bucket"], alone.stage(plain, "forward"), half),
        curve(plain["bucket"], around, {}),
        curve(guided["bucket"], rest_of + network + (1 - share) * back, warmed),
        curve(guided["bucket"], pixels + share * back, warmed),
        decode,
        max(0.0, _median(rest)),
    )


def _median(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else 0.0
