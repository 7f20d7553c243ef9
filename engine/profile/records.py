"""What the ledger keeps of rows and batches: structured arrays in rings, without a reference to a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

KINDS = ("committed", "guided", "finish", "padding")  # why a row ran
STATES = ("open", "kept", "dropped")  # dropped: it ran ahead of an answer, or its request ended, before it was needed
STAGES = ("propose", "forward", "finish", "backward", "decode", "reward")
WORK = ("rows", "guided", "images")  # what a batch evaluates, or of which searches it makes the images

ROW = np.dtype(
    [
        ("batch", "i8"),  # its batch's number
        ("request", "i8"),  # the request's number, -1 of padding
        ("number", "i4"),  # which of the request's rows
        ("time", "f4"),  # the interpolant's time
        ("kind", "u1"),  # of KINDS
        ("nfe", "u1"),  # what it is charged
        ("ahead", "?"),  # whether it ran before it was known to be needed
        ("state", "u1"),  # of STATES
        ("reward", "f4"),  # NaN where it was not judged
    ]
)
BATCH = np.dtype(
    [
        ("batch", "i8"),
        ("lane", "i2"),
        ("work", "u1"),  # of WORK
        ("height", "i4"),
        ("width", "i4"),
        ("frames", "i4"),  # 0 of images
        ("rows", "i4"),  # or images
        ("bucket", "i4"),  # rows, padding included
        ("network_rows", "i4"),
        ("submitted", "f8"),  # seconds of the ledger's clock, as all of these
        ("started", "f8"),
        ("ended", "f8"),  # when its lane was free again
        *((f"{stage}_started", "f8") for stage in STAGES),
        *((f"{stage}_ended", "f8") for stage in STAGES),
        *((f"{stage}_seconds", "f8") for stage in STAGES),  # of threads, several calls added up
    ]
)
FRESH = {"f": np.nan, "i": -1, "u": 0, "b": False}  # what a field holds before it is written, by its kind
NAMES = {"kind": KINDS, "state": STATES, "work": WORK}  # what the numbers of a field stand for


class Ring:
    """The latest entries of a structured array, by serial numbers that count from 0 and never repeat.

    Args:
        kind: of an entry.
        capacity: how many are kept.
    """

    def __init__(self, kind: np.dtype, capacity: int):
        self._array = np.zeros(capacity, kind)
        self.fresh = np.zeros((), kind)
        for name in kind.names or ():
            self.fresh[name] = FRESH[kind[name].kind]
        self.capacity, self.count = capacity, 0

    def add(self, entries: np.ndarray) -> int:
        """Takes new entries in; returns the serial number of the first. Of more than it holds, the last are kept."""
        first, many = self.count, len(entries)
        self.count += many
        if many > self.capacity:
            entries, many = entries[-self.capacity :], self.capacity
        start = (self.count - many) % self.capacity
        fits = min(many, self.capacity - start)
        self._array[start : start + fits] = entries[:fits]
        self._array[: many - fits] = entries[fits:]
        return first

    def __getitem__(self, serial: int) -> Any:
        """An entry, to be read or written in place; None where it is no longer kept."""
        place = self.place(serial)
        return None if place is None else self._array[place]

    def place(self, serial: int) -> int | None:
        """Where an entry lies in `column`; None where it is no longer kept."""
        return serial % self.capacity if max(0, self.count - self.capacity) <= serial < self.count else None

    def column(self, name: str) -> np.ndarray:
        """A field of all entries, to be read or written in place."""
        return self._array[name]

    @property
    def dropped(self) -> int:
        """Entries that are no longer kept."""
        return max(0, self.count - self.capacity)

    def copy(self) -> np.ndarray:
        """The entries that are kept, oldest first."""
        if self.count <= self.capacity:
            return self._array[: self.count].copy()
        start = self.count % self.capacity
        return np.concatenate([self._array[start:], self._array[:start]])
