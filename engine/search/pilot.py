"""What normalised terms of a reward are normalised by: the request's first judged particles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rollflow.draw import Draw
from rollflow.errors import RequestError
from rollflow.plan import PILOT
from rollflow.rewards import Combined
from rollflow.rewards.combined import UNSCALED, Scale
from rollflow.row import Score
from rollflow.search.turn import Flight


class Pilot:
    """Mean and deviation of each term in a `z`, of the first particles of the first turn that is judged.

    They stay as they are for the rest of the request: rewards of different turns must compare. Which particles count
    depends on the order of draws alone, not on the order in which they come back. Until all of them are back, what
    comes back waits.

    Args:
        reward: the combined reward.

    Attributes:
        scales: of each normalised term; those of no normalisation until they are known.
        known: whether they are, or there is nothing to normalise.
    """

    def __init__(self, reward: Combined):
        self._reward = reward
        self.scales: tuple[Scale, ...] = (UNSCALED,) * len(reward.normalised)
        self.known = not reward.normalised
        self._missing: set[tuple[int, int]] = set()  # draw and child of those that are not back
        self._members: frozenset[tuple[int, int]] = frozenset()
        self._waiting: list[tuple[Flight, Score | None]] = []
        self._given: tuple[Scale, ...] | None = None

    def begin(self, draws: Sequence[Draw], title: str) -> None:
        """A turn begins: if it is the first that is judged, its first particles are the pilot.

        Of a draw with `until`, whose children come one by one, it is the first child.

        Raises:
            RequestError: there is only one.
        """
        if self.known or self._members:
            return
        counts = [0 if not draw.scored else draw.count if draw.until == math.inf else 1 for draw in draws]
        places = [(i, child) for i, count in enumerate(counts) for child in range(min(count, PILOT))][:PILOT]
        if len(places) == 1:
            raise RequestError(
                f"the reward {self._reward.name} normalises by the particles that a method judges first, and "
                f"{title} judges one alone: leave z(...) out, or take a method or an option that starts with more"
            )
        self._members = frozenset(places)
        self._missing = {*places}
        self._take_given()

    def given(self, scales: Sequence[Scale]) -> bool:
        """They are those of a search that is resumed: known when its pilot begins. False where they are not as many."""
        self._given = tuple(scales)
        self._take_given()
        return len(self._given) == len(self.scales)

    def _take_given(self) -> None:
        if self._given is not None and self._members:
            self.known, self.scales, self._missing = True, self._given, set()

    def take(self, flight: Flight, score: Score | None) -> list[tuple[Flight, Score | None]]:
        """One more is back; returns those that need wait no longer."""
        if self.known or not self._members:
            return [(flight, score)]
        self._waiting.append((flight, score))
        self._missing.discard((flight.draw, flight.child))
        if self._missing:
            return []
        self.known = True
        pilot = [
            score
            for flight, score in sorted(self._waiting, key=lambda one: (one[0].draw, one[0].child))
            if (flight.draw, flight.child) in self._members and isinstance(score, tuple)
        ]
        self.scales = tuple(_scale([score[place] for score in pilot]) for place in self._reward.normalised)
        return self.let_go()

    @property
    def named(self) -> dict[str, Scale]:
        """Mean and deviation by the label of the term."""
        labels = [self._reward.labels[place] for place in self._reward.normalised]
        return dict(zip(labels, self.scales, strict=True))

    def let_go(self) -> list[tuple[Flight, Score | None]]:
        """Those that wait; they do no longer."""
        waiting, self._waiting = self._waiting, []
        return waiting


def _scale(values: Sequence[float]) -> Scale:
    """Mean and standard deviation of the finite ones; a deviation of 0 is 1: such a term tells nothing apart."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if len(finite) < 2:
        return float(finite.sum()), 1.0
    with np.errstate(over="ignore"):
        mean, deviation = float(finite.mean()), float(finite.std(ddof=1))
    usable = math.isfinite(mean) and math.isfinite(deviation) and deviation > 0
    return (mean, deviation) if usable else (float(finite[0]), 1.0)
