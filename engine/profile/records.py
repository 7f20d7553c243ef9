"""What the ledger keeps of rows, batches, calls of rewards and requests: structured arrays in rings, without a
reference to a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

# Why a row ran; an image is that of a finished search, a refresh an evaluation in full of what a cache gave before.
KINDS = ("committed", "guided", "finish", "padding", "image", "refresh")
STATES = ("open", "kept", "dropped")  # dropped: it ran ahead of an answer, or its request ended, before it was needed
LANE_STAGES = ("propose", "forward", "finish", "backward", "decode")  # what a lane does of a batch
STAGES = (*LANE_STAGES, "reward", "decide")  # decide: rows are taken back, on the loop's thread
DEVICE_STAGES = ("forward", "backward", "decode", "reward")  # whose time on CUDA is the device's
WORK = (
    "rows",
    "guided",
    "images",
    "encode",
    "measure",
    "start",
    "peek",
    "other",
)  # what a batch is; from "encode" on chores
CHORES = WORK[3:]
FATES = ("queued", "running", "done", "cancelled", "failed")

ROW = np.dtype(
    [
        ("batch", "i8"),  # its batch's number
        ("request", "i8"),  # the request's number; of padding whom it is charged to
        ("number", "i4"),  # which of the request's rows; -1 of padding and images
        ("origin", "i4"),  # the row that made its parent; -1 of samples of the prior
        ("level", "i2"),  # its point of the time grid; steps of a finish count on
        ("time", "f4"),  # the interpolant's time
        ("kind", "u1"),  # of KINDS
        ("nfe", "u1"),  # what it is charged; 0 of images
        ("ahead", "?"),  # whether it ran before it was known to be needed
        ("scored", "?"),  # whether it is decoded and judged
        ("cached", "?"),  # whether it was evaluated from a cache
        ("state", "u1"),  # of STATES
        ("reward", "f8"),  # NaN where it was not judged
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
        ("judged", "i4"),  # rows that are decoded and judged
        ("network_rows", "i4"),
        ("chosen", "f8"),  # when the scheduler began to choose it; seconds of the ledger's clock, as all of these
        ("submitted", "f8"),
        ("started", "f8"),
        ("ended", "f8"),  # when its lane was free again
        ("host", "f8"),  # seconds of the lane outside of its stages; on CUDA it waits for the device, too
        ("idle", "f8"),  # seconds that the lane had nothing to do before it; NaN of a lane's first
        *((f"{stage}_started", "f8") for stage in STAGES),
        *((f"{stage}_ended", "f8") for stage in STAGES),
        *((f"{stage}_seconds", "f8") for stage in STAGES),  # of threads, several calls added up
        *((f"{stage}_device_started", "f8") for stage in DEVICE_STAGES),  # by CUDA events; NaN elsewhere
        *((f"{stage}_device_seconds", "f8") for stage in DEVICE_STAGES),
    ]
)
CALL = np.dtype(
    [
        ("batch", "i8"),
        ("reward", "U64"),  # one term's title
        ("images", "i4"),
        ("thread", "i2"),  # which of the threads that judge
        ("failed", "?"),
        ("started", "f8"),
        ("ended", "f8"),
        ("cpu", "f8"),  # seconds of a core that its thread used; next to nothing where it waits for something
    ]
)
REQUEST = np.dtype(
    [
        ("request", "i8"),
        ("prompt", "U80"),
        ("method", "U24"),
        ("reward", "U64"),
        ("nfe", "i4"),  # the budget
        ("priority", "i8"),
        ("height", "i4"),
        ("width", "i4"),
        ("frames", "i4"),
        ("state", "u1"),  # of FATES
        ("stopped", "U12"),  # as `rollflow.Result.stopped`
        ("submitted", "f8"),
        ("started", "f8"),  # when it was let in
        ("searched", "f8"),  # when its search was over
        ("ended", "f8"),  # when its fate was told
        ("committed", "i8"),
        ("executed", "i8"),
        ("score", "f8"),  # the reward of its image
        ("held_out", "f8"),
    ]
)
TABLES = {"rows": ROW, "batches": BATCH, "calls": CALL, "requests": REQUEST}
PAGE = 4096  # bytes that the system gives at a time, at least
CAPACITY = {"rows": 2**18, "batches": 2**15, "calls": 2**15, "requests": 2**13}  # 11, 10, 9 and 6 MiB when full
FRESH = {"f": np.nan, "i": -1, "u": 0, "b": False, "U": ""}  # what a field holds before it is written, by its kind
NAMES: dict[str, dict[str, tuple[str, ...]]] = {  # what the numbers of a field stand for, by the table
    "rows": {"kind": KINDS, "state": STATES},
    "batches": {"work": WORK},
    "calls": {},
    "requests": {"state": FATES},
}


class Ring:
    """The latest entries of a structured array, by serial numbers that count from 0 and never repeat.

    Args:
        kind: of an entry.
        capacity: how many are kept.

    Attributes:
        fresh: what an entry holds before it is written.
        columns: by field the values of all entries, to be read or written in place, see `place`.
        count: how many entries were added.
    """

    def __init__(self, kind: np.dtype, capacity: int):
        self._array = np.zeros(capacity, kind)
        self.fresh = np.zeros((), kind)
        for name in kind.names or ():
            self.fresh[name] = FRESH[kind[name].kind]
        self.columns: dict[str, np.ndarray] = {name: self._array[name] for name in kind.names or ()}
        self.capacity, self.count = capacity, 0

    def reserve(self) -> None:
        """Takes all of its memory now, which the system gives otherwise as entries come."""
        self._array.view(np.uint8)[::PAGE] |= 0

    def new(self) -> int:
        """Adds an entry that is to be written; returns its serial number."""
        self._array[self.count % self.capacity] = self.fresh
        self.count += 1
        return self.count - 1

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
        """Where an entry lies in `columns`; None where it is no longer kept."""
        return serial % self.capacity if max(0, self.count - self.capacity) <= serial < self.count else None

    @property
    def dropped(self) -> int:
        """Entries that are no longer kept."""
        return max(0, self.count - self.capacity)

    def copy(self, first: int = 0) -> np.ndarray:
        """The entries that are kept, oldest first, from serial number `first` on."""
        return np.concatenate([self._array[part] for _, part in self._parts(first)])

    def take(self, serials: np.ndarray) -> np.ndarray:
        """Entries that are kept, by serial number."""
        return self._array[serials % self.capacity]

    def find(self, name: str, value: Any, first: int = 0) -> np.ndarray:
        """The serial numbers of the entries, from `first` on, whose field is `value`; ascending."""
        column, parts = self.columns[name], self._parts(first)
        return np.concatenate([serial + np.flatnonzero(column[part] == value) for serial, part in parts])

    def _parts(self, first: int) -> list[tuple[int, slice]]:
        """Where the entries from `first` on lie: serial numbers and places of at most two stretches."""
        first = max(first, self.dropped)
        start, many = first % self.capacity, max(0, self.count - first)
        fits = min(many, self.capacity - start)
        parts = [(first, slice(start, start + fits))]
        return parts if fits == many else [*parts, (first + fits, slice(0, many - fits))]
