"""What got slower between two recordings, by stage and kind of row, beyond the noise.

A batch is compared with batches of its size alone, so that another packing is not taken for a slower kernel; see
`rollflow.profile.diff.matched` for what a change is due to, and `rollflow.profile.diff.noise` for how sure it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rollflow.errors import RequestError, shown
from rollflow.profile.diff.batchwise import Batchwise
from rollflow.profile.diff.comparable import alike, differences
from rollflow.profile.diff.matched import Matched, Sample
from rollflow.profile.diff.noise import LEVEL, REPEATED
from rollflow.profile.diff.quantities import Measure, Part, a_committed_nfe, all_batches, by_bucket, by_stage, overall
from rollflow.profile.recording import ABOUT, Recording

SMALLEST = 0.01  # a change of less than this share of A's value is not called one,
NEGLIGIBLE = 0.001  # nor is one of less than this share of A's lane seconds
FAMILIES = (("speed",), ("buckets",), ("overall",), ("nfe", "seconds", "rows", "kinds"))
GROUPS = tuple(group for family in FAMILIES for group in family)
WORDS = {"NFE/s": ("faster", "slower"), "/NFE": ("more", "fewer"), "of rows": ("fuller", "emptier")}  # up, down


@dataclass(frozen=True)
class Change:
    """One quantity on both sides.

    Attributes:
        group: of `GROUPS`: "speed", a stage, and "buckets", a whole batch, are seconds of batches against those of
            batches of the same size; "overall" is of the recording; "nfe", "seconds" by stage and "kinds", seconds of
            lanes by what rows were for, are for each NFE that was kept; "rows" is seconds by stage for each executed
            row, padding included.
        name, unit: which, and in what.
        a, b, share: see `rollflow.profile.quantities.Measure`.
        change: B over A less 1; None where A is 0 or not there.
        low, high: its 95 % interval, all of a family at once; see `FAMILIES`. None where the recordings do not tell.
        verdict: "slower" or "faster" (of NFE "more" or "fewer", of the occupancy "fuller" or "emptier") where the
            interval excludes 0, the change is at least 1 % of A's value and its share at least 0.1 %; "same" where not;
            "new" or "gone" where one side has none and the share is that large; "unknown" without an interval.
    """

    group: str
    name: str
    unit: str
    a: float
    b: float
    share: float
    change: float | None
    low: float | None
    high: float | None
    verdict: str

    @property
    def loss(self) -> float:
        """By how much of A's time it got slower, 0 where that is not known; of a rate, by its inverse."""
        change = self.change or 0.0
        return 1 / (1 + change) - 1 if self.unit == "NFE/s" else change


@dataclass(frozen=True)
class Diff:
    """What changed from A to B.

    Attributes:
        a, b: what the sides are, and their figures, means over recordings.
        warnings: what makes them hard to compare, a line each.
        repeated: whether the noise is that between recordings; if not, it is that within them, and nothing is known of
            the noise from run to run.
        matched: the share of the time of A's and of B's batches that lies in sizes which both have.
        parts: where the seconds went; those of lanes add up to the lane seconds. The largest change comes first.
        changes: quantities, by group.
    """

    a: dict[str, Any]
    b: dict[str, Any]
    warnings: tuple[str, ...]
    repeated: bool
    matched: tuple[float, float]
    parts: tuple[Part, ...]
    changes: tuple[Change, ...]

    def of(self, *groups: str) -> dict[str, Change]:
        """The quantities of some groups, by name."""
        return {one.name: one for one in self.changes if one.group in groups}

    def slower(self, by: float = 0.0) -> list[Change]:
        """What is called slower, and is so by more than this share."""
        return [one for one in self.changes if one.verdict == "slower" and one.loss > by]

    def record(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        content = {**asdict(self), "level": LEVEL, "smallest": SMALLEST, "negligible": NEGLIGIBLE}
        for one in content["changes"]:
            one.update(
                {name: None for name, value in one.items() if isinstance(value, float) and not np.isfinite(value)}
            )
        return content


def recordings(folder: str | Path) -> list[Recording]:
    """The recording in a folder, or those in its folders, which are repetitions.

    Raises:
        RequestError: there is none, or one that cannot be read.
    """
    folder = Path(folder)
    if (folder / ABOUT).is_file():
        return [Recording.load(folder)]
    found = sorted(file.parent for file in folder.glob(f"*/{ABOUT}"))
    if not found:
        raise RequestError(
            f"{shown(str(folder))} and its folders hold no recording: give one that `rollflow profile --out` wrote"
        )
    return [Recording.load(one) for one in found]


def diff(a: Sequence[Recording], b: Sequence[Recording]) -> Diff:
    """Compares two recordings, or two sides with several repetitions each.

    With four recordings or more the noise is what those of a side differ by. With fewer it is what batches differ by
    within a recording.

    Raises:
        RequestError: those of a side are no repetitions, or one has no evaluation that a search kept.
    """
    alike(a, "A")
    alike(b, "B")
    first, second = [Batchwise(one) for one in a], [Batchwise(one) for one in b]
    for name, runs in (("A", first), ("B", second)):
        if any(run.kept.sum() == 0 for run in runs):
            raise RequestError(f"a recording of {name} has no evaluation that a search kept: record while requests run")
    parts, speeds = by_stage(first, second)
    measures = [*speeds, *by_bucket(first, second), *overall(first, second), *a_committed_nfe(first, second)]
    matched, warnings = _matched(first, second), differences(a, b)
    if min(matched) < 0.5:
        warnings.append(
            f"batches of sizes that both have are {100 * matched[0]:.0f} % of A's time and {100 * matched[1]:.0f} % of "
            "B's: what is slower in the others is told as packing"
        )
    parts.sort(key=lambda part: (not part.lane, -abs(part.b - part.a)))
    repeated = len(a) + len(b) >= REPEATED
    return Diff(_figures(first), _figures(second), tuple(warnings), repeated, matched, tuple(parts), _judged(measures))


def _matched(a: Sequence[Batchwise], b: Sequence[Batchwise]) -> tuple[float, float]:
    one, other = Sample.of(a, all_batches), Sample.of(b, all_batches)
    first, second = Matched(one, other).seconds
    return first * one.runs / float(one.seconds.sum()), second * other.runs / float(other.seconds.sum())


def _figures(runs: Sequence[Batchwise]) -> dict[str, Any]:
    about = runs[0].recording.about
    names = ("model", "device", "dtype", "machine", "threads", "preview", "versions")
    figures: dict[str, Callable[[Batchwise], float]] = {
        "lanes": lambda run: run.lanes,
        "wall_seconds": lambda run: run.recording.seconds,
        "lane_seconds": lambda run: run.lane_seconds,
        "batches": lambda run: (run.work >= 0).sum(),
        "requests": lambda run: len(run.recording.requests),
        "committed_nfe": lambda run: run.kept.sum(),
        "executed_rows": lambda run: run.executed.sum(),
    }
    means = {name: float(np.mean([figure(run) for run in runs])) for name, figure in figures.items()}
    return {"recordings": len(runs), **{name: about.get(name) for name in names}, **means}


def _judged(measures: Sequence[Measure]) -> tuple[Change, ...]:
    """Verdicts, with intervals as wide as it takes for all of a family to hold at once."""
    family = {group: i for i, groups in enumerate(FAMILIES) for group in groups}
    many = Counter(family[one.group] for one in measures if one.estimate is not None)
    return tuple(_change(one, many[family[one.group]]) for one in measures)


def _change(one: Measure, many: int) -> Change:
    described = one.group, one.name, one.unit, one.a, one.b, one.share
    if one.estimate is None:
        verdict = "new" if one.a == 0 < one.b else "gone" if one.b == 0 < one.a else "unknown"
        if verdict != "unknown" and abs(one.share) < NEGLIGIBLE:
            verdict = "same"
        return Change(*described, one.b / one.a - 1 if one.a > 0 else None, None, None, verdict)
    change, (low, high) = one.estimate.change, one.estimate.interval(many)
    up, down = WORDS.get(one.unit, ("slower", "faster"))
    sure = (low > 0 or high < 0) and abs(change) >= SMALLEST and abs(one.share) >= NEGLIGIBLE
    return Change(*described, change, low, high, "same" if not sure else up if change > 0 else down)
