"""Threads for the callbacks of jobs: as many as are needed, so that a slow callback of one job holds up no other's."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

MOST = 8  # threads: as many callbacks may hang before others wait
LOG = logging.getLogger("rollflow")


class Callbacks:
    """Makes calls on daemon threads; calls of one owner follow one another, in the order in which they came.

    Attributes:
        threads: those that were started so far.
    """

    def __init__(self) -> None:
        self._lines: dict[object, deque[Callable[[], None]]] = {}
        self._ready: deque[object] = deque()  # owners whose next call nobody makes yet
        self._changed, self._idle, self._closed = threading.Condition(), 0, False
        self.threads: list[threading.Thread] = []
        self._add()  # at once: where no more can be started, this one makes all calls

    def post(self, owner: object, call: Callable[[], None]) -> bool:
        """Has a call made; False if it was closed, and nobody would make it."""
        with self._changed:
            if self._closed:
                return False
            if (line := self._lines.get(owner)) is not None:
                line.append(call)
                return True
            self._lines[owner] = deque([call])
            self._ready.append(owner)
            if self._idle < len(self._ready) and len(self.threads) < MOST:
                with suppress(RuntimeError):  # no more threads
                    self._add()
            self._changed.notify()
            return True

    def close(self, seconds: float) -> list[threading.Thread]:
        """Ends the threads when all calls are made; waits that long, and returns those that are still in a call."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        until = time.monotonic() + seconds
        waiting = [thread for thread in self.threads if thread is not threading.current_thread()]
        for thread in waiting:
            thread.join(max(0.0, until - time.monotonic()))
        return [thread for thread in waiting if thread.is_alive()]

    def _add(self) -> None:
        name = f"rollflow-callbacks-{len(self.threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        thread.start()
        self.threads.append(thread)

    def _work(self) -> None:
        while (owner := self._next()) is not None:
            try:
                self._lines[owner][0]()
            except BaseException:  # a call reports its own errors: this one is a fault, and nobody else would see it
                LOG.exception("a thread of rollflow met an error that its work should have reported")
            with self._changed:
                line = self._lines[owner]
                line.popleft()
                if line:
                    self._ready.append(owner)
                else:
                    del self._lines[owner]
            del owner, line  # an idle thread holds nothing

    def _next(self) -> object | None:
        """The owner whose call is to be made; waits for one. None when it was closed and nothing is left."""
        with self._changed:
            while not self._ready:
                if self._closed:
                    return None
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            return self._ready.popleft()
