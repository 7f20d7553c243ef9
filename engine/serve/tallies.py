"""What a desk and its workers hold at a moment, and what they have counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollflow.serve.orders import Ordered
from rollflow.serve.roster import WorkerState, WorkerStats


@dataclass(frozen=True)
class RewardCounts:
    """Calls of a reward so far, images that they judged, seconds that they took, and searches that failed by it."""

    calls: int
    images: int
    seconds: float
    errors: int


@dataclass(frozen=True)
class DeskStats:
    """What the desk and its workers hold at a moment, and counters since its start.

    Attributes:
        queued, running: searches that wait, and that an engine has let in.
        oldest: seconds since the oldest of those that wait was handed in; 0 where none waits.
        limit: searches that the workers which are ready take at a time.
        outstanding_nfe: what they have left to spend.
        nfe: rows that the workers' devices ran by kind, padding included; see `rollflow.profile.ledger.Ledger`.
        nfe_per_second: of all workers, over the last ten seconds.
        rows, slots: of all batches so far, rows with a purpose, and rows with padding: their ratio is the occupancy.
        free, pooled: slots of particles that are not in use, and all; they are made when a size is first used.
        rewards: by name.
        workers: each one.
        ended: searches that ended, by status.
        ready, draining: whether it takes searches; whether it is closing.
    """

    queued: int
    running: int
    oldest: float
    limit: int
    outstanding_nfe: int
    nfe: dict[str, int]
    nfe_per_second: float
    rows: int
    slots: int
    free: int
    pooled: int
    rewards: dict[str, RewardCounts]
    workers: tuple[WorkerStats, ...]
    ended: dict[str, int]
    ready: bool
    draining: bool

    @property
    def occupancy(self) -> float:
        """How full batches were, 0 to 1; 1 before the first."""
        return self.rows / self.slots if self.slots else 1.0


def tallied(
    active: Sequence[Ordered],
    workers: Sequence[WorkerState],
    ended: Mapping[str, int],
    errors: Mapping[str, int],
    ready: bool,
    draining: bool,
    limit: int,
    now: float,
) -> DeskStats:
    """Adds up searches that are not over, workers, ends by status, and searches that failed by their reward's name."""
    waiting = [order.created for order in active if order.status == "queued"]
    counted: dict[str, Counter[str]] = {}
    for worker in workers:
        for name, counts in worker.counted().items():
            counted[name] = counted.get(name, Counter()) + counts
    ran, calls = counted["ran"], counted["calls"]
    seen = tuple(worker.now(now) for worker in workers)
    return DeskStats(
        queued=len(waiting),
        running=sum(order.status == "running" for order in active),
        oldest=max(0.0, time.time() - min(waiting)) if waiting else 0.0,
        limit=limit,
        outstanding_nfe=sum(order.left for order in active),
        nfe=dict(ran),
        nfe_per_second=sum(worker.nfe_per_second for worker in seen),
        rows=sum(ran.values()) - ran["padding"],
        slots=sum(ran.values()),
        free=sum(worker.free for worker in seen),
        pooled=sum(worker.pooled for worker in seen),
        rewards={
            name: RewardCounts(
                calls[name], counted["images"][name], float(counted["seconds"][name]), errors.get(name, 0)
            )
            for name in {*calls, *errors}
        },
        workers=seen,
        ended=dict(ended),
        ready=ready,
        draining=draining,
    )
