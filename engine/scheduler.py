"""Packs the draws of all live searches into batches.

Each tick collects the draws that can run now, takes rows fairly, runs them in one forward and hands the evaluated
particles back to the methods, whose next draws are there at the next tick. Rows of one batch belong to different
prompts at different times.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from rollflow import methods
from rollflow.methods.budget import worth
from rollflow.models import Geometry
from rollflow.particle import Draw, Particle, ParticlePool
from rollflow.request import Kind, Plan, Record, Step

_CHILDREN, _DRAWS = 2**20, 2**20  # how many fit into a noise key


@dataclass(eq=False)
class Row:
    """One row of a batch: advance `parent` by `step` (or sample the prior) and evaluate the child."""

    search: Search
    step: Step
    particle: Particle
    parent: Particle | None
    noise_key: int
    prior: int | None  # which sample of the prior this is, counted over the request
    scored: bool
    kind: Kind
    draw: int


class Search:
    """One live request: its generator, the draws it waits for, its history and its counts."""

    def __init__(self, plan: Plan, geometry: Geometry, conditioning: Any, pool: ParticlePool):
        self.plan, self.geometry, self.conditioning, self.pool = plan, geometry, conditioning, pool
        request = plan.request
        self.method = methods.make(
            request.method, request.nfe, len(plan.steps), len(plan.finish), request.seed, **request.options
        )
        self.history: list[Record] = []
        self.best_reward = -math.inf
        self.committed = self.executed = self.turn = self.priors = 0
        self.start = time.perf_counter()
        self.chosen: Particle | None = None
        self.closed = False
        self.finished_steps = 0
        self._in_flight = 0
        self._begin(next(self.method))

    def _begin(self, draws: list[Draw]) -> None:
        self.draws = draws
        self.children: list[list[Particle]] = [[] for _ in draws]
        self.issued = [0] * len(draws)
        self.turn += 1

    @property
    def done(self) -> bool:
        """Whether the final particle has been evaluated."""
        return self.chosen is not None and self.finished_steps == len(self.plan.finish) and not self._in_flight

    def _open(self, i: int) -> bool:
        """Whether draw `i` may still need children: its count is not reached and no child has beaten `until`."""
        draw, children = self.draws[i], self.children[i]
        return self.issued[i] < draw.count and not (children and worth(children[-1]) > draw.until)

    def ready(self) -> Iterator[Row]:
        """The rows that can run now, in draw order; taking one issues it."""
        if self.chosen is not None:
            if self.finished_steps < len(self.plan.finish) and not self._in_flight:
                step = self.plan.finish[self.finished_steps]
                last = self.finished_steps + 1 == len(self.plan.finish)
                level = len(self.plan.steps) + self.finished_steps
                yield self._row(step, level, self.chosen, 0, None, last, "finish", 0)
            return
        for i, draw in enumerate(self.draws):
            sequential = draw.until != math.inf
            while self._open(i) and not (sequential and self.issued[i] > len(self.children[i])):
                level = 0 if draw.parent is None else draw.parent.step + 1
                key = (self.turn * _DRAWS + i) * _CHILDREN + self.issued[i]
                prior = None
                if draw.parent is None:
                    prior, self.priors = self.priors, self.priors + 1
                self.issued[i] += 1
                parent = cast("Particle | None", draw.parent)  # one that this scheduler handed to the method
                yield self._row(self.plan.steps[level], level, parent, key, prior, draw.scored, "committed", i)

    def _row(
        self,
        step: Step,
        level: int,
        parent: Particle | None,
        key: int,
        prior: int | None,
        scored: bool,
        kind: Kind,
        draw: int,
    ) -> Row:
        particle = Particle(level, step.time, self.pool.take(), -1, None if parent is None else parent.index)
        self._in_flight += 1
        return Row(self, step, particle, parent, key, prior, scored, kind, draw)

    def deliver(self, row: Row, reward: float | None) -> None:
        """Takes an evaluated row back; rows of a draw come back in the order they were issued."""
        particle = row.particle
        particle.reward, particle.index = reward, len(self.history)
        self._in_flight -= 1
        self.committed += 1
        self.history.append(Record(particle.index, particle.step, particle.time, reward, particle.parent, row.kind))
        self.best_reward = max(self.best_reward, worth(particle))
        if row.kind == "finish":
            self.chosen, self.finished_steps = particle, self.finished_steps + 1
        else:
            self.children[row.draw].append(particle)

    def advance(self) -> None:
        """Hands the particles to the method once all its draws are complete, and takes its next draws."""
        if self.chosen is None and not self._in_flight and not any(self._open(i) for i in range(len(self.draws))):
            children, self.children = self.children, []
            try:
                self._begin(self.method.send(children))
            except StopIteration as stop:
                self.chosen, self.draws = stop.value, []

    def close(self) -> None:
        """Drops every particle, so that their slots are free."""
        self.method.close()
        self.closed = True
        self.chosen, self.draws, self.children = None, [], []


@runtime_checkable
class Runner(Protocol):
    """What the scheduler needs of a runner: the rewards of a batch of rows of one geometry."""

    buckets: tuple[int, ...]

    def run(self, rows: list[Row]) -> list[float | None]:
        """Advances and evaluates the rows; a row that is not scored has no reward."""
        ...


class Scheduler:
    """Runs live searches in shared batches, one geometry a tick, round robin between requests."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self.live: deque[Search] = deque()

    def tick(self) -> list[Search]:
        """Runs one batch and returns the searches that are over."""
        geometry = self.live[0].geometry
        rows = self._choose([s for s in self.live if s.geometry == geometry])
        try:
            rewards = self.runner.run(rows)
        except BaseException:  # whoever keeps the exception must not keep the slots of these particles with it
            for row in rows:
                del row.particle.slot
            rows.clear()
            raise
        for row, reward in zip(rows, rewards, strict=True):
            row.search.deliver(row, reward)
        self._account(rows)
        touched = list(dict.fromkeys(row.search for row in rows))
        del rows
        for search in touched:
            search.advance()
        self.live.rotate(-1)
        over = [search for search in self.live if search.done]
        for search in over:
            self.live.remove(search)
        return over

    def _choose(self, searches: list[Search]) -> list[Row]:
        """Rows in turns, one of each search, until the largest bucket is full."""
        waiting = deque(search.ready() for search in searches)
        rows: list[Row] = []
        while waiting and len(rows) < self.runner.buckets[-1]:
            source = waiting.popleft()
            row = next(source, None)
            if row is not None:
                rows.append(row)
                waiting.append(source)
        return rows

    def _account(self, rows: list[Row]) -> None:
        """Counts executed rows; the bucket's padding is shared out in turns."""
        bucket = bucket_of(len(rows), self.runner.buckets)
        for i in range(bucket):
            rows[i % len(rows)].search.executed += 1


def bucket_of(rows: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `rows`."""
    return next(bucket for bucket in buckets if bucket >= rows)
