"""Rewards of particles that nobody evaluates: drawn from those that were recorded.

A child's reward is its parent's and a difference that was seen at the same point of the grid with the same method, so
that good particles have good children; a sample of the prior has one that was seen at the start.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from rollflow.profile.recording import Recording

Kind = tuple[str, str]  # method and reward


class Scores:
    """Rewards as they were recorded.

    Args:
        recording: what ran.
    """

    def __init__(self, recording: Recording):
        self._first: defaultdict[Hashable, list[float]] = defaultdict(list)
        self._steps: defaultdict[Hashable, list[float]] = defaultdict(list)
        kinds = {number: (spec["method"], spec["reward"]) for number, spec in recording.specs.items()}
        rows = recording.rows
        judged = rows[np.isfinite(rows["reward"]) & (rows["number"] >= 0)]
        known = {(int(row["request"]), int(row["number"])): float(row["reward"]) for row in judged}
        for row in judged:
            kind = kinds.get(int(row["request"]))
            parent = known.get((int(row["request"]), int(row["origin"])))
            of, value = (
                (self._first, float(row["reward"])) if parent is None else (self._steps, float(row["reward"]) - parent)
            )
            for key in ((kind, int(row["level"])), kind, int(row["level"]), None):
                of[key].append(value)

    def of(self, kind: Kind, level: int, parent: float | None, identity: Hashable) -> float:
        """The reward of a particle: the same for the same identity."""
        found = self._nearest(self._first if parent is None else self._steps, kind, level)
        if not found:
            return 0.0 if parent is None else parent
        dice = random.Random(repr(identity))
        drawn = found[dice.randrange(len(found))]
        return drawn if parent is None else parent + drawn

    def _nearest(self, of: Mapping[Hashable, list[float]], kind: Any, level: int) -> list[float]:
        for key in ((kind, level), kind, level, None):
            if found := of.get(key):
                return found
        return []
