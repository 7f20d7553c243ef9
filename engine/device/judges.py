"""Whose turn it is at a reward, and on how many threads rewards are called.

Most rewards may be called by one thread at a time. Calls that wait for one another wait in a line, not on a thread; a
call that hangs keeps its own line waiting until it is given up, and never that of another reward.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Protocol, runtime_checkable

JUDGES = 1  # threads from the start: one that works again and again is faster than several in turn; each further
# reward that is busy at the same time gets one more
MOST = 256  # threads; rewards beyond them wait for one
CONCURRENT = 8  # calls of one reward at a time, where it says that it is concurrent


@runtime_checkable
class Pool(Protocol):
    """Threads that work; see `rollflow.device.workers.Threads`."""

    threads: list[threading.Thread]

    def post(self, work: Callable[..., Any], *args: Any) -> None:
        """Does work on one of them."""
        ...

    def fill(self, count: int) -> None:
        """Starts threads until there are so many."""
        ...

    def give_up(self, thread: threading.Thread) -> None:
        """Counts no more on one of them."""
        ...


class Turn:
    """One call's turn at a target.

    Attributes:
        state: "waiting", then "running"; in the end "over" or "abandoned".
        thread: which runs it.
    """

    __slots__ = ("key", "pool", "start", "state", "target", "thread")

    def __init__(self, key: tuple[int, bool], target: Any, pool: Pool):
        self.key, self.target, self.pool = key, target, pool  # the target stays alive, and its id its own
        self.state, self.thread = "waiting", threading.current_thread()
        self.start: Callable[[], None] | None = None


class _Line:
    """Turns at one target, in order."""

    __slots__ = ("running", "waiting")

    def __init__(self) -> None:
        self.running, self.waiting = 0, deque[Turn]()


class Judges:
    """Lines of turns, one for each target, and the threads that they are taken on.

    A target is a function or an object that is called; of a method it is the object, whichever method is called.

    Args:
        pool: the threads, of which more are started as they are needed.
    """

    def __init__(self, pool: Pool):
        self._pool, self._lock, self._busy = pool, threading.Lock(), 0
        self._lines: dict[tuple[int, bool], _Line] = {}

    @property
    def needed(self) -> int:
        """How many threads there should be."""
        return min(MOST, max(JUDGES, self._busy))

    def post(self, target: Any, concurrent: bool, work: Callable[..., Any], *args: Any) -> None:
        """Does `work(turn, *args)` on a thread when it is its turn; `work` calls `end` when the target is free again.

        Turns at a target follow one another in order; at one that is `concurrent`, `CONCURRENT` of them at a time.
        """
        target = _owner(target)
        turn = Turn((id(target), concurrent), target, self._pool)
        turn.start = partial(self._pool.post, self._do, turn, work, args)
        self._enter(turn)
        if self.needed > len(self._pool.threads):
            self._pool.fill(self.needed)

    def hold(self, target: Any, concurrent: bool, pool: Pool) -> Turn:
        """Waits, on a thread of another pool, until it is its turn; the caller must call `end`."""
        target = _owner(target)
        turn, ready = Turn((id(target), False), target, pool), threading.Event()
        if concurrent:
            turn.key = (id(turn), True)  # a line of its own: it waits for nobody
        turn.start = ready.set
        self._enter(turn)
        ready.wait()
        return turn

    def end(self, turn: Turn) -> bool:
        """A turn is over, and the next begins; False if it was given up, or has ended before."""
        with self._lock:
            if turn.state != "running":
                return False
            turn.state = "over"
            self._leave(turn)
            return True

    def abandon(self, turn: Turn) -> bool:
        """Gives up a turn and its thread, which may never come back; False if the turn is over.

        The thread learns of it when it calls `end`: it cannot have taken up anything else in between.
        """
        with self._lock:
            if turn.state != "running":
                return False
            turn.state = "abandoned"
            turn.pool.give_up(turn.thread)
            self._leave(turn)
            return True

    def _do(self, turn: Turn, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
        turn.thread = threading.current_thread()
        try:
            work(turn, *args)
        finally:  # a fault of the work must not keep the line waiting
            self.end(turn)

    def _enter(self, turn: Turn) -> None:
        with self._lock:
            line = self._lines.get(turn.key)
            if line is None:
                line = self._lines[turn.key] = _Line()
            line.waiting.append(turn)
            self._advance(turn.key, line)

    def _leave(self, turn: Turn) -> None:
        line = self._lines[turn.key]
        line.running -= 1
        self._busy -= turn.pool is self._pool
        self._advance(turn.key, line)

    def _advance(self, key: tuple[int, bool], line: _Line) -> None:
        while line.waiting and line.running < (CONCURRENT if key[1] else 1):
            turn = line.waiting.popleft()
            turn.state = "running"
            line.running += 1
            self._busy += turn.pool is self._pool
            start, turn.start = turn.start, None  # which refers to the turn, and would keep it, and its images
            assert start is not None
            start()
        if not line.running:
            del self._lines[key]


def _owner(target: Any) -> Any:
    return target.__self__ if isinstance(target, MethodType) else target
