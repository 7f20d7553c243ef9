"""Which lane each batch is on: lanes are numbered by how many batches are on the device at a time."""

from __future__ import annotations

import math


class Visits:
    """Batches on lanes. The caller sees to it that one thread at a time is in here."""

    def __init__(self) -> None:
        self._on: list[int | None] = []  # by lane: the batch
        self._left: list[float] = []  # when each was free

    def enter(self, batch: int) -> tuple[int, float] | None:
        """Takes the first lane that is free; returns it and when it was left, NaN of a lane's first.

        None for a batch that has a lane: of one that runs in parts, each part enters.
        """
        if batch in self._on:
            return None
        if None not in self._on:
            self._on.append(None)
            self._left.append(math.nan)
        lane = self._on.index(None)
        self._on[lane] = batch
        return lane, self._left[lane]

    def leave(self, batch: int, now: float) -> bool:
        """A batch's lane is free again; False for a batch that has none."""
        if batch not in self._on:
            return False
        lane = self._on.index(batch)
        self._on[lane], self._left[lane] = None, now
        return True
