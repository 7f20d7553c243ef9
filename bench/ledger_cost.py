"""What the ledger costs, which is always on: the same searches with its tables and without, in turns.

With a model that costs next to nothing it is processor time, in microseconds a row; with the built-in model "shapes" a
share of the wall time. The wall time varies by more than the ledger costs: so the share is told besides that the
processor time would be if nothing ran meanwhile. NVTX ranges, which mark the same stages, are timed without a profiler
that listens.

Predicted before the first measurement with "shapes", from parts that were timed by themselves (30 us to write a batch
of one row down, 25 us for its spans, 1 us for each further row, 0.6 ms for what a request of 100 rows cost): see
`PREDICTED`.
"""

from __future__ import annotations

import gc
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rollflow.bench import intervals, prompt_sets
from rollflow.engine import Engine
from rollflow.profile.ranges import marked
from rollflow.profile.records import STAGES
from rollflow.request import Request

PREDICTED = {"microseconds_per_row": 12.0, "share_of_wall_time": 0.004, "microseconds_per_range": 1.0}
RANGES = 10_000  # that are timed


def in_pairs(run: Callable[[bool], float], pairs: int) -> list[tuple[float, float]]:
    """What `run` gives with the ledger and without, one after the other, the order changing from pair to pair."""
    found = []
    for i in range(pairs):
        first = run(i % 2 == 0)
        second = run(i % 2 == 1)
        found.append((first, second) if i % 2 == 0 else (second, first))
    return found


def middle(values: Sequence[float]) -> dict[str, Any]:
    """The median and its 95 % interval, of which an end is None where there are too few values."""
    low, high = intervals.quantile_interval(values, 0.5)
    return {"median": statistics.median(values), "low": low, "high": high, "count": len(values)}


def measured(engine: Engine, requests: Sequence[Request], clock: Callable[[], float], on: bool) -> float:
    """Seconds of `clock` that an executed row takes with the ledger's tables or without."""
    engine.ledger.clear()
    engine.ledger.on = on
    gc.collect()
    start = clock()
    engine.generate([*requests])
    return (clock() - start) / sum(engine.ledger.executed.values())


def in_microseconds(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """What the tables cost a row, of seconds with them and without."""
    return {"microseconds_per_row": middle([1e6 * (on - off) for on, off in pairs])}


def in_shares(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The same, as a share of what a row takes without."""
    alone = statistics.median(off for _, off in pairs)
    return {"milliseconds_per_row": 1e3 * alone, "share": middle([on / off - 1 for on, off in pairs])}


def at_most(free: Mapping[str, Any], milliseconds: float) -> dict[str, Any]:
    """The share of a row's wall time that the ledger's processor time is, as if no other core worked meanwhile."""
    cost = free["microseconds_per_row"]
    ends = {end: None if cost[end] is None else cost[end] / (1e3 * milliseconds) for end in ("median", "low", "high")}
    return {"share_at_most": {**ends, "count": cost["count"]}}


def shapes_requests(prompts: int, nfe: int) -> list[Request]:
    """Searches of a prompt each, by the default method, with so many evaluations."""
    medium = prompt_sets.load("medium", 100)
    return [Request(medium[i % len(medium)], nfe=nfe, seed=i) for i in range(prompts)]


def ranges(engine: Engine, seconds_per_row: float) -> dict[str, float]:
    """What NVTX ranges cost without a profiler, of an engine whose ledger knows its last searches.

    Args:
        engine: whose batches are counted.
        seconds_per_row: wall time of an executed row.
    """

    def mark() -> None:
        with marked("tick", (8, 5)):
            pass

    each = min(timeit.repeat(mark, number=RANGES, repeat=5)) / RANGES
    batches = engine.ledger.table("batches")
    count = len(batches) + sum(int((~np.isnan(batches[f"{stage}_started"])).sum()) for stage in STAGES)
    rows = sum(engine.ledger.executed.values())
    share = each * count / (rows * seconds_per_row)
    return {"microseconds_per_range": 1e6 * each, "ranges_per_row": count / rows, "share": share}


def text(found: Mapping[str, Any]) -> str:
    """What was measured, in sentences."""

    def between(value: Mapping[str, Any], scale: float, unit: str) -> str:
        ends = ["?" if value[end] is None else f"{scale * value[end]:.2f}" for end in ("low", "high")]
        return f"{scale * value['median']:.2f} {unit} (median of {value['count']} pairs, 95 %: {' to '.join(ends)})"

    shapes, nvtx = found["shapes"], found["nvtx"]
    free = between(found["free model"]["microseconds_per_row"], 1, "us of the processor a row")
    wall, most = (between(shapes[name], 100, "%") for name in ("share", "share_at_most"))
    each, share = nvtx["microseconds_per_range"], 100 * nvtx["share"]
    return (
        f"the ledger's tables cost {free}. A row of shapes takes {shapes['milliseconds_per_row']:.2f} ms: with the "
        f"tables its wall time changes by {wall}, and their processor time is {most} of it. "
        f"NVTX ranges without a profiler: {each:.2f} us each, {nvtx['ranges_per_row']:.1f} a row, {share:.3f} % of the "
        "wall time of shapes"
    )
