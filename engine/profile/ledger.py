"""The NFE ledger: every row that the device ran, every batch and where its time went, and counters of them.

A row is written when its batch is started, and settled when its search has taken it back: it was kept, or it ran in
vain. A batch has the host times of its stages, which NVTX ranges mark for Nsight too. Both lie in rings of structured
arrays, so that they are always on, take a bounded memory and refer to no tensor.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import nvtx
import torch

from rollflow.profile.records import BATCH, KINDS, ROW, STAGES, STATES, WORK, Ring

ROWS, BATCHES = 2**18, 2**15  # entries that are kept: 9 and 7 MiB
COLORS = {
    "tick": "gray", "propose": "blue", "transformer_forward": "green", "finish": "cyan", "vae_decode": "orange",
    "reward": "red", "backward": "magenta",
}  # fmt: skip
RANGES = {"forward": "transformer_forward", "decode": "vae_decode"}  # what Nsight shows
_KIND = {name: code for code, name in enumerate(KINDS)}
_OPEN, _KEPT, _DROPPED = range(len(STATES))
_here = threading.local()  # of the thread: the batch that it works for


def current() -> int | None:
    """The number of the batch that this thread works for."""
    return getattr(_here, "batch", None)


@contextmanager
def working_for(batch: int | None) -> Iterator[None]:
    """What this thread does within it is a batch's work, on whatever thread."""
    before, _here.batch = current(), batch
    try:
        yield
    finally:
        _here.batch = before


class Interval(NamedTuple):
    """When a span was, in seconds of `time.perf_counter()`, or on CUDA after the first of all."""

    name: str
    start: float
    end: float


class Ledger:
    """Rows, batches, and counts of executed rows by kind and seconds by span, over the life of an engine.

    Spans are host times of the thread that does the work; several threads' spans add up to more than the wall time. On
    CUDA, work is asynchronous: set `synchronize` to make spans measure the device, at the price of its pipelining.

    Args:
        synchronize: see above.
        clock: seconds, of batches.

    Attributes:
        on: whether rows and batches are written; the counters always are.
        record: whether every span is kept, for `intervals`; it takes memory without a bound.
        executed: rows by kind: committed, guided, finish, speculative (ran ahead and was not needed, or its request
            ended before it was), padding.
        decoded: images by decoder, "full" or "preview".
        ahead: rows that ran ahead of an answer, needed or not.
        buckets: batches by size.
        seconds: by span.
        ticks: batches.
        network_rows: rows of the network, padding included: two an evaluation with classifier-free guidance.
    """

    def __init__(self, synchronize: bool = False, clock: Callable[[], float] = time.perf_counter):
        self.synchronize, self.record, self._lock = synchronize, False, Lock()
        self.on, self.clock = True, clock
        self.clear()

    def clear(self) -> None:
        """Forgets everything; of rows that are on their way nothing is known afterwards."""
        self.executed: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self.ahead = 0
        self.buckets: Counter[int] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.ticks = self.network_rows = 0
        self._kept: list[tuple[str, Any, Any]] = []
        self._rows, self._batches = Ring(ROW, ROWS), Ring(BATCH, BATCHES)
        self._state, self._reward = self._rows.column("state"), self._rows.column("reward")
        self._open: dict[tuple[int, int], int] = {}  # rows that are not settled: their serial numbers
        self._lanes: dict[int, int] = {}  # by thread

    # Rows and batches.

    def rows(self, rows: Sequence[Any], bucket: int, network_rows: int = 1) -> int | None:
        """Writes down one batch's rows and its padding, of which each takes so many rows of the network.

        Returns:
            The batch's number, for `batch`; None while the ledger is off.
        """
        self.executed.update(row.kind for row in rows)
        self.executed["padding"] += bucket - len(rows)
        self.ahead += sum(row.ahead for row in rows)
        self.buckets[bucket] += 1
        self.ticks += 1
        self.network_rows += bucket * network_rows
        if not self.on:
            return None
        work = "guided" if rows[0].kind == "guided" else "rows"
        number = self._begin(work, rows[0].brief.geometry, len(rows), bucket, bucket * network_rows)
        entries = np.full(bucket, self._rows.fresh)
        own, padding = entries[: len(rows)], entries[len(rows) :]
        entries["batch"], entries["nfe"] = number, rows[0].nfe
        padding["kind"], padding["state"] = _KIND["padding"], _DROPPED
        own["request"], own["number"], own["time"], own["kind"], own["ahead"] = zip(
            *((row.brief.ticket, row.number, row.step.time, _KIND[row.kind], row.ahead) for row in rows), strict=True
        )
        serial = self._rows.add(entries)
        for i, row in enumerate(rows):
            key = row.brief.ticket, row.number
            if key in self._open:  # it runs again: what it gave before was not used
                self.settle(*key, False, row.kind)
            self._open[key] = serial + i
        return number

    def images(self, geometry: Any, count: int) -> int | None:
        """Writes down a batch of images of searches that are over; returns its number, for `batch`."""
        return self._begin("images", geometry, count, count, 0) if self.on else None

    def _begin(self, work: str, geometry: Any, rows: int, bucket: int, network_rows: int) -> int:
        entry = self._batches.fresh.copy()
        entry["work"], entry["submitted"] = WORK.index(work), self.clock()
        entry["height"], entry["width"], entry["frames"] = geometry.height, geometry.width, geometry.frames or 0
        entry["rows"], entry["bucket"], entry["network_rows"] = rows, bucket, network_rows
        for stage in STAGES:
            entry[f"{stage}_seconds"] = 0.0
        with self._lock:
            entry["batch"] = self._batches.count
            return self._batches.add(entry[None])

    @contextmanager
    def batch(self, number: int | None) -> Iterator[None]:
        """What this thread does within it, on a lane, is a batch's work; several times for one that runs in parts."""
        started = self.clock()
        try:
            with working_for(number), nvtx.annotate("tick", domain="rollflow", color=COLORS["tick"]):
                yield
        finally:
            if number is not None:
                self._ran(number, started)

    def _ran(self, number: int, started: float) -> None:
        with self._lock:
            lane = self._lanes.setdefault(threading.get_ident(), len(self._lanes))
            if (entry := self._batches[number]) is not None:
                entry["lane"], entry["ended"] = lane, self.clock()
                if np.isnan(entry["started"]):
                    entry["started"] = started

    def settle(self, request: int, number: int, kept: bool, kind: str, reward: float | None = None) -> None:
        """A row was taken back: it is part of its search, or it ran in vain. Further calls for a row do nothing."""
        serial = self._open.pop((request, number), None)
        if serial is None and self.on:
            return
        if not kept:
            self.executed[kind] -= 1
            self.executed["speculative"] += 1
        place = None if serial is None else self._rows.place(serial)
        if place is not None:
            self._state[place] = _KEPT if kept else _DROPPED
            if reward is not None:
                self._reward[place] = reward

    def table(self, name: str = "rows") -> np.ndarray:
        """The latest "rows" or "batches" as a structured array, oldest first; see `rollflow.profile.records`."""
        with self._lock:
            return (self._rows if name == "rows" else self._batches).copy()

    @property
    def forgotten(self) -> tuple[int, int]:
        """How many rows and batches were written and are no longer kept."""
        return self._rows.dropped, self._batches.dropped

    def decodes(self, decoder: str, images: int) -> None:
        """Counts decoded images; of any thread."""
        with self._lock:
            self.decoded[decoder] += images

    @contextmanager
    def span(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Times a span under `name` and marks it for NVTX."""
        on_gpu = device is not None and device.type == "cuda"
        marks = [_mark(device)] if self.record and on_gpu else []
        start = time.perf_counter()
        shown = RANGES.get(name, name)
        with nvtx.annotate(shown, domain="rollflow", color=COLORS.get(shown, "gray")):
            yield
            if self.synchronize and on_gpu:
                torch.cuda.synchronize(device)
        end = time.perf_counter()
        if marks:
            marks.append(_mark(device))
        with self._lock:
            self.seconds[name] += end - start
            if self.record:
                self._kept.append((name, *(marks or (start, end))))
            number = current()
            if number is not None and (entry := self._batches[number]) is not None and name in STAGES:
                now = self.clock()
                if np.isnan(entry[f"{name}_started"]):
                    entry[f"{name}_started"] = now - (end - start)
                entry[f"{name}_ended"] = now
                entry[f"{name}_seconds"] += end - start

    def intervals(self) -> list[Interval]:
        """The spans since `record` was set; those with a CUDA device as the device ran them, in its own time."""
        with self._lock:
            kept = [*self._kept]
        events = [start for _, start, _ in kept if not isinstance(start, float)]
        if not events:
            return [Interval(*one) for one in kept]
        torch.cuda.synchronize()
        first = events[0]
        return [
            Interval(name, first.elapsed_time(start) / 1000, first.elapsed_time(end) / 1000)
            for name, start, end in kept
            if not isinstance(start, float)
        ]


def _mark(device: torch.device | None) -> Any:
    """An event on the device's current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def overlap(intervals: Sequence[Interval], name: str, other: str) -> float | None:
    """The share of the time of spans `name` in which some span `other` ran too; None where there are none.

    Times in which several spans `name` run count once for each.
    """
    others = sorted((one.start, one.end) for one in intervals if one.name == other)
    merged: list[list[float]] = []
    for start, end in others:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    own = [one for one in intervals if one.name == name]
    total = sum(one.end - one.start for one in own)
    shared = sum(max(0.0, min(one.end, end) - max(one.start, start)) for one in own for start, end in merged)
    return shared / total if total > 0 else None
