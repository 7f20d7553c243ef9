"""One turn of a search: the draws that its method yielded, which of their rows are out, and which are decided.

Rows come back in any order and are committed in draw order. A draw with `until` is strictly sequential for the method;
its later rows may run ahead of the answer, and what lies beyond the first success is dropped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from heapq import heappush, heapreplace
from typing import NamedTuple

from rollflow.draw import Draw
from rollflow.row import Kind, Limit
from rollflow.sde import Step
from rollflow.search.particle import Particle


class Flight(NamedTuple):
    """A row on its way: the particle that it makes, its parent, and its place in the turn.

    `prior` says which of the request's samples of the prior it is; `draw` and `child` are its place in the turn, or of
    a step of the finish the finalist's number and -1. `turn` is None for a step of the finish. `kind`, `nfe` and
    `number` are the row's; the row itself is gone when the device is done with it. `error` says why it was not
    evaluated.
    """

    kind: Kind
    nfe: int
    particle: Particle
    parent: Particle | None
    turn: Turn | None
    draw: int
    child: int
    prior: int | None
    number: int
    invalid: bool = False
    error: BaseException | None = None


class Asked:
    """One draw of a turn: what was issued, what came back, and the children that the method will see."""

    __slots__ = (
        "apart", "best", "cached", "children", "closed", "draw", "guided", "issued", "judged", "known", "limit",
        "prior", "reach", "sequential", "step",
    )  # fmt: skip

    def __init__(self, draw: Draw, prior: int, step: Step, reach: float, cached: bool = False):
        self.draw, self.prior = draw, prior  # index of its first child among the request's samples of the prior
        self.step, self.reach = step, reach
        self.issued, self.limit = 0, Limit(draw.count)  # no child beyond the limit can be needed
        self.judged: dict[int, Flight] = {}  # came back before an earlier child did
        self.known = deque[Flight]()  # came back without a gap, and are not recorded yet
        self.children: list[Particle] = []  # of those and of the recorded ones
        self.sequential, self.guided, self.cached = draw.until != math.inf, draw.guide is not None, cached
        self.apart = self.guided or cached  # see `rollflow.row.Row.apart`
        self.closed = False  # whether it has all its children: its count is reached, or one has beaten `until`
        self.best: list[tuple[float, int, Particle]] = []  # a heap of those that the method will keep, the worst first

    @property
    def unknown(self) -> int:
        """How many issued children have not come back."""
        return self.issued - len(self.children) - len(self.judged)

    def dismissed(self, particle: Particle) -> Particle | None:
        """The child that the method will not keep, now that it has one more; None if it may keep all so far."""
        keep = self.draw.keep
        if keep is None:
            return None
        best = self.best
        if len(best) < keep:
            heappush(best, (particle.value, -particle.index, particle))  # of equal ones the last drawn goes first
            return None
        if (value := particle.value) <= best[0][0]:
            return particle
        return heapreplace(best, (value, -particle.index, particle))[2]


class Turn:
    """The draws that a method waits for.

    Args:
        draws: what it yielded, with the coefficients of the way there, of guided ones their reach, and whether their
            children are evaluated from a cache.
        number: which turn of the search this is; it is part of the noise keys.
        prior: how many samples of the prior were drawn before.

    Attributes:
        draws: in order.
        sequential: the places of those that wait for answers one by one.
        waiting: how many rows can run now and are needed whatever happens, plain ones and those
            that run apart, see `rollflow.row.Row.apart`.
    """

    def __init__(self, draws: Sequence[tuple[Draw, Step, float, bool]], number: int, prior: int):
        self.number, self.draws = number, list[Asked]()
        self._ready: tuple[deque[int], deque[int]] = deque(), deque()  # draws with rows that can run, plain and apart
        self.waiting = [0, 0]
        self.sequential: list[int] = []
        self._recorded = 0  # the draw that the history continues with
        for i, (draw, step, reach, cached) in enumerate(draws):
            asked = Asked(draw, prior, step, reach, cached)
            self.draws.append(asked)
            prior += draw.count if draw.parent is None else 0
            self._ready[asked.apart].append(i)
            self.waiting[asked.apart] += 1 if asked.sequential else draw.count
            if asked.sequential:
                self.sequential.append(i)

    @property
    def complete(self) -> bool:
        """Whether every draw has all its children, and all are recorded."""
        return self._recorded == len(self.draws)

    def next(self, apart: bool) -> tuple[int, int]:
        """Draw and child of the next of the waiting rows, in draw order; it counts as issued."""
        ready = self._ready[apart]
        i = ready[0]
        asked = self.draws[i]
        self.waiting[apart] -= 1
        if asked.sequential or asked.issued + 1 == asked.draw.count:
            ready.popleft()
        return i, self.ahead(i)

    def following(self) -> tuple[int, int]:
        """Draw and child of the row that the history continues with, wherever it stands in line; it counts as issued.

        Nothing may be on its way.
        """
        i = self._recorded
        asked = self.draws[i]
        self.waiting[asked.apart] -= 1
        if asked.sequential or asked.issued + 1 == asked.draw.count:
            self._ready[asked.apart].remove(i)
        return i, self.ahead(i)

    def ahead(self, i: int) -> int:
        """The next child of draw `i`, which counts as issued."""
        asked = self.draws[i]
        asked.issued += 1
        return asked.issued - 1

    def has_open(self, apart: bool) -> bool:
        """Whether there are any such draws as `open` gives."""
        for i in self.sequential:
            asked = self.draws[i]
            if asked.apart is apart and asked.issued < asked.limit.children and asked.unknown:
                return True
        return False

    def open(self, apart: bool) -> Iterator[tuple[int, Asked]]:
        """The sequential draws that wait for an answer and of which further rows could run ahead of it."""
        for i in self.sequential:
            asked = self.draws[i]
            if asked.apart is apart and asked.unknown and asked.issued < asked.limit.children:
                yield i, asked

    def commit(self, flight: Flight) -> tuple[list[Flight], list[Flight]]:
        """Adds to a draw's children what is back without a gap.

        Returns:
            The rows that are now known to be needed, and those known not to be.
        """
        asked = self.draws[flight.draw]
        asked.judged[flight.child] = flight
        if asked.sequential and flight.particle.value > asked.draw.until:
            asked.limit.children = min(asked.limit.children, flight.child + 1)
        needed: list[Flight] = []
        while not asked.closed and (following := asked.judged.pop(len(asked.children), None)) is not None:
            asked.children.append(following.particle)
            needed.append(following)
            success = asked.sequential and following.particle.value > asked.draw.until
            asked.closed = success or len(asked.children) == asked.draw.count
        asked.known.extend(needed)
        unneeded: list[Flight] = []
        if asked.closed:
            unneeded = [*asked.judged.values()]
            asked.judged.clear()
        elif asked.sequential and asked.issued == len(asked.children):
            self._ready[asked.apart].append(flight.draw)
            self.waiting[asked.apart] += 1
        return needed, unneeded

    def recordable(self) -> Iterator[Flight]:
        """The children that are known, in draw order, from where the history ends."""
        while self._recorded < len(self.draws):
            asked = self.draws[self._recorded]
            while asked.known:
                yield asked.known.popleft()
            if not asked.closed:
                return
            self._recorded += 1

    def children(self) -> list[list[Particle]]:
        """What the method is sent."""
        return [asked.children for asked in self.draws]

    def leftover(self) -> Iterator[Flight]:
        """Rows that are back and will not be recorded, should the search end here."""
        for asked in self.draws:
            yield from asked.judged.values()
            yield from asked.known

    def close(self) -> None:
        """Lets go of every particle. Rows of it that are still on their way refer to the turn, and they to it; none of
        them is needed.
        """
        for asked in self.draws:
            asked.limit.children = 0
        self.draws.clear()
