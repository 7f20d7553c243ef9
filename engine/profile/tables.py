"""The ledger's tables: rings of rows, batches, calls of rewards and requests, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from rollflow.profile.accounts import Cost, costs
from rollflow.profile.ranges import current
from rollflow.profile.records import CAPACITY, FATES, STAGES, TABLES, WORK, Ring


class Snapshot(NamedTuple):
    """The tables at one moment; see `Ledger.snapshot`.

    Attributes:
        tables: entries by table, oldest first.
        forgotten: by table, how many entries are no longer kept.
        specs: what each request that the ledger knows asked for.
    """

    tables: dict[str, np.ndarray]
    forgotten: dict[str, int]
    specs: dict[int, Mapping[str, Any]]


class Tables:
    """What is written down of requests, batches and calls, and what can be read of it; of any thread.

    Args:
        clock: seconds.

    Attributes:
        on: whether anything is written.
        specs: what each request of the table asked for, as plain values.
    """

    def __init__(self, clock: Callable[[], float]):
        self._lock = Lock()
        self.on, self.clock = True, clock
        self.clear()

    def clear(self) -> None:
        """Forgets everything; of rows and requests that are on their way nothing is known afterwards."""
        with self._lock:
            self._rings = {name: Ring(kind, CAPACITY[name]) for name, kind in TABLES.items()}
            self._rows, self._batches = self._rings["rows"], self._rings["batches"]
            for stage in STAGES:
                self._batches.fresh[f"{stage}_seconds"] = 0.0
            self._first = np.zeros(self._batches.capacity, np.int64)  # of a batch: its first row's serial number
            # Requests: their serial numbers, and those that rows and calls had when they came.
            self._known: dict[int, tuple[int, int, int]] = {}
            self.specs: dict[int, Mapping[str, Any]] = {}
            self._judges: dict[int, int] = {}  # by thread
            self._titles: set[str] = set()  # of rewards that were called; the first two
            self._choosing = self.clock()

    def reserve(self) -> None:
        """Takes the memory of all tables now, so that a service does not grow with its first hours."""
        with self._lock:
            for ring in self._rings.values():
                ring.reserve()

    def _refresh(self) -> None:
        """Writes down what has become known meanwhile; the caller has the lock."""

    # Writing.

    def choosing(self) -> None:
        """The scheduler begins to choose what runs next."""
        self._choosing = self.clock()

    def add(
        self, work: str, geometry: Any, rows: int, entries: list[tuple[Any, ...]], network_rows: int
    ) -> tuple[int, int]:
        """Writes down a batch and its entries at once; returns its number, and the serial number of its first entry.

        Args:
            work: of `rollflow.profile.records.WORK`.
            geometry: of its images; None of a chore.
            rows: how many of the entries are no padding.
            entries: fields of `rollflow.profile.records.ROW`; the first, the batch's number, is filled in here.
            network_rows: padding included.
        """
        table, batches = np.array(entries, TABLES["rows"]), self._batches
        judged = np.count_nonzero(table["scored"])
        with self._lock:
            self._refresh()
            now, number = self.clock(), batches.new()
            entry = batches[number]
            entry["batch"], entry["work"], entry["rows"] = number, WORK.index(work), rows
            entry["bucket"], entry["judged"], entry["network_rows"] = len(entries), judged, network_rows
            if geometry is not None:
                entry["height"], entry["width"], entry["frames"] = geometry.height, geometry.width, geometry.frames or 0
            entry["chosen"], entry["submitted"], self._choosing = self._choosing, now, now
            table["batch"] = number
            first = self._first[number % batches.capacity] = self._rows.add(table)
        return number, int(first)

    def came(self, number: int, spec: Mapping[str, Any], submitted: float) -> None:
        """A request is here: `spec` is what it asks for, see `rollflow.specs`."""
        if not self.on:
            return
        ring = self._rings["requests"]
        with self._lock:
            if len(self._known) >= ring.capacity:
                self.specs.pop(oldest := next(iter(self._known)), None)
                del self._known[oldest]
            entry = ring[serial := ring.new()]
            entry["request"], entry["submitted"] = number, submitted
            for name in ("prompt", "method", "reward", "nfe", "priority", "height", "width", "frames"):
                entry[name] = min(spec[name], 2**63 - 1) if name == "priority" else spec[name]
            self._known[number], self.specs[number] = (serial, self._rows.count, self._rings["calls"].count), spec

    def changed(self, number: int, state: str | None = None, **fields: Any) -> None:
        """Something of a request changed: fields of its entry."""
        with self._lock:
            serial, *_ = self._known.get(number, (-1,))
            entry = self._rings["requests"][serial]
            if entry is None:
                return
            if state is not None:
                entry["state"] = FATES.index(state)
            for name, value in fields.items():
                entry[name] = value

    def call(self, reward: str, images: int, started: float, cpu: float = 0.0, failed: bool = False) -> None:
        """A reward was called on this thread, from `started` until now, and used a core for `cpu` seconds."""
        if not self.on:
            return
        now, ring, number = self.clock(), self._rings["calls"], current()
        with self._lock:
            entry = ring[ring.new()]
            entry["batch"], entry["reward"], entry["images"] = -1 if number is None else number, reward, images
            entry["started"], entry["ended"], entry["cpu"], entry["failed"] = started, now, cpu, failed
            entry["thread"] = self._judges.setdefault(threading.get_ident(), len(self._judges))
            if len(self._titles) < 2:  # more is not to be known
                self._titles.add(reward)

    # Reading.

    def table(self, name: str = "rows", since: int = 0) -> np.ndarray:
        """The latest "rows", "batches", "calls" or "requests" as a structured array, oldest first.

        Args:
            name: which; see `rollflow.profile.records`.
            since: leaves out entries before this serial number, see `written`.
        """
        with self._lock:
            self._refresh()
            return self._rings[name].copy(since)

    def snapshot(self, since: Mapping[str, int]) -> Snapshot:
        """All tables at one moment, from serial numbers on; `written` gives them."""
        with self._lock:
            self._refresh()
            rings = self._rings.items()
            return Snapshot(
                {name: ring.copy(since[name]) for name, ring in rings},
                {name: max(0, ring.dropped - since[name]) for name, ring in rings},
                {**self.specs},
            )

    def cost(self, number: int) -> Cost | None:
        """What a request cost so far, by what is kept of its rows and batches; None where nothing is known of it."""
        with self._lock:
            if number not in self._known:
                return None
            self._refresh()
            rows, batches, calls = self._involved(number)
            specs = {one: self.specs[one] for one in {*rows["request"].tolist()} & self.specs.keys()}
        return costs(rows, batches, calls, specs, [number]).get(number)

    def _involved(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A request's rows, their batches and, where more than one reward is called, what `costs` takes to share calls:
        these batches' calls, and everybody's rows. The caller has the lock.
        """
        _, came, called = self._known[number]
        rows, batches, calls = self._rows, self._batches, self._rings["calls"]
        serials = rows.find("request", number, came)
        own = rows.take(serials)
        kept = np.unique(own["batch"])
        kept = kept[kept >= batches.dropped]
        if len(self._titles) < 2:
            return own, batches.take(kept), calls.copy(calls.count)
        first, size = self._first[kept % batches.capacity], batches.take(kept)["bucket"]
        everybody = np.repeat(first - np.cumsum(size) + size, size) + np.arange(size.sum())
        every = np.union1d(serials, everybody[everybody >= rows.dropped])
        judged = calls.copy(called)
        return rows.take(every), batches.take(kept), judged[np.isin(judged["batch"], kept)]

    @property
    def written(self) -> dict[str, int]:
        """How many entries of each table were written so far: the serial number of its next."""
        with self._lock:
            return {name: ring.count for name, ring in self._rings.items()}

    @property
    def forgotten(self) -> dict[str, int]:
        """How many entries of each table were written and are no longer kept."""
        with self._lock:
            return {name: ring.dropped for name, ring in self._rings.items()}
