"""A search goes on that was begun elsewhere: what it had evaluated is taken from its scores, and only states that still
matter are made again.

Its method is driven with the recorded scores as fast as it can yield. The particles that it then still holds have no
state yet: their places are `Absent`, and know how they were evaluated. `Restoring` evaluates those again, and of their
ancestors those that lead to them; noise is a function of seed and key, so that the states are what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import ref

from rollflow.errors import RollflowError
from rollflow.row import NONE, Mixture, Row
from rollflow.search.particle import Lease, Particle, Slot
from rollflow.search.turn import Flight


class Unfit(RollflowError):
    """Recorded scores are not of this search; it has to begin anew."""


class Absent:
    """The place of a particle whose state is not there: the row that made it, and the places of what it came from."""

    __slots__ = ("parents", "released", "row")
    index = NONE

    def __init__(self) -> None:
        self.row: Row | None = None
        self.parents: tuple[Absent, ...] = ()
        self.released = False

    def made_by(self, row: Row, parents: Sequence[Particle]) -> None:
        """The row, as it was issued, and the particles that it started from."""
        self.row, self.parents = row, tuple(p.slot for p in parents if isinstance(p.slot, Absent))

    def in_full(self) -> None:
        """It was evaluated anew, in full, and not from a cache: the same state, which needs that evaluation alone."""
        assert self.row is not None
        self.row = self.row._replace(cached=False)

    def release(self) -> None:
        """Nobody will draw from it any more."""
        self.released = True

    def pin(self) -> Callable[[], None]:
        """There is nothing to keep."""
        return _nothing


class Restoring:
    """The evaluations that a search waits for before it goes on, each of a particle that it had evaluated before.

    They run in the order in which they did then, each as soon as what it starts from is there; the state of one that is
    only an ancestor goes when its last child is there.

    Args:
        particles: those whose states are needed.

    Attributes:
        slots: how many slots that takes at once, at most, where they run one by one.
        left: how many evaluations are still to come back.
    """

    def __init__(self, particles: Sequence[Particle]):
        self._whose: dict[Absent, list[ref[Particle]]] = {}
        for particle in particles:
            if isinstance(particle.slot, Absent):
                self._whose.setdefault(particle.slot, []).append(ref(particle))
        self._order = _ancestry(self._whose)
        self._uses = dict.fromkeys(self._order, 0)
        for node in self._order:
            for parent in dict.fromkeys(node.parents):
                self._uses[parent] += 1
        self.slots, self.left = self._most(), len(self._order)
        self._places: dict[Absent, Slot] = {}  # of those that are there
        self._away: dict[int, Absent] = {}  # by the numbers of rows on their way
        self._numbers: dict[Absent, int] = {}
        self._next = 0

    def waiting(self, apart: bool) -> int:
        """How many can run now, of those that run apart or of the others; see `rollflow.row.Row.apart`."""
        count = 0
        for i in range(self._next, len(self._order)):
            node = self._order[i]
            assert node.row is not None
            if node.row.apart is not apart or any(parent not in self._places for parent in node.parents):
                break
            count += 1
        return count

    def issue(self, number: int, slot: Slot) -> tuple[Row, Flight]:
        """The next row, with that number, to a slot; a guided one is judged again, for its gradient."""
        node = self._order[self._next]
        self._next += 1
        self._away[number], self._numbers[node] = node, number
        row, places = node.row, [self._places[parent].index for parent in node.parents]
        assert row is not None
        mixture = None if row.mixture is None else Mixture(tuple(places[1:]), row.mixture.coarse)
        row = row._replace(
            number=number, slot=slot.index, parent=places[0] if places else NONE, mixture=mixture,
            scored=row.guide is not None, ahead=False, limit=None,
            origin=self._numbers[node.parents[0]] if node.parents else NONE,
        )  # fmt: skip
        anew = Particle(row.level, row.step, slot, number=number)
        return row, Flight(row.kind, row.nfe, anew, None, None, -1, -1, None, number)

    def takes(self, flight: Flight) -> bool:
        """Whether it waits for this row."""
        return flight.number in self._away

    def deliver(self, flight: Flight) -> bool:
        """A state is there again; says whether it was the last."""
        node, slot = self._away.pop(flight.number), flight.particle.slot
        self._places[node] = slot
        self.left -= 1
        for whose in self._whose.get(node, ()):
            if (particle := whose()) is not None:
                particle.slot, particle.number = slot, flight.number
        for one in (*dict.fromkeys(node.parents), node):
            if one is not node:
                self._uses[one] -= 1
            if not self._uses[one] and one not in self._whose:
                self._places[one].release()
        return not self.left

    def _most(self) -> int:
        held = most = 0
        uses = dict(self._uses)
        for node in self._order:
            held += 1
            most = max(most, held)
            for parent in dict.fromkeys(node.parents):
                uses[parent] -= 1
                held -= not uses[parent] and parent not in self._whose
        return most


def room(lease: Lease, restoring: Restoring) -> None:
    """Makes sure that it can take its slots.

    Raises:
        Unfit: too many are promised to others; a search that begins anew needs fewer.
    """
    if not lease.extend(restoring.slots):
        raise Unfit(f"{restoring.slots} slots at once are not to be had")


def _ancestry(nodes: Sequence[Absent] | dict[Absent, list[ref[Particle]]]) -> list[Absent]:
    """They and all that they came from, in the order of their rows."""
    found: dict[Absent, None] = {}
    left = [*nodes]
    while left:
        node = left.pop()
        if node not in found:
            found[node] = None
            left += node.parents
    return sorted(found, key=_number)


def _number(node: Absent) -> int:
    assert node.row is not None
    return node.row.number


def _nothing() -> None:
    pass
