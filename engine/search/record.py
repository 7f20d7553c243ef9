"""What a search has done so far: a record for each committed particle, and the counts that callers may follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rollflow.entries import Entry
from rollflow.request import Record
from rollflow.row import Kind
from rollflow.search.particle import Particle


class History:
    """The committed particles of one search in draw order, and what they add up to.

    Other threads may read the counts at any time: each is one number or reference.

    Args:
        labels: of the terms of a combined reward.

    Attributes:
        committed: evaluations that the algorithm was charged for.
        cached: those of them that were evaluated from a cache.
        executed: what the device ran for this search, its share of padding included.
        best: the best reward so far; minus infinity before the first.
        level: the point of the grid of the last particle.
        invalid: particles whose reward or gradient was no finite number.
        unguided: the indices of those whose gradient was none.
        scales: mean and deviation of each normalised term of the reward, once they are known.
        stopped: what ended the search proper, if it is over.
        resumed: how many of its evaluations were another process's, see `rollflow.search.replay`.
        notes: what the method noted, in order; see `rollflow.draw.Note`.
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = labels
        self._rows: list[tuple[Any, ...]] = []  # plain tuples, which cost the garbage collector nothing
        self._terms: list[tuple[float, ...] | None] = []
        self.committed = self.cached = self.executed = self.level = self.invalid = 0
        self.resumed, self.unguided, self.stopped = 0, set[int](), ""
        self.scales: tuple[tuple[float, float], ...] = ()
        self.best = -math.inf
        self.notes: list[Mapping[str, Any]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def records(self) -> list[Record]:
        """A record for each committed particle, in draw order."""
        records = [Record(*row) for row in self._rows]
        if not self.labels:
            return records
        return [replace(one, terms=self.named(terms)) for one, terms in zip(records, self._terms, strict=False)]

    def entries(self, start: int = 0) -> tuple[Entry, ...]:
        """What has to be kept of its evaluations from an index on; of any thread.

        The scores are as the reward gave them. A last step of a finish may get the reward of its image later.
        """
        count = len(self._rows)  # a row's terms are there before it is
        scores = self._terms if self.labels else None
        return tuple(
            Entry(row[5], row[1], row[3] if scores is None else scores[start + i], start + i in self.unguided)
            for i, row in enumerate(self._rows[start:count])
        )

    def named(self, terms: Sequence[float] | None) -> Mapping[str, float] | None:
        """The scores of terms by their labels."""
        return None if terms is None else dict(zip(self.labels, terms, strict=True))

    def add(
        self, particle: Particle, parent: Particle | None, kind: Kind, nfe: int, invalid: bool, scored: bool = True
    ) -> None:
        """Commits a particle: from now on it has an index, or where it was evaluated anew another one.

        Args:
            particle: what was evaluated.
            parent: what it came from.
            kind, nfe: of its row.
            invalid: whether a gradient was no finite number.
            scored: whether its reward is of this evaluation.
        """
        before, particle.index = particle.index, len(self._rows)
        if invalid:
            self.unguided.add(particle.index)
        particle.parent = before if kind == "refresh" else None if parent is None else parent.index
        reward = particle.reward if scored else None
        if self.labels:
            self._terms.append(particle.terms if scored else None)
        self.cached += nfe if particle.cached else 0
        own = particle.index, particle.step, particle.time, reward, particle.parent, kind, nfe
        self._rows.append((*own, None, particle.cached))
        self.committed += nfe
        self.level = particle.step
        self.invalid += invalid or (reward is not None and not math.isfinite(reward))
        self.best = max(self.best, particle.value)

    def rewards(self, start: int = 0) -> list[tuple[int, int, float | None]]:
        """Of each record from an index on its NFE, its level and its reward; of any thread."""
        return [(row[6], row[1], row[3]) for row in self._rows[start:]]

    def judge(self, index: int, reward: float, terms: Sequence[float] | None) -> None:
        """A committed particle that was not judged has a reward after all: its image's."""
        before = self._rows[index]
        self._rows[index] = (*before[:3], reward, *before[4:])
        if self.labels:
            self._terms[index] = None if terms is None else (*terms,)
        if math.isfinite(reward):
            self.best = max(self.best, reward)
        else:
            self.invalid += 1
