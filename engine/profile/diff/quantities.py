"""What two sides' recordings are compared by, each quantity with how sure its change is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from rollflow.profile.accounts import SPENT
from rollflow.profile.diff.batchwise import ROW_KINDS, WORKS, Batchwise, Picked
from rollflow.profile.diff.matched import Matched, Sample, Shares
from rollflow.profile.diff.noise import Errors, Estimate, over_repetitions, within
from rollflow.profile.records import CHORES, FATES, LANE_STAGES, STAGES, WORK

Side = Sequence[Batchwise]


@dataclass(frozen=True)
class Measure:
    """A quantity of a group.

    Attributes:
        a, b: its value on both sides, means over their recordings; NaN where no size is on both.
        share: the change of its seconds as a share of A's lane seconds; of NFE by kind, as one of those that were kept;
            of "overall", of A's value.
        estimate: of the change; None where nothing tells it.
    """

    group: str
    name: str
    unit: str
    a: float
    b: float
    share: float
    estimate: Estimate | None


@dataclass(frozen=True)
class Part:
    """Seconds of a recording that one thing took, and why they changed: speed, packing, work and other add up to
    `b - a`.

    Attributes:
        name: a stage, a chore, or "idle"; the change of the same name says how sure `speed` is.
        a, b: its seconds, means over a side's recordings.
        speed, packing, work: see `rollflow.profile.matched.Shares`.
        other: of what is no batch.
        lane: whether it is time of a lane, as against that of the threads that judge and of the loop.
    """

    name: str
    a: float
    b: float
    speed: float
    packing: float
    work: float
    other: float
    lane: bool


# Batches against batches of the same size.


def by_stage(a: Side, b: Side) -> tuple[list[Part], list[Measure]]:
    """Where the seconds went, and how much longer a stage takes in batches of the same size."""
    parts, measures, lanes = [], [], _lane_seconds(a)
    for name, pick, lane in _stages(a, b):
        pair = Matched(Sample.of(a, pick), Sample.of(b, pick))
        shares = pair.shares()
        if shares.a or shares.b:
            parts.append(Part(name, shares.a, shares.b, shares.speed, shares.packing, shares.work, 0.0, lane))
            measures.append(_speed("speed", name, pair, shares, lanes))
    idle = partial(_mean, figure=lambda run: run.idle)
    others = [("idle", idle), *((f"chore: {kind}", partial(_mean, figure=_chore(kind))) for kind in CHORES)]
    for name, mean in others:
        before, after = mean(a), mean(b)
        if before or after:
            parts.append(Part(name, before, after, 0.0, 0.0, 0.0, after - before, True))
    return parts, measures


def _stages(a: Side, b: Side) -> Iterator[tuple[str, Callable[[Batchwise], Picked], bool]]:
    """Stages by name, the batches in them, and whether they are time of a lane."""
    for work, words in (("rows", ""), ("guided", " (guided)"), ("images", " (images)")):
        stages = (*LANE_STAGES, "reward", "host") if work == "guided" else (*LANE_STAGES, "host")
        for stage in stages:
            yield f"{stage}{words}", partial(_batches, stage=stage, work=work), True
        yield f"decide{words}", partial(_batches, stage="decide", work=work), False
    for reward in sorted({str(name) for run in (*a, *b) for name in run.recording.calls["reward"]}):
        yield f"reward {reward}", partial(_calls, reward=reward), False


def _batches(run: Batchwise, stage: str, work: str) -> Picked:
    return run.batches(stage, work)


def _calls(run: Batchwise, reward: str) -> Picked:
    return run.calls(reward)


def _chore(kind: str) -> Callable[[Batchwise], float]:
    return lambda run: float(run.span[run.table["work"] == WORK.index(kind)].sum())


def _mean(runs: Side, figure: Callable[[Batchwise], float]) -> float:
    return float(np.mean([figure(run) for run in runs]))


def by_bucket(a: Side, b: Side) -> list[Measure]:
    """Seconds of a batch of each size that both sides have."""
    found = []
    for work in WORKS:
        keys = [{tuple(key[:4]) for run in runs for key in run.batches("batch", work)[0].tolist()} for runs in (a, b)]
        for size in sorted(keys[0] & keys[1]):
            pick = partial(_of_size, work=work, size=size)
            pair = Matched(Sample.of(a, pick), Sample.of(b, pick))
            height, width, frames, bucket = size
            clip = f", {frames} frames" if frames else ""
            name = f"{bucket} {_ENTRIES[work]} of {height}x{width}{clip}"
            found.append(_speed("buckets", name, pair, pair.shares(), _lane_seconds(a)))
    return found


_ENTRIES = {"rows": "rows", "guided": "guided rows", "images": "images"}


def _of_size(run: Batchwise, work: str, size: tuple[int, ...]) -> Picked:
    keys, seconds, units = run.batches("batch", work)
    own = (keys[:, : len(size)] == size).all(1)
    return keys[own], seconds[own], units[own]


def all_batches(run: Batchwise) -> Picked:
    """Every batch of a recording, with its seconds of the lane."""
    picked = [run.batches("batch", work) for work in WORKS]
    keys = np.concatenate([np.insert(one[0], 0, i, axis=1) for i, one in enumerate(picked)])
    return keys, np.concatenate([one[1] for one in picked]), np.concatenate([one[2] for one in picked])


def _lane_seconds(runs: Side) -> float:
    return _mean(runs, lambda run: run.lane_seconds)


def _speed(group: str, name: str, pair: Matched, shares: Shares, lanes: float) -> Measure:
    found = pair.speed()
    if found is None:  # one side has none of it, or they have no size in common
        alone = min(shares.a, shares.b) == 0
        a, b = (shares.a, shares.b) if alone else (np.nan, np.nan)
        return Measure(group, name, "s", a, b, (shares.b - shares.a) / lanes if alone else 0.0, None)
    estimate = over_repetitions([*found.index_a], [*found.index_b])
    if estimate is None:
        estimate = within(found.a, found.b, found.errors_a, found.errors_b)
    return Measure(group, name, "s", found.a, found.b, shares.speed / lanes, estimate)


# Of the recording as a whole, and for each NFE that was kept.


def overall(a: Side, b: Side) -> list[Measure]:
    """Wall seconds, NFE a second, occupancy of batches, latency of requests."""
    pace = [_errors(runs, lambda run: run.cycle, lambda run: run.kept) for runs in (a, b)]
    wall = [[run.recording.seconds for run in runs] for runs in (a, b)]
    rate = [[float(run.kept.sum()) / run.recording.seconds for run in runs] for runs in (a, b)]
    found = [
        _measure("overall", "wall", "s", wall, pace),
        _measure("overall", "NFE a second", "NFE/s", rate, pace),
        _ratio("overall", "occupancy", "of rows", a, b, _useful, lambda run: run.executed),
    ]
    for name, share in (("latency, median", 0.5), ("latency, p95", 0.95)):
        values = [[_latency(run, share) for run in runs] for runs in (a, b)]
        if np.isfinite([*values[0], *values[1]]).all():
            found.append(_measure("overall", name, "s", values, None))
    return found


def _useful(run: Batchwise) -> np.ndarray:
    return run.executed - run.kinds[:, ROW_KINDS.index("padding")]


def _latency(run: Batchwise, share: float) -> float:
    requests = run.recording.requests
    requests = requests[requests["state"] == FATES.index("done")]
    took = requests["ended"] - requests["submitted"]
    took = took[np.isfinite(took)]
    return float(np.quantile(took, share)) if len(took) else np.nan


def a_committed_nfe(a: Side, b: Side) -> list[Measure]:
    """NFE by kind, seconds by stage and lane seconds by kind of row for each NFE that was kept; seconds by stage for
    each executed row."""
    found = []

    def kept(run: Batchwise) -> np.ndarray:
        return run.kept

    def executed(run: Batchwise) -> np.ndarray:
        return run.executed

    for i, kind in enumerate(SPENT):
        found.append(_ratio("nfe", kind, "/NFE", a, b, partial(_nfe, kind=i), kept))
    for stage in (*STAGES, "host", "idle"):
        seconds = partial(_stage_seconds, stage=stage)
        found.append(_ratio("seconds", stage, "s/NFE", a, b, seconds, kept))
        found.append(_ratio("rows", stage, "s/row", a, b, seconds, executed))
    for i, kind in enumerate(ROW_KINDS):
        found.append(_ratio("kinds", kind, "s/NFE", a, b, partial(_kind_seconds, kind=i), kept))
    return [one for one in found if one.a or one.b]


def _nfe(run: Batchwise, kind: int) -> np.ndarray:
    return run.nfe[:, kind]


def _stage_seconds(run: Batchwise, stage: str) -> np.ndarray:
    return run.cycle - run.span if stage == "idle" else run.seconds(stage)


def _kind_seconds(run: Batchwise, kind: int) -> np.ndarray:
    """Lane seconds of a batch's entries of a kind, which all have the same share."""
    return np.where(run.work < 0, 0.0, run.span) * run.kinds[:, kind] / np.maximum(run.kinds.sum(1), 1)


Column = Callable[[Batchwise], np.ndarray]


def _ratio(group: str, name: str, unit: str, a: Side, b: Side, numerator: Column, denominator: Column) -> Measure:
    values = [[float(numerator(run).sum() / denominator(run).sum()) for run in runs] for runs in (a, b)]
    found = _measure(group, name, unit, values, [_errors(runs, numerator, denominator) for runs in (a, b)])
    if unit == "/NFE":
        return replace(found, share=found.b - found.a)
    if not unit.startswith("s/"):
        return found
    many = _mean(a, lambda run: float(denominator(run).sum()))
    return replace(found, share=(found.b - found.a) * many / _lane_seconds(a))


def _errors(runs: Side, numerator: Column, denominator: Column) -> Errors:
    """Of each batch, in a ratio of sums."""
    found = []
    for run in runs:
        above, below = numerator(run), denominator(run)
        total = above.sum()
        found.append(above / total - below / below.sum() if total else np.zeros(len(above)))
    errors = np.concatenate(found)
    return errors, np.full(len(errors), 1 / len(runs))


def _measure(
    group: str, name: str, unit: str, values: Sequence[Sequence[float]], errors: Sequence[Errors] | None
) -> Measure:  # fmt: skip
    """Of the values of both sides' recordings, and the errors of their batches where one recording tells any."""
    first, second = (float(np.mean(side)) for side in values)
    estimate = over_repetitions(*values)
    if estimate is None and errors is not None:
        estimate = within(first, second, *errors)
    share = second / first - 1 if first else float(second > 0)
    return Measure(group, name, unit, first, second, share, estimate)
