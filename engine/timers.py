"""What is to happen at a time, and how much happened lately."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from itertools import count
from threading import Lock
from typing import Any

LONGEST = 3600.0  # seconds of one wait: a queue takes no timeout of centuries
WINDOW = 10.0  # seconds over which a rate is taken


class Timer:
    """A call that was asked for."""

    __slots__ = ("args", "call")

    def __init__(self, call: Callable[..., None], args: tuple[Any, ...]):
        self.call: Callable[..., None] | None = call
        self.args = args


class Timers:
    """Calls at times of a clock, made by whoever asks which are due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers, self._cancelled = count(), 0  # how many in the heap are to be skipped

    def __len__(self) -> int:
        """How many calls are to come."""
        return len(self._heap) - self._cancelled

    def at(self, when: float, call: Callable[..., None], *args: Any) -> Timer:
        """Asks for a call at `when`; one at a time that is not finite never comes."""
        timer = Timer(call, args)
        if math.isfinite(when):
            heapq.heappush(self._heap, (when, next(self._numbers), timer))
        else:
            timer.call = None  # so that to cancel it changes nothing
        return timer

    def cancel(self, timer: Timer) -> None:
        """Takes a call back, if it was not made yet; what it referred to is let go at once."""
        if timer.call is None:
            return
        timer.call, timer.args = None, ()
        self._cancelled += 1
        if 2 * self._cancelled > len(self._heap):  # far deadlines of requests that are long over
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    @property
    def due(self) -> float | None:
        """When the next call is due; None where none is to come."""
        while self._heap and self._heap[0][2].call is None:
            self._pop()
        return self._heap[0][0] if self._heap else None

    def wait(self, now: float, most: float | None) -> float | None:
        """Seconds until the next call is due, at most `most`; None where nothing is to be waited for."""
        if (due := self.due) is None:
            return most
        left = min(LONGEST, max(0.0, due - now))
        return left if most is None else min(left, most)

    def run(self, now: float) -> None:
        """Makes every call that is due."""
        while self._heap and self._heap[0][0] <= now:
            timer = self._pop()
            call, timer.call = timer.call, None  # a call that was made cannot be cancelled any more
            if call is not None:
                call(*timer.args)

    def _pop(self) -> Timer:
        timer = heapq.heappop(self._heap)[2]
        self._cancelled -= timer.call is None
        return timer


class Rate:
    """How many a second, over the last `WINDOW` seconds; of any thread."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, int]] = deque()
        self._sum, self._lock = 0, Lock()

    def add(self, now: float, number: int) -> None:
        """So many, now."""
        with self._lock:
            self._events.append((now, number))
            self._sum += number
            self._trim(now)

    def value(self, now: float) -> float:
        """How many a second."""
        with self._lock:
            self._trim(now)
            if not self._events:
                return 0.0
            return self._sum / min(WINDOW, max(1e-3, now - self._events[0][0] + 1e-3))

    def _trim(self, now: float) -> None:
        while self._events and self._events[0][0] < now - WINDOW:
            self._sum -= self._events.popleft()[1]
