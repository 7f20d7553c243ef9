"""The NFE ledger: every row that the device ran, every batch, call of a reward and request, and counters of them.

A row is written when its batch is started, and settled when its search has taken it back: it was kept, or it ran in
vain. A batch has the times of its stages, which NVTX ranges mark for Nsight too. All lie in rings of structured arrays,
so that they are always on, take a bounded memory and refer to no tensor.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np
import nvtx
import torch

from rollflow.profile.accounts import Cost, costs
from rollflow.profile.device_times import DeviceTimes
from rollflow.profile.records import (
    CAPACITY,
    CHORES,
    DEVICE_STAGES,
    FATES,
    KINDS,
    LANE_STAGES,
    STAGES,
    STATES,
    TABLES,
    WORK,
    Ring,
)

COLORS = {
    "tick": "gray", "encode_prompt": "purple", "propose": "blue", "transformer_forward": "green", "finish": "cyan",
    "vae_decode": "orange", "reward": "red", "backward": "magenta", "decide": "yellow",
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


class Visit:
    """A batch's stay on a lane; with `goes_on` the lane is not free when the thread is done with it."""

    __slots__ = ("goes_on",)

    def __init__(self) -> None:
        self.goes_on = False


class Ledger:
    """Rows, batches, calls and requests, and counts of executed rows by kind and seconds by span, of one engine.

    Spans are host times of the thread that does the work; several threads' spans add up to more than the wall time. On
    CUDA, where work is asynchronous, batches have the device's own times besides.

    Args:
        clock: seconds.

    Attributes:
        on: whether tables are written; the counters always are.
        executed: rows by kind: committed, guided, finish, speculative (ran ahead and was not needed, or its request
            ended before it was), padding.
        decoded: images by decoder, "full" or "preview".
        ahead: rows that ran ahead of an answer, needed or not.
        buckets: batches by size.
        seconds: by span.
        ticks: batches.
        network_rows: rows of the network, padding included: two an evaluation with classifier-free guidance.
        specs: what each request of the table asked for, as plain values.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._lock = Lock()
        self.on, self.clock = True, clock
        self._devices: dict[torch.device, DeviceTimes] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets everything; of rows and requests that are on their way nothing is known afterwards."""
        self.executed: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self.ahead = 0
        self.buckets: Counter[int] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.ticks = self.network_rows = 0
        with self._lock:
            self._rings = {name: Ring(kind, CAPACITY[name]) for name, kind in TABLES.items()}
            self._rows, self._batches = self._rings["rows"], self._rings["batches"]
            self._state, self._reward = self._rows.column("state"), self._rows.column("reward")
            self._open: dict[tuple[int, int], int] = {}  # rows that are not settled: their serial numbers
            self._showing: dict[int, int] = {}  # requests whose images are being made: the batch
            # Requests: their serial numbers, and those that rows, batches and calls had when they came.
            self._known: dict[int, tuple[int, dict[str, int]]] = {}
            self.specs: dict[int, Mapping[str, Any]] = {}
            self._lanes: list[int | None] = []  # which batch each is on
            self._left: list[float] = []  # when each was free
            self._judges: dict[int, int] = {}  # by thread
            self._choosing = self.clock()

    # Requests.

    def came(self, number: int, spec: Mapping[str, Any], submitted: float) -> None:
        """A request is here: `spec` is what it asks for, see `rollflow.specs`."""
        if not self.on:
            return
        ring = self._rings["requests"]
        entry = ring.fresh.copy()
        entry["request"], entry["submitted"] = number, submitted
        for name in ("prompt", "method", "reward", "nfe", "priority", "height", "width", "frames"):
            entry[name] = spec[name]
        with self._lock:
            if len(self._known) >= ring.capacity:
                self.specs.pop(oldest := next(iter(self._known)), None)
                del self._known[oldest]
            written = {name: of.count for name, of in self._rings.items()}
            self._known[number], self.specs[number] = (ring.add(entry[None]), written), spec

    def changed(self, number: int, state: str | None = None, **fields: Any) -> None:
        """Something of a request changed: fields of its entry."""
        with self._lock:
            serial, _ = self._known.get(number, (-1, {}))
            entry = self._rings["requests"][serial]
            if entry is None:
                return
            if state is not None:
                entry["state"] = FATES.index(state)
            for name, value in fields.items():
                entry[name] = value

    # Rows and batches.

    def choosing(self) -> None:
        """The scheduler begins to choose what runs next."""
        self._choosing = self.clock()

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
        self.buckets[bucket] += 1
        self.ticks += 1
        self.network_rows += bucket * network_rows
        if not self.on:
            return None
        work = "guided" if rows[0].kind == "guided" else "rows"
        number = self._begin(work, rows[0].brief.geometry, count, bucket, bucket * network_rows)
        entries = np.full(bucket, self._rows.fresh)
        own, padding = entries[:count], entries[count:]
        entries["batch"], entries["nfe"] = number, rows[0].nfe
        fields = "request", "number", "origin", "level", "time", "kind", "ahead", "scored"
        columns = zip(
            *(
                (r.brief.ticket, r.number, r.origin, r.level, r.step.time, _KIND[r.kind], r.ahead, r.scored)
                for r in rows
            ),
            strict=True,
        )
        for name, column in zip(fields, columns, strict=True):
            own[name] = column
        if count < bucket:
            padding["kind"], padding["state"] = _KIND["padding"], _DROPPED
            padding["request"] = np.resize(own["request"], bucket)[count:]
        serial = self._rows.add(entries)
        for i, row in enumerate(rows):
            key = row.brief.ticket, row.number
            if key in self._open:  # it runs again: what it gave before was not used
                self.settle(*key, False, row.kind)
            self._open[key] = serial + i
        return number

    def images(self, shows: Sequence[Any]) -> int | None:
        """Writes down a batch of images of searches that are over; returns its number, for `batch`."""
        if not self.on:
            return None
        owners = [show.brief.ticket for show in shows for _ in show.candidates]
        number = self._begin("images", shows[0].brief.geometry, len(owners), len(owners), 0)
        entries = np.full(len(owners), self._rows.fresh)
        entries["batch"], entries["request"], entries["kind"] = number, owners, _KIND["image"]
        entries["scored"], entries["state"], entries["nfe"] = True, _KEPT, 0
        self._rows.add(entries)
        self._showing.update(dict.fromkeys(owners, number))
        return number

    def chore(self, kind: str) -> int | None:
        """Writes down work on a lane that is no batch; returns its number, for `batch`."""
        return self._begin(kind if kind in CHORES else "other", None, 0, 0, 0) if self.on else None

    def _begin(self, work: str, geometry: Any, rows: int, bucket: int, network_rows: int) -> int:
        entry = self._batches.fresh.copy()
        entry["work"], entry["submitted"], entry["chosen"] = WORK.index(work), self.clock(), self._choosing
        if geometry is not None:
            entry["height"], entry["width"], entry["frames"] = geometry.height, geometry.width, geometry.frames or 0
        entry["rows"], entry["bucket"], entry["network_rows"] = rows, bucket, network_rows
        for stage in STAGES:
            entry[f"{stage}_seconds"] = 0.0
        self._choosing = float(entry["submitted"])
        with self._lock:
            self._read_device_times()
            entry["batch"] = self._batches.count
            return self._batches.add(entry[None])

    @contextmanager
    def batch(self, number: int | None, name: str = "tick") -> Iterator[Visit]:
        """What this thread does within it, on a lane, is a batch's work; several times for one that runs in parts.

        Where the lane is not free at its end, the visit is told that it `goes_on`, and `freed` says when it is.
        """
        visit = Visit()
        if number is None:
            yield visit
            return
        payload = self._entered(number)
        mark = nvtx.annotate(name, domain="rollflow", color=COLORS[name], payload=payload)
        try:
            with working_for(number), mark:
                yield visit
        except BaseException:
            visit.goes_on = False
            raise
        finally:
            if not visit.goes_on:
                self.freed(number)

    def _entered(self, number: int) -> tuple[int, int]:
        """A batch takes the lane that it has, or the first that is free; returns its bucket and rows."""
        now = self.clock()
        with self._lock:
            if number not in self._lanes:
                if None not in self._lanes:
                    self._lanes.append(None)
                    self._left.append(np.nan)
                lane = self._lanes.index(None)
                self._lanes[lane] = number
                if (entry := self._batches[number]) is not None and np.isnan(entry["started"]):
                    entry["lane"], entry["started"], entry["idle"] = lane, now, now - self._left[lane]
            entry = self._batches[number]
            return (0, 0) if entry is None else (int(entry["bucket"]), int(entry["rows"]))

    def freed(self, number: int | None) -> None:
        """A batch's lane is free again."""
        now = self.clock()
        with self._lock:
            if number not in self._lanes:
                return
            lane = self._lanes.index(number)
            self._lanes[lane], self._left[lane] = None, now
            assert number is not None
            if (entry := self._batches[number]) is not None:
                entry["ended"] = now
                # of a guided batch the reward is called on the lane
                stages = (*LANE_STAGES, "reward") if entry["work"] == WORK.index("guided") else LANE_STAGES
                entry["host"] = now - entry["started"] - sum(entry[f"{stage}_seconds"] for stage in stages)

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

    @contextmanager
    def deciding(self, work: Any) -> Iterator[None]:
        """The loop takes back what it sent to the device: a row, or a search whose image was made."""
        number = None
        if (which := getattr(work, "number", None)) is None:
            number = self._showing.pop(work.brief.ticket, None)
        elif (serial := self._open.get((work.brief.ticket, which))) is not None:
            place = self._rows.place(serial)
            number = None if place is None else int(self._rows.column("batch")[place])
        with working_for(number), self.span("decide"):
            yield

    def call(self, reward: str, images: int, started: float, failed: bool = False) -> None:
        """A reward was called on this thread, from `started` until now."""
        if not self.on:
            return
        now, ring = self.clock(), self._rings["calls"]
        entry = ring.fresh.copy()
        number = current()
        entry["batch"], entry["reward"], entry["images"] = -1 if number is None else number, reward, images
        entry["started"], entry["ended"], entry["failed"] = started, now, failed
        with self._lock:
            entry["thread"] = self._judges.setdefault(threading.get_ident(), len(self._judges))
            ring.add(entry[None])

    # Reading it.

    def table(self, name: str = "rows", since: int = 0) -> np.ndarray:
        """The latest "rows", "batches", "calls" or "requests" as a structured array, oldest first.

        Args:
            name: which; see `rollflow.profile.records`.
            since: leaves out entries before this serial number, see `written`.
        """
        with self._lock:
            self._read_device_times()
            return self._rings[name].copy(since)

    def cost(self, number: int) -> Cost | None:
        """What a request cost so far, by what is kept of its rows and batches; None where nothing is known of it."""
        if number not in self._known:
            return None
        _, written = self._known[number]
        rows = self.table("rows", written["rows"])
        involved = np.unique(rows["batch"][rows["request"] == number])
        rows = rows[np.isin(rows["batch"], involved)]
        batches, calls = self.table("batches", written["batches"]), self.table("calls", written["calls"])
        batches, calls = batches[np.isin(batches["batch"], involved)], calls[np.isin(calls["batch"], involved)]
        terms = {one: spec["terms"] for one, spec in [*self.specs.items()] if "terms" in spec}
        return costs(rows, batches, calls, terms).get(number)

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

    def decodes(self, decoder: str, images: int) -> None:
        """Counts decoded images; of any thread."""
        with self._lock:
            self.decoded[decoder] += images

    @contextmanager
    def span(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Times a span under `name` and marks it for NVTX; on a CUDA device by events of its current stream too."""
        on_gpu = self.on and device is not None and device.type == "cuda" and name in DEVICE_STAGES
        first = self._mark(device) if on_gpu else None
        start = self.clock()
        shown = RANGES.get(name, name)
        with nvtx.annotate(shown, domain="rollflow", color=COLORS.get(shown, "gray")):
            yield
        end = self.clock()
        number = current()
        with self._lock:
            self.seconds[name] += end - start
            if number is None or name not in STAGES or (entry := self._batches[number]) is None:
                return
            if np.isnan(entry[f"{name}_started"]):
                entry[f"{name}_started"] = start
            entry[f"{name}_ended"] = end
            entry[f"{name}_seconds"] += end - start
        if first is not None:
            assert device is not None
            last = self._mark(device)
            with self._lock:
                self._devices[device].between((number, name), first, last)

    def _mark(self, device: torch.device | None) -> Any:
        assert device is not None
        with self._lock:
            if device not in self._devices:
                self._devices[device] = DeviceTimes(clock=self.clock)
            return self._devices[device].mark()

    def _read_device_times(self) -> None:
        """Takes over what the device is done with; the caller has the lock."""
        for times in self._devices.values():
            for (number, name), started, seconds in times.past():
                if (entry := self._batches[number]) is not None:
                    if np.isnan(entry[f"{name}_device_seconds"]):
                        entry[f"{name}_device_started"], entry[f"{name}_device_seconds"] = started, 0.0
                    entry[f"{name}_device_seconds"] += seconds
