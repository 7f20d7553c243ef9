"""What is to happen at a time, and how much happened lately."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

WINDOW = 10.0  # seconds over which a rate is taken
LONGEST_WAIT = 86400.0  # seconds: a queue does not take just any number, and waking up in vain once a day costs nothing


class Timers:
    """Calls at times of a clock, made by whoever asks which are due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Asks for a call at `when`."""
        heapq.heappush(self._heap, (when, next(self._numbers), call, args))

    def wait(self, now: float, most: float | None) -> float | None:
        """Seconds until the next call is due, at most `most`; None where nothing is to be waited for."""
        if not self._heap:
            return most
        left = min(LONGEST_WAIT, max(0.0, self._heap[0][0] - now))
        return left if most is None else min(left, most)

    def run(self, now: float) -> None:
        """Makes every call that is due."""
        while self._heap and self._heap[0][0] <= now:
            _, _, call, args = heapq.heappop(self._heap)
            call(*args)


class Rate:
    """How many a second, over the last `WINDOW` seconds."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, number: int) -> None:
        """So many, now."""
        self._events.append((now, number))
        self._sum += number
        self._trim(now)

    def value(self, now: float) -> float:
        """How many a second."""
        self._trim(now)
        if not self._events:
            return 0.0
        return self._sum / min(WINDOW, max(1e-3, now - self._events[0][0] + 1e-3))

    def _trim(self, now: float) -> None:
        while self._events and self._events[0][0] < now - WINDOW:
            self._sum -= self._events.popleft()[1]
