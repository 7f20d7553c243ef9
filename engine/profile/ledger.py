"""The NFE ledger: what the device ran, and where the time went. NVTX ranges mark the same spans for Nsight."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

import nvtx
import torch


class Interval(NamedTuple):
    """When a span was, in seconds of `time.perf_counter()`, or on CUDA after the first of all."""

    name: str
    start: float
    end: float


class Ledger:
    """Counts of executed rows by kind and seconds by span, over the life of an engine.

    Spans are host times of the thread that does the work; several threads' spans add up to more than the wall time. On
    CUDA, work is asynchronous: set `synchronize` to make spans measure the device, at the price of its pipelining.

    Attributes:
        record: whether every span is kept, for `intervals`; it takes memory without a bound.
        executed: rows by kind: committed, guided, finish, speculative (ran ahead and was not needed), padding.
        decoded: images by decoder, "full" or "preview".
        ahead: rows that ran ahead of an answer, needed or not.
        buckets: batches by size.
        seconds: by span.
        ticks: batches.
        network_rows: rows of the network, padding included: two an evaluation with classifier-free guidance.
    """

    def __init__(self, synchronize: bool = False):
        self.synchronize, self.record, self._lock = synchronize, False, Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.executed: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self.ahead = 0
        self.buckets: Counter[int] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.ticks = self.network_rows = 0
        self._kept: list[tuple[str, Any, Any]] = []

    def rows(self, rows: Sequence[Any], bucket: int, network_rows: int = 1) -> None:
        """Writes down one batch's rows and its padding, of which each takes so many rows of the network."""
        self.executed.update(row.kind for row in rows)
        self.executed["padding"] += bucket - len(rows)
        self.ahead += sum(row.ahead for row in rows)
        self.buckets[bucket] += 1
        self.ticks += 1
        self.network_rows += bucket * network_rows

    def decodes(self, decoder: str, images: int) -> None:
        """Counts decoded images; of any thread."""
        with self._lock:
            self.decoded[decoder] += images

    def wasted(self, kind: str) -> None:
        """A row of this kind ran ahead of the answer and was not needed."""
        self.executed[kind] -= 1
        self.executed["speculative"] += 1

    @contextmanager
    def span(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Times a span under `name` and marks it for NVTX."""
        on_gpu = device is not None and device.type == "cuda"
        marks = [_mark(device)] if self.record and on_gpu else []
        start = time.perf_counter()
        with nvtx.annotate(name, domain="rollflow"):
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
