"""The NFE ledger: what the device ran, and where the time went. NVTX ranges mark the same spans for Nsight."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import nvtx
import torch


class Ledger:
    """Counts of executed rows by kind and seconds by span, over the life of an engine.

    Spans are host times of the thread that does the work; several threads' spans add up to more than the wall time. On
    CUDA, work is asynchronous: set `synchronize` to make spans measure the device, at the price of its pipelining.

    Attributes:
        executed: rows by kind: committed, guided, finish, speculative (ran ahead and was not needed), padding.
        decoded: images by decoder, "full" or "preview".
        ahead: rows that ran ahead of an answer, needed or not.
        buckets: batches by size.
        seconds: by span.
        ticks: batches.
        network_rows: rows of the network, padding included: two an evaluation with classifier-free guidance.
    """

    def __init__(self, synchronize: bool = False):
        self.synchronize, self._lock = synchronize, Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.executed: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self.ahead = 0
        self.buckets: Counter[int] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.ticks = self.network_rows = 0

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
        start = time.perf_counter()
        with nvtx.annotate(name, domain="rollflow"):
            yield
            if self.synchronize and device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
        with self._lock:
            self.seconds[name] += time.perf_counter() - start
