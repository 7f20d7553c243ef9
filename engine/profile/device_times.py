"""Device times of spans by CUDA events, read when the device is past them: nothing ever waits for them.

`cudaEventElapsedTime` gives the milliseconds between two events in single precision: the event that others are counted
from is renewed every minute, or an hour later it would tell no more than milliseconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

RENEWED = 60.0  # seconds after which another event is counted from
WAITING = 4096  # pairs that may wait; older ones are given up


class Timed(NamedTuple):
    """A span as the device ran it: what it was of, when it began on the host's clock, and seconds."""

    of: Any
    started: float
    seconds: float


class DeviceTimes:
    """Pairs of events around spans of one device. The caller sees to it that one thread at a time is in here.

    Args:
        make: makes an event, with `record()`, `query()`, `synchronize()` and `elapsed_time(other)`.
        clock: seconds, of the host.
    """

    def __init__(self, make: Callable[[], Any] | None = None, clock: Callable[[], float] = time.perf_counter):
        self._make, self._clock = make or _event, clock
        self._waiting: deque[tuple[Any, Any, Any]] = deque()
        self._free: list[Any] = []
        self._base: tuple[Any, float] | None = None  # an event, and when it was on the host's clock

    def mark(self) -> Any:
        """An event at this place of the current stream."""
        if self._base is None:
            base = self._make()
            base.record()
            base.synchronize()  # once
            self._base = base, self._clock()
        event = self._free.pop() if self._free else self._make()
        event.record()
        return event

    def between(self, of: Any, start: Any, end: Any) -> None:
        """A span lies between two marks."""
        self._waiting.append((of, start, end))
        if len(self._waiting) > WAITING:
            self._waiting.popleft()

    def past(self, wait: bool = False) -> Iterator[Timed]:
        """The spans that the device is done with, in the order in which they ended on the host; with `wait` all.

        Streams do not wait for one another: a span may be over before one that came earlier.
        """
        for _ in range(len(self._waiting)):
            of, start, end = pair = self._waiting.popleft()
            if wait:
                end.synchronize()
            elif not end.query():
                self._waiting.append(pair)
                continue
            assert self._base is not None, "there was a mark"
            base, when = self._base
            started = when + base.elapsed_time(start) / 1000
            yield Timed(of, started, start.elapsed_time(end) / 1000)
            if started - when > RENEWED:
                self._base = start, started
            else:
                self._free.append(start)
            self._free.append(end)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True, blocking=True)  # a thread that waits leaves its core to others
