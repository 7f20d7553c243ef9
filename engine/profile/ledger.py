"""The NFE ledger: every row that the device ran, every batch, call of a reward and request, and counters of them.

A row is written when its batch is started, and settled when its search has taken it back: it was kept, or it ran in
vain. A batch has the times of its stages, which NVTX ranges mark for Nsight too. All lie in rings of structured arrays,
so that they are always on, take a bounded memory and refer to no tensor.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import torch

from rollflow.profile.device_times import DeviceTimes
from rollflow.profile.ranges import current as current
from rollflow.profile.ranges import marked
from rollflow.profile.ranges import working_for as working_for
from rollflow.profile.records import CHORES, DEVICE_STAGES, KINDS, LANE_STAGES, STAGES, STATES, WORK
from rollflow.profile.tables import Tables
from rollflow.profile.visits import Visits

_KIND = {name: code for code, name in enumerate(KINDS)}
_OPEN, _KEPT, _DROPPED = range(len(STATES))
_FIELDS = {stage: (f"{stage}_started", f"{stage}_ended", f"{stage}_seconds") for stage in STAGES}


def on_lane(work: int) -> tuple[str, ...]:
    """The stages that a lane does of a batch; of a guided one it calls the reward too."""
    return (*LANE_STAGES, "reward") if work == WORK.index("guided") else LANE_STAGES


class Ledger(Tables):
    """Rows, batches, calls and requests, and counts of executed rows by kind and seconds by span, of one engine.

    Spans are host times of the thread that does the work; several threads' spans add up to more than the wall time. On
    CUDA, where work is asynchronous, batches have the device's own times besides. Any thread may read; rows are written
    by the engine's loop, spans by whoever does the work.

    Args:
        clock: seconds.

    Attributes:
        on: whether tables are written; the counters always are.
        executed: rows by kind: committed, guided, finish, refresh, speculative (ran ahead and was not needed, or its
            request ended before it was), padding.
        decoded: images by decoder, "full" or "preview".
        ahead: rows that ran ahead of an answer, needed or not.
        cached: rows that were evaluated from a cache, padding of their batches included.
        unjudged: rows that were to be judged, and were not needed any more when it came to that.
        buckets: batches by size.
        seconds: by span, of those that raised too.
        ticks: batches.
        network_rows: rows of the network, padding included: two an evaluation with classifier-free guidance.
        specs: what each request of the table asked for, as plain values.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._devices: dict[torch.device, DeviceTimes] = {}
        super().__init__(clock)

    def clear(self) -> None:
        """Forgets everything; of rows and requests that are on their way nothing is known afterwards."""
        self.executed: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self.ahead = self.cached = self.unjudged = 0
        self.buckets: Counter[int] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.ticks = self.network_rows = 0
        self._open: dict[tuple[int, int], int] = {}  # rows that are not settled: their serial numbers
        self._showing: dict[int, int] = {}  # requests whose images are being made: the batch
        self._visits = Visits()
        super().clear()

    def changed(self, number: int, state: str | None = None, **fields: Any) -> None:
        """Something of a request changed: fields of its entry."""
        if "ended" in fields:
            self._showing.pop(number, None)
        super().changed(number, state, **fields)

    # Rows and batches.

    def rows(self, rows: Sequence[Any], bucket: int, network_rows: int = 1) -> int | None:
        """Writes down one batch's rows and its padding, of which each takes so many rows of the network.

        Padding is charged to the batch's rows in turns.

        Returns:
            The batch's number, for `batch`; None while the ledger is off.
        """
        count = len(rows)
        self.executed.update(row.kind for row in rows)
        self.executed["padding"] += bucket - count
        self.ahead += sum(row.ahead for row in rows)
        self.cached += bucket if rows[0].cached else 0
        self.buckets[bucket] += 1
        self.ticks += 1
        self.network_rows += bucket * network_rows
        if not self.on:
            return None
        work, nfe = "guided" if rows[0].kind == "guided" else "rows", rows[0].nfe
        entries = [
            (0, r.brief.ticket, r.number, r.origin, r.level, r.step.time, _KIND[r.kind], nfe, r.ahead, r.scored,
             r.cached, _OPEN, math.nan)
            for r in rows
        ]  # fmt: skip
        entries += [
            (0, rows[i % count].brief.ticket, -1, -1, -1, math.nan, _KIND["padding"], nfe, False, False,
             rows[0].cached, _DROPPED, math.nan)
            for i in range(count, bucket)
        ]  # fmt: skip
        number, serial = self.add(work, rows[0].brief.geometry, count, entries, bucket * network_rows)
        for place, row in enumerate(rows, serial):
            key = row.brief.ticket, row.number
            if key in self._open:  # it runs again: what it gave before was not used
                self.settle(*key, False, row.kind)
            self._open[key] = place
        return number

    def images(self, shows: Sequence[Any]) -> int | None:
        """Writes down a batch of images of searches that are over; returns its number, for `batch`."""
        if not self.on:
            return None
        owners = [show.brief.ticket for show in shows for _ in show.candidates]
        entries = [
            (0, owner, -1, -1, -1, math.nan, _KIND["image"], 0, False, True, False, _KEPT, math.nan) for owner in owners
        ]
        number, _ = self.add("images", shows[0].brief.geometry, len(owners), entries, 0)
        self._showing.update(dict.fromkeys(owners, number))
        return number

    def chore(self, kind: str) -> int | None:
        """Writes down work on a lane that is no batch; returns its number, for `batch`."""
        return self.add(kind if kind in CHORES else "other", None, 0, [], 0)[0] if self.on else None

    @contextmanager
    def batch(self, number: int | None, name: str = "tick") -> Iterator[None]:
        """What this thread does within it, on a lane, is a batch's work; several times for one that runs in parts.

        The lane is the batch's until `freed`.
        """
        if number is None:
            yield
            return
        with working_for(number), marked(name, self._entered(number)):
            yield

    def _entered(self, number: int) -> tuple[int, int]:
        """A batch takes the first lane that is free, if it has none; returns its bucket and rows."""
        with self._lock:
            entry = self._batches[number]
            if entry is None:
                return (0, 0)
            if np.isnan(entry["ended"]) and (visit := self._visits.enter(number)) is not None:
                now, (entry["lane"], left) = self.clock(), visit
                entry["started"], entry["idle"] = now, now - left
            return int(entry["bucket"]), int(entry["rows"])

    def freed(self, number: int | None) -> None:
        """A batch's lane is free again; whatever its thread may still do is not counted."""
        with self._lock:
            now = self.clock()
            if number is None or not self._visits.leave(number, now) or (entry := self._batches[number]) is None:
                return
            entry["ended"] = now
            stages = on_lane(int(entry["work"]))
            entry["host"] = now - entry["started"] - sum(entry[f"{stage}_seconds"] for stage in stages)

    def settle(self, request: int, number: int, kept: bool, kind: str, reward: float | None = None) -> None:
        """A row was taken back: it is part of its search, or it ran in vain. Further calls for a row do nothing."""
        serial = self._open.pop((request, number), None)
        if serial is None and self.on:
            return
        if not kept:
            self.executed[kind] -= 1
            self.executed["speculative"] += 1
        if serial is None:
            return
        with self._lock:
            if (place := self._rows.place(serial)) is not None:
                self._rows.columns["state"][place] = _KEPT if kept else _DROPPED
                if reward is not None:
                    self._rows.columns["reward"][place] = reward

    def spared(self, rows: Sequence[Any]) -> None:
        """Rows came back without a reward; those that were to be judged turned out not to be needed before that."""
        spared = [row for row in rows if row.scored]
        self.unjudged += len(spared)
        places = [self._open.get((row.brief.ticket, row.number)) for row in spared]
        with self._lock:
            for serial in places:
                if serial is None or (place := self._rows.place(serial)) is None:
                    continue
                self._rows.columns["scored"][place] = False
                if (batch := self._batches[int(self._rows.columns["batch"][place])]) is not None:
                    batch["judged"] -= 1

    @contextmanager
    def deciding(self, work: Any) -> Iterator[None]:
        """The loop takes back what it sent to the device: a row, or a search whose image was made."""
        number = None
        if (which := getattr(work, "number", None)) is None:
            number = self._showing.pop(work.brief.ticket, None)
        elif (serial := self._open.get((work.brief.ticket, which))) is not None:
            place = self._rows.place(serial)
            number = None if place is None else int(self._rows.columns["batch"][place])
        with working_for(number), self.span("decide"):
            yield

    # Times.

    def decodes(self, decoder: str, images: int) -> None:
        """Counts decoded images; of any thread."""
        with self._lock:
            self.decoded[decoder] += images

    def span(self, name: str, device: torch.device | None = None) -> Span:
        """Times a span under `name` and marks it for NVTX; on a CUDA device by events of its current stream too."""
        on_gpu = self.on and device is not None and device.type == "cuda" and name in DEVICE_STAGES
        return Span(self, name, device if on_gpu else None)

    def ran(self, name: str, start: float, end: float) -> bool:
        """A span is over; says whether it was written down as a stage of the batch that this thread works for."""
        number = current()
        with self._lock:
            self.seconds[name] += end - start
            if number is None or name not in _FIELDS or (place := self._batches.place(number)) is None:
                return False
            columns = self._batches.columns
            if name in on_lane(int(columns["work"][place])) and not math.isnan(columns["ended"][place]):
                return False  # the thread was given up, and comes back too late
            started, ended, seconds = (columns[field] for field in _FIELDS[name])
            if math.isnan(started[place]):
                started[place] = start
            ended[place] = end
            seconds[place] += end - start
            return True

    def mark(self, device: torch.device) -> Any:
        """A CUDA event at this place of the device's current stream."""
        with self._lock:
            if device not in self._devices:
                self._devices[device] = DeviceTimes(clock=self.clock)
            return self._devices[device].mark()

    def between(self, name: str, device: torch.device, first: Any, last: Any) -> None:
        """A stage of the batch that this thread works for lies between two marks."""
        with self._lock:
            self._devices[device].between((current(), name), first, last)

    def _refresh(self) -> None:
        """Takes over the times of what devices are done with; the caller has the lock."""
        for times in self._devices.values():
            for (number, name), started, seconds in times.past():
                if (entry := self._batches[number]) is not None:
                    if np.isnan(entry[f"{name}_device_seconds"]):
                        entry[f"{name}_device_started"], entry[f"{name}_device_seconds"] = started, 0.0
                    entry[f"{name}_device_seconds"] += seconds


class Span:
    """What a thread does within it is a stage; see `Ledger.span`."""

    __slots__ = ("_device", "_first", "_ledger", "_name", "_range", "_start")

    def __init__(self, ledger: Ledger, name: str, device: torch.device | None):
        self._ledger, self._name, self._device = ledger, name, device

    def __enter__(self) -> None:
        self._first = None if self._device is None else self._ledger.mark(self._device)
        self._range = marked(self._name)
        self._start = self._ledger.clock()
        self._range.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._range.__exit__(kind, error, trace)
        ledger, device = self._ledger, self._device
        written = ledger.ran(self._name, self._start, ledger.clock())
        if written and device is not None and error is None:  # after an error the device may be gone
            ledger.between(self._name, device, self._first, ledger.mark(device))
