"""Particles that are evaluated anew, in full, before a search goes on: what a cache has given does not lead further."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rollflow.row import Brief, Row
from rollflow.search.particle import Particle, Slot
from rollflow.search.turn import Flight


class Refresh:
    """The particles that a search waits for, each the same state at the same time once more.

    A particle stays what it is for its method: it is given the place of the new evaluation, and where that is judged,
    its reward.

    Args:
        brief: what rows of the search carry.
        particles: that were evaluated from a cache.
        scored: whether they are judged anew.
        then: what the search goes on with.
    """

    def __init__(self, brief: Brief, particles: Sequence[Particle], scored: bool, then: Callable[[], None]):
        self._brief, self.scored, self.then = brief, scored, then
        self.particles, self._issued = particles, 0
        self._away: dict[int, int] = {}  # places by the numbers of rows on their way
        self._back: dict[int, Flight] = {}

    def waiting(self, apart: bool) -> int:
        """How many can run now, none of them apart; see `rollflow.row.Row.apart`."""
        return 0 if apart else len(self.particles) - self._issued

    def issue(self, number: int, slot: Slot) -> tuple[Row, Flight]:
        """The next row, with that number, to a slot."""
        place, self._issued = self._issued, self._issued + 1
        particle = self.particles[place]
        self._away[number] = place
        step = replace(particle.arrival, a=1.0, b=0.0, k=0.0)
        row = Row(
            self._brief, number, 0, particle.slot.index, slot.index, step, "refresh", scored=self.scored,
            level=particle.step, origin=particle.number,
        )  # fmt: skip
        anew = Particle(particle.step, particle.arrival, slot, number=number)
        return row, Flight(row.kind, row.nfe, anew, particle, None, place, -1, None, number)

    def takes(self, flight: Flight) -> bool:
        """Whether it waits for this row."""
        return flight.number in self._away

    def deliver(self, flight: Flight) -> bool:
        """A row is back, and the place that its particle had is free; says whether it was the last."""
        place = self._away.pop(flight.number)
        particle, anew = self.particles[place], flight.particle
        self._back[place] = flight
        particle.slot.release()
        particle.slot, particle.number, particle.cached = anew.slot, anew.number, False
        if self.scored:
            particle.reward, particle.value, particle.terms = anew.reward, anew.value, anew.terms
            particle.guessed = False
        return len(self._back) == len(self.particles)

    def back(self) -> list[tuple[Particle, Flight]]:
        """The particles whose rows are back, in order."""
        return [(self.particles[place], self._back[place]) for place in sorted(self._back)]
