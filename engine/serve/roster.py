"""What the front knows of a worker: its searches, its last sign of life, and what it counted over all its lives."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from rollflow.serve.messages import Channel
from rollflow.serve.orders import Ordered

State = Literal["starting", "ready", "dead", "unfit"]


@dataclass(frozen=True)
class WorkerStats:
    """A worker at a moment.

    Attributes:
        name: its number and kind.
        state: "starting" until it is warmed up, "ready", "dead" until it is started again, "unfit" where it cannot be
            for now.
        age: seconds since the last known tick of its engine's loop.
        running: searches that it has.
        outstanding_nfe: what they have left to spend.
        nfe_per_second: over the last ten seconds.
        free, pooled: slots of particles that are not in use, and all; none before the first search.
        deaths: how often it died.
    """

    name: str
    state: State
    age: float
    running: int
    outstanding_nfe: int
    nfe_per_second: float
    free: int
    pooled: int
    deaths: int

    @property
    def alive(self) -> bool:
        """Whether it takes searches."""
        return self.state == "ready"


class WorkerState:
    """A channel and what came through it.

    Args:
        channel: to the worker.
        number: of the worker.

    Attributes:
        life: counts its starts: what an earlier life sends is dropped.
        orders: searches that it has, by id.
        reserved: whether it takes nothing more, until it is empty and takes one search alone.
        failed_starts: deaths in a row before it was ready; proven: whether it was ever ready.
        unfit: whether its last start ended with what it lacks.
        begun, ended: when it was started, and when it was last to be killed in this life.
    """

    def __init__(self, channel: Channel, number: int):
        self.channel, self.number = channel, number
        self.state: State = "dead"
        self.life = self.deaths = self.failed_starts = 0
        self.orders: dict[str, Ordered] = {}
        self.reserved = self.proven = self.unfit = False
        self.begun, self.ended = 0.0, -math.inf
        self.heard, self.age = 0.0, 0.0  # when the last message came, and how old the loop's tick was then
        self.stats: dict[str, Any] = {}
        self._before: dict[str, Counter[str]] = {}  # counters of earlier lives

    def __str__(self) -> str:
        return f"{self.number} ({self.channel!r})"

    @property
    def nfe(self) -> int:
        """What its searches have left to spend."""
        return sum(order.left for order in self.orders.values())

    def tick_age(self, now: float) -> float:
        """Seconds since the last known tick of its engine's loop."""
        return self.age + max(0.0, now - self.heard)

    def bury(self) -> None:
        """Keeps what a life has counted; the next one counts from 0."""
        for name, counted in self._counters().items():
            self._before[name] = self._before.get(name, Counter()) + counted
        self.stats = {}

    def counted(self) -> dict[str, Counter[str]]:
        """Rows by kind ("ran"), and calls, images and seconds of rewards by name, over all lives."""
        now = self._counters()
        return {name: self._before.get(name, Counter()) + counted for name, counted in now.items()}

    def _counters(self) -> dict[str, Counter[str]]:
        rewards = self.stats.get("rewards", {})
        found = {"ran": Counter(self.stats.get("ran", {}))}
        for place, name in enumerate(("calls", "images", "seconds")):
            found[name] = Counter({reward: counts[place] for reward, counts in rewards.items()})
        return found

    def now(self, clock: float) -> WorkerStats:
        """It as others may see it."""
        stats = self.stats if self.state == "ready" else {}
        free = int(stats.get("free", 0))
        return WorkerStats(
            str(self),
            self.state,
            self.tick_age(clock),
            len(self.orders),
            self.nfe,
            float(stats.get("nfe_per_second", 0.0)),
            free,
            free + int(stats.get("live", 0)),
            self.deaths,
        )
