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
from weakref import WeakSet

from rollflow.errors import RequestError
from rollflow.methods import title
from rollflow.methods.budget import worth
from rollflow.methods.paths import shared
from rollflow.models import Geometry
from rollflow.particle import Draw, Particle, ParticlePool, Slot
from rollflow.request import Kind, Plan, Record, Step

_CHILDREN, _DRAWS = 2**20, 2**20  # how many fit into a noise key
_KINDS: tuple[Kind, Kind] = ("committed", "guided")


@dataclass(eq=False)
class Row:
    """One row of a batch: advance `parent` by `step` (or sample the prior) and evaluate the child."""

    search: Search
    step: Step
    particle: Particle
    parent: Particle | None
    scored: bool
    kind: Kind
    nfe: int = 1
    noise_key: int = 0
    prior: int | None = None  # which sample of the prior this is, counted over the request
    asked: Draw | None = None  # what the method asked for; None for a step of the finish
    place: int = 0  # of the draw among the turn's draws, or of the finalist among the finalists


class Final:
    """A finalist on its way: the particle that it has become and the steps that are left."""

    def __init__(self, particle: Particle, steps: tuple[Step, ...]):
        self.particle, self.steps, self.waiting = particle, steps, False


class Search:
    """One live request: its generator, the draws it waits for, its history and its counts."""

    def __init__(self, plan: Plan, geometry: Geometry, conditioning: Any, pool: ParticlePool):
        self.plan, self.geometry, self.conditioning, self.pool = plan, geometry, conditioning, pool
        self.method = plan.search()
        self.history: list[Record] = []
        self.best_reward = -math.inf
        self.committed = self.executed = self.turn = self.priors = self.invalid = 0
        self.start = time.perf_counter()
        self.closed = False
        self.finals: list[Final] | None = None
        self._best: list[Particle] = []  # those judged best, at most as many as there are finalists
        self._slots: WeakSet[Slot] = WeakSet()
        self._in_flight = 0
        self._begin(next(self.method))

    def _begin(self, draws: list[Draw]) -> None:
        if not isinstance(draws, list | tuple) or not draws or not all(isinstance(draw, Draw) for draw in draws):
            name = title(self.plan.request.method)
            raise RequestError(f"the method {name} yielded {draws!r}: it must yield lists of at least one Draw")
        self.draws = draws
        self.children: list[list[Particle]] = [[] for _ in draws]
        self.issued = [0] * len(draws)
        self.turn += 1

    @property
    def done(self) -> bool:
        """Whether every finalist is finished."""
        return self.finals is not None and not self._in_flight and not any(final.steps for final in self.finals)

    @property
    def chosen(self) -> Particle:
        """The finalist with the best reward, on ties the least noisy one, then the method's own; when it is done."""
        assert self.finals, "only a search that is over has chosen"
        return max((final.particle for final in self.finals), key=_rank)

    def _open(self, i: int) -> bool:
        """Whether draw `i` may still need children: its count is not reached and no child has beaten `until`."""
        draw, children = self.draws[i], self.children[i]
        return self.issued[i] < draw.count and not (children and worth(children[-1]) > draw.until)

    def ready(self, guided: bool) -> Iterator[Row]:
        """The rows that can run now, in draw order, either guided or not; taking one issues it."""
        if self.finals is not None:
            if not guided:
                yield from self._finishing()
            return
        for i, draw in enumerate(self.draws):
            sequential = draw.until != math.inf
            if (draw.guide is not None) is not guided:
                continue
            while self._open(i) and not (sequential and self.issued[i] > len(self.children[i])):
                key = (self.turn * _DRAWS + i) * _CHILDREN + self.issued[i]
                prior = None
                if draw.parent is None:
                    prior, self.priors = self.priors, self.priors + 1
                self.issued[i] += 1
                parent = cast("Particle | None", draw.parent)  # one that this scheduler handed to the method
                step, kind = self.plan.arrival(draw), _KINDS[guided]
                particle = self._particle(step, draw.arrives, parent)
                yield Row(self, step, particle, parent, draw.scored, kind, draw.nfe, key, prior, draw, i)

    def _finishing(self) -> Iterator[Row]:
        """The next step of every finalist; only what a last step leads to is judged."""
        assert self.finals is not None
        for i, final in enumerate(self.finals):
            if final.steps and not final.waiting:
                step, *left = final.steps
                final.steps, final.waiting, parent = tuple(left), True, final.particle
                level = max(parent.step + 1, len(self.plan.steps))
                yield Row(self, step, self._particle(step, level, parent), parent, not left, "finish", place=i)

    def _particle(self, step: Step, level: int, parent: Particle | None) -> Particle:
        slot = self.pool.take()
        self._slots.add(slot)
        self._in_flight += 1
        return Particle(level, step, slot, -1, None if parent is None else parent.index)

    def deliver(self, row: Row, reward: float | None) -> None:
        """Takes an evaluated row back; rows of a draw come back in the order they were issued.

        What comes back after `stop_at` has been reached is dropped: for the search it does not exist.
        """
        particle = row.particle
        self._in_flight -= 1
        if self.finals is not None and row.kind != "finish":
            return
        particle.reward, particle.index = reward, len(self.history)
        self.committed += row.nfe
        if self.committed > self.plan.request.nfe:
            raise RequestError(
                f"the method {title(self.plan.request.method)} drew more than its budget of {self.plan.request.nfe} "
                "evaluations"
            )
        self.history.append(
            Record(particle.index, particle.step, particle.time, reward, particle.parent, row.kind, row.nfe)
        )
        self.invalid += reward is not None and not math.isfinite(reward)
        self.best_reward = max(self.best_reward, worth(particle))
        if row.kind == "finish":
            assert self.finals is not None
            self.finals[row.place].particle, self.finals[row.place].waiting = particle, False
            return
        self.children[row.place].append(particle)
        if reward is not None and particle.arrival.tau <= self.plan.trusted_from + 1e-9:
            self._best = sorted([*self._best, particle], key=_rank, reverse=True)[: self.plan.finalists]
            stop_at = self.plan.request.stop_at
            if stop_at is not None and worth(particle) >= stop_at:  # it stays in the race should its finish be worse
                finish = self.plan.request.finish
                self._end([particle] * (2 if finish else 1), [finish, 0] if finish else [0])

    def advance(self) -> None:
        """Hands the particles to the method once all its draws are complete, and takes its next draws."""
        if self.finals is None and not self._in_flight and not any(self._open(i) for i in range(len(self.draws))):
            children, self.children = self.children, []
            try:
                self._begin(self.method.send(children))
            except StopIteration as stop:
                if not isinstance(stop.value, Particle):
                    name = title(self.plan.request.method)
                    raise RequestError(
                        f"the method {name} returned {stop.value!r}: it must return one of its particles"
                    ) from None
                others = [particle for particle in self._best if particle is not stop.value]
                finalists = [stop.value, *others][: self.plan.finalists]
                if not self.plan.request.finish and stop.value.reward is None:
                    finalists = [stop.value]  # it cannot be compared, and is what the method wants
                self._end(finalists, shared(self.plan.finish_nfe, len(finalists)))

    def _end(self, finalists: list[Particle], finish: list[int]) -> None:
        """Ends the search proper: each of those who compete is finished by as many evaluations as `finish` says."""
        self.finals = [
            Final(particle, self.plan.finish(particle.time, count))
            for particle, count in zip(finalists, finish, strict=True)
        ]
        self.method.close()
        self.draws, self.children, self._best = [], [], []

    def close(self) -> None:
        """Drops every particle, so that their slots are free."""
        self.method.close()
        self.closed = True
        self.finals, self.draws, self.children, self._best = [], [], [], []
        for slot in list(self._slots):  # of particles that a kept exception or the method's caller still refers to
            slot.release()


def _rank(particle: Particle) -> tuple[float, int]:
    """Better rewards first; of equal ones that of the later point of the grid, whose posterior mean is sharper."""
    return worth(particle), particle.step


@runtime_checkable
class Runner(Protocol):
    """What the scheduler needs of a runner: the rewards of a batch of rows of one geometry."""

    buckets: tuple[int, ...]

    def run(self, rows: list[Row]) -> list[float | None]:
        """Advances and evaluates the rows; a row that is not scored has no reward."""
        ...


class Scheduler:
    """Runs live searches in shared batches, one geometry a tick, round robin between requests.

    Guided rows need a backward, so that they have batches of their own, in turn with the others.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.live: deque[Search] = deque()
        self._guided: dict[Geometry, bool] = {}  # which kind of rows is next

    def tick(self) -> list[Search]:
        """Runs one batch and returns the searches that are over."""
        geometry = self.live[0].geometry
        searches = [s for s in self.live if s.geometry == geometry]
        guided = self._guided.get(geometry, False)
        rows = self._choose(searches, guided) or self._choose(searches, not guided)
        self._guided[geometry] = rows[0].kind != "guided"
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

    def _choose(self, searches: list[Search], guided: bool) -> list[Row]:
        """Rows in turns, one of each search, until the largest bucket is full."""
        waiting = deque(search.ready(guided) for search in searches)
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
            rows[i % len(rows)].search.executed += rows[0].nfe


def bucket_of(rows: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `rows`."""
    return next(bucket for bucket in buckets if bucket >= rows)
