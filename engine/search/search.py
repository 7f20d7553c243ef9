"""One live request: its generator, the draws it waits for, its history and its counts."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from rollflow.draw import Draw
from rollflow.errors import RequestError
from rollflow.methods import title
from rollflow.methods.budget import worth
from rollflow.methods.paths import shared
from rollflow.models import Geometry
from rollflow.plan import Plan
from rollflow.profile.ledger import Ledger
from rollflow.request import Kind, Record
from rollflow.schedule.cost import NEGLIGIBLE
from rollflow.schedule.odds import Odds
from rollflow.schedule.pool import Lease, ParticlePool
from rollflow.sde import Step
from rollflow.search.particle import Particle

_CHILDREN, _DRAWS = 2**20, 2**20  # how many fit into a noise key
_KINDS: tuple[Kind, Kind] = ("committed", "guided")


@dataclass(eq=False, slots=True)
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
    turn: int = 0
    place: int = 0  # of the draw among the turn's draws, or of the finalist among the finalists
    child: int = 0  # which of the draw's children this is
    ahead: bool = False  # whether it runs before it is known to be needed
    invalid: bool = False  # whether its gradient was no finite number


class Final:
    """A finalist on its way: the particle that it has become and the steps that are left."""

    def __init__(self, particle: Particle, steps: tuple[Step, ...]):
        self.particle, self.steps, self.waiting = particle, steps, False
        self.rows: list[Row] = []  # those that led to it


class _Turn:
    """One draw of the turn: what was issued, what came back, and the children that the method will see."""

    __slots__ = ("children", "closed", "draw", "issued", "judged", "limit", "prior", "sequential")

    def __init__(self, draw: Draw, prior: int):
        self.draw, self.prior = draw, prior  # index of its first child among the request's samples of the prior
        self.issued, self.limit = 0, draw.count  # no child beyond the limit can be needed
        self.judged: dict[int, Row] = {}  # came back before an earlier child did
        self.children: list[Row] = []
        self.sequential = draw.until != math.inf
        self.closed = False  # whether it has all its children: its count is reached, or one has beaten `until`

    @property
    def unknown(self) -> int:
        """How many issued children have not come back."""
        return self.issued - len(self.children) - len(self.judged)


class Search:
    """Runs one request's method: gives rows out, takes evaluated ones back in any order, commits them in draw order.

    What a method sees, and the history, is what the strictly sequential algorithm gives, however many rows run at once
    and however far some run ahead of the answer.
    """

    def __init__(
        self,
        plan: Plan,
        geometry: Geometry,
        conditioning: Any,
        pool: ParticlePool,
        ledger: Ledger | None = None,
        odds: Odds | None = None,
    ):
        self.plan, self.geometry, self.conditioning, self.pool = plan, geometry, conditioning, pool
        self.ledger, self.odds = ledger or Ledger(), odds or Odds()
        self.title = title(plan.request.method)
        self.method = plan.search()
        self._history: list[tuple[Any, ...]] = []  # plain tuples, which cost the garbage collector nothing
        self.best_reward = -math.inf
        self.committed = self.executed = self.turn = self.priors = self.invalid = self.in_flight = 0
        self.start = time.perf_counter()
        self._ahead = 0  # rows that run ahead, whose slots are promised beyond those of the budget
        self.closed = False
        self.finals: list[Final] | None = None
        self.queued = [False, False]  # by the scheduler, for plain and for guided rows
        self._best: list[Particle] = []  # those judged best, at most as many as there are finalists
        self._lease = Lease(pool)
        self._begin(next(self.method))

    def _begin(self, draws: list[Draw]) -> None:
        if not isinstance(draws, list | tuple) or not draws or not all(isinstance(draw, Draw) for draw in draws):
            raise RequestError(f"the method {self.title} yielded {draws!r}: it must yield lists of at least one Draw")
        self.turn += 1
        self._turns: list[_Turn] = []
        self._ready: tuple[deque[int], deque[int]] = deque(), deque()  # draws with rows that can run, plain and guided
        self._waiting = [0, 0]  # how many rows those are
        self._sequential: list[int] = []
        self._recorded = (0, 0)  # draw and child that the history continues with
        prior = self.priors
        for i, draw in enumerate(draws):
            turn = _Turn(draw, prior)
            self._turns.append(turn)
            prior += draw.count if draw.parent is None else 0
            guided = draw.guide is not None
            self._ready[guided].append(i)
            self._waiting[guided] += 1 if turn.sequential else draw.count
            if turn.sequential:
                self._sequential.append(i)

    @property
    def history(self) -> list[Record]:
        """A record for each committed particle, in draw order."""
        return [Record(*values) for values in self._history]

    @property
    def done(self) -> bool:
        """Whether every finalist is finished, and no row is still on the device."""
        return self.finals is not None and not self.in_flight and not any(final.steps for final in self.finals)

    @property
    def finalists(self) -> list[Particle]:
        """Those who compete in the end, finished; when it is done."""
        assert self.finals, "only a search that is over has finalists"
        return [final.particle for final in self.finals]

    @property
    def chosen(self) -> Particle:
        """The finalist with the best reward, on ties the least noisy one, then the method's own; when it is done."""
        return max(self.finalists, key=rank)

    def waiting(self, guided: bool) -> int:
        """How many rows can run now and are needed whatever happens."""
        if self.finals is not None:
            return 0 if guided else sum(bool(final.steps) and not final.waiting for final in self.finals)
        return self._waiting[guided]

    def take(self, guided: bool) -> Row:
        """The next of the waiting rows, in draw order; taking it issues it."""
        if self.finals is not None:
            return self._finishing()
        ready = self._ready[guided]
        turn = self._turns[ready[0]]
        row = self._issue(ready[0])
        self._waiting[guided] -= 1
        if turn.sequential or turn.issued == turn.draw.count:
            ready.popleft()
        return row

    def chances(self, guided: bool) -> Iterator[tuple[float, int]]:
        """Of the rows that `take_ahead` would give, the chance that each will be needed, and its draw."""
        if self.finals is None:
            for i in self._sequential:
                turn = self._turns[i]
                if (turn.draw.guide is not None) is guided and turn.unknown:
                    failure = 1 - self.odds.success(self.title, turn.draw.arrives)
                    for ahead in range(turn.limit - turn.issued):
                        chance = failure ** (turn.unknown + ahead)
                        if chance < NEGLIGIBLE:
                            break
                        yield chance, i

    def take_ahead(self, i: int) -> Row | None:
        """The next row of draw `i`, which waits for an answer, before it is known to be needed.

        It takes a slot that nobody is promised, until it is known whether it is needed; None if there is none.
        """
        if not self.pool.reserve(1):
            return None
        self._ahead += 1
        return self._issue(i, ahead=True)

    def _settle(self, row: Row) -> None:
        """It is known whether a row is needed: if it ran ahead, its slot is promised to nobody any more."""
        if row.ahead:
            self._ahead -= 1
            self.pool.unreserve(1)

    def _issue(self, i: int, ahead: bool = False) -> Row:
        turn = self._turns[i]
        draw, child = turn.draw, turn.issued
        turn.issued += 1
        key = (self.turn * _DRAWS + i) * _CHILDREN + child
        prior = turn.prior + child if draw.parent is None else None
        parent = cast("Particle | None", draw.parent)  # one that this search handed to the method
        step, kind = self.plan.arrival(draw), _KINDS[draw.guide is not None]
        particle = self._particle(step, draw.arrives)
        return Row(
            self, step, particle, parent, draw.scored, kind, draw.nfe, key, prior, draw, self.turn, i, child, ahead
        )

    def _finishing(self) -> Row:
        """The next step of a finalist; only what a last step leads to is judged."""
        assert self.finals is not None
        i, final = next((i, f) for i, f in enumerate(self.finals) if f.steps and not f.waiting)
        step, *left = final.steps
        final.steps, final.waiting, parent = tuple(left), True, final.particle
        level = max(parent.step + 1, len(self.plan.steps))
        return Row(self, step, self._particle(step, level), parent, not left, "finish", place=i)

    def _particle(self, step: Step, level: int) -> Particle:
        self.in_flight += 1
        return Particle(level, step, self._lease.take(), -1, None)

    def deliver(self, row: Row, reward: float | None) -> None:
        """Takes an evaluated row back, and goes on as far as the rows that are back allow."""
        self.in_flight -= 1
        row.particle.reward = reward
        if row.kind == "finish":
            assert self.finals is not None
            final = self.finals[row.place]
            final.rows.append(row)
            final.particle, final.waiting = row.particle, False
            if all(not final.steps and not final.waiting for final in self.finals):
                for final in self.finals:  # finalist after finalist, whichever came first
                    for finished in final.rows:
                        self._record(finished)
        elif self.finals is not None or row.turn != self.turn or self._turns[row.place].closed:
            self._drop(row)
        else:
            self._commit(row)
            self._record_all()
            if self.finals is None and self._recorded[0] == len(self._turns):
                self._advance()

    def _commit(self, row: Row) -> None:
        """Adds to a draw's children what is back without a gap; what lies beyond the first success never existed."""
        turn = self._turns[row.place]
        turn.judged[row.child] = row
        if turn.sequential and worth(row.particle) > turn.draw.until:
            turn.limit = min(turn.limit, row.child + 1)
        while not turn.closed and (following := turn.judged.pop(len(turn.children), None)) is not None:
            self._settle(following)
            turn.children.append(following)
            success = turn.sequential and worth(following.particle) > turn.draw.until
            turn.closed = success or len(turn.children) == turn.draw.count
            if turn.sequential:
                self.odds.observe(self.title, following.particle.step, success)
        if turn.closed:
            for unneeded in turn.judged.values():
                self._drop(unneeded)
            turn.judged.clear()
        elif turn.sequential and turn.issued == len(turn.children):
            guided = turn.draw.guide is not None
            self._ready[guided].append(row.place)
            self._waiting[guided] += 1

    def _record_all(self) -> None:
        """Writes the history in draw order, as far as it is known."""
        i, child = self._recorded
        while self.finals is None and i < len(self._turns):
            turn = self._turns[i]
            while self.finals is None and child < len(turn.children):
                self._recorded = (i, child + 1)
                self._record(turn.children[child])
                child += 1
            if not turn.closed:
                break
            i, child = self._recorded = (i + 1, 0)

    def _record(self, row: Row) -> None:
        particle, reward = row.particle, row.particle.reward
        particle.index = len(self._history)
        particle.parent = None if row.parent is None else row.parent.index
        self.committed += row.nfe
        if self.committed > self.plan.request.nfe:
            raise RequestError(
                f"the method {self.title} drew more than its budget of {self.plan.request.nfe} evaluations"
            )
        self._history.append((particle.index, particle.step, particle.time, reward, particle.parent, row.kind, row.nfe))
        self.invalid += row.invalid or (reward is not None and not math.isfinite(reward))
        self.best_reward = max(self.best_reward, worth(particle))
        if row.prior is not None:
            self.priors = max(self.priors, row.prior + 1)
        if row.kind != "finish" and reward is not None and particle.arrival.tau <= self.plan.trusted_from + 1e-9:
            self._best = sorted([*self._best, particle], key=rank, reverse=True)[: self.plan.finalists]
            stop_at = self.plan.request.stop_at
            if stop_at is not None and worth(particle) >= stop_at:  # it stays in the race should its finish be worse
                finish = self.plan.request.finish
                self._end([particle] * (2 if finish else 1), [finish, 0] if finish else [0])

    def _drop(self, row: Row) -> None:
        """Counts a row that ran and, for the search, does not exist; its slot is free."""
        self.ledger.wasted(row.kind)
        row.particle.slot.release()
        self._settle(row)

    def _advance(self) -> None:
        """Hands the particles to the method, all its draws being complete, and takes its next draws."""
        children = [[row.particle for row in turn.children] for turn in self._turns]
        self._turns, self._sequential = [], []
        try:
            self._begin(self.method.send(children))
        except StopIteration as stop:
            if not isinstance(stop.value, Particle):
                raise RequestError(
                    f"the method {self.title} returned {stop.value!r}: it must return one of its particles"
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
        for turn in self._turns:
            for row in turn.judged.values():
                self._drop(row)
            for row in turn.children:
                if row.particle.index < 0:
                    self.ledger.wasted(row.kind)
        self._turns, self._sequential, self._best = [], [], []
        self._waiting, self._ready = [0, 0], (deque(), deque())

    def close(self) -> None:
        """Drops every particle, so that their slots are free. None of its rows may be on the device."""
        self.method.close()
        self.closed = True
        self.finals, self._turns, self._sequential, self._best = [], [], [], []
        self.pool.unreserve(self._ahead)
        self._ahead = 0
        self._lease.close()  # also of particles that a kept exception or the method's caller still refers to


def rank(particle: Particle) -> tuple[float, int]:
    """Better rewards first; of equal ones that of the later point of the grid, whose posterior mean is sharper."""
    return worth(particle), particle.step
