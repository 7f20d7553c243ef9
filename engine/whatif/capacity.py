"""How many GPUs a load takes: replays of a recording under arrivals by chance, with more and more engines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from rollflow.errors import RequestError
from rollflow.whatif.changes import Change
from rollflow.whatif.replay import Replay

EACH = 40  # requests of a replay for each engine, at least ...
LEAST = 200  # ... and in all
ENDS = 0.1  # the share of requests that is left out at both ends, where the fleet fills and empties
AT_ONCE = 128  # requests of which an engine's rate is taken
IDLE = 0.15  # the load at which more engines change nothing
MOST = 4096  # engines


@dataclass(frozen=True)
class Fleet:
    """What some number of engines makes of a load.

    Attributes:
        gpus: how many.
        p50, p95: seconds of a request from its arrival to its end.
        load: arrivals over what the fleet can do; at 1 or more, requests queue without end, and the seconds are those
            of a replay that ended.
        enough: whether the p95 is at most what was asked, and the load below 1.
    """

    gpus: int
    p50: float
    p95: float
    load: float
    enough: bool


def capacity(replay: Replay, change: Change, p95: float, more: int = 1) -> Iterator[Fleet]:
    """Fleets of growing size under `change.rate` requests a second, until one is enough, and some beyond it.

    Args:
        replay: of what each engine runs.
        change: the rate, and whatever else is different.
        p95: seconds that 95 of 100 requests may take.
        more: how many fleets beyond the first that is enough.

    Raises:
        RequestError: no rate, a time that is none, or one that a request alone does not keep.
    """
    if change.rate is None:
        raise RequestError("a capacity is asked for without a rate: give requests a second, such as --rate 20")
    if not 0 < p95 < math.inf:
        raise RequestError(f"p95={p95}: seconds must be above 0")
    alone = float(np.quantile(replay.alone, 0.95))
    if alone > p95 and change == Change(rate=change.rate, seed=change.seed):
        raise RequestError(
            f"of the recorded requests 5 % take {alone:.2f} s or more if nothing else runs, 95 % may take {p95:g} s "
            "at most: no number of GPUs helps; lower the budget, or ask for more time"
        )
    most = _most(replay, change)
    first = max(1, math.ceil(change.rate / most) - 1)  # one that is too few shows that it is
    if first > MOST:
        raise RequestError(f"{change.rate:g} requests/s take more than {MOST} GPUs: an engine does {most:.3g} of them")
    left: int | None = None
    for gpus in range(first, MOST):
        fleet = _fleet(replay, change, gpus, p95, change.rate / (gpus * most))
        yield fleet
        left = more if left is None and fleet.enough else None if left is None else left - 1
        if left == 0:
            return
        if left is None and fleet.load < IDLE:
            break
    raise RequestError(
        f"at {fleet.load:.0%} of load 95 % of the requests take up to {fleet.p95:.2f} s still, more than {p95:g} s: "
        "more GPUs do not help; lower the budget, or ask for more time"
    )


def _most(replay: Replay, change: Change) -> float:
    """Requests a second that one engine does where there are always enough."""
    count = max(AT_ONCE, len(replay.recording.requests))
    return count / replay.run(replace(change, rate=None, prompts=count, gpus=1, together=True)).seconds


def _fleet(replay: Replay, change: Change, gpus: int, p95: float, load: float) -> Fleet:
    count = max(LEAST, EACH * gpus)
    found = replay.run(replace(change, gpus=gpus, prompts=count))
    own = found.latencies[int(ENDS * count) : count - int(ENDS * count)]
    inner = replace(found, latencies=own)
    reached = inner.latency(0.95)
    return Fleet(gpus, inner.latency(0.5), reached, load, reached <= p95 and load < 1)
