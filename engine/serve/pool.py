"""A pool of daemon threads: what hangs in one of them does not hold up the end of its process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Pool:
    """Runs calls on threads of its own, in the order in which they came.

    Unlike `ThreadPoolExecutor`, the interpreter does not wait for its threads. A call must not raise.

    Args:
        threads: how many; they are started with the first call.
        name: of the threads.
    """

    def __init__(self, threads: int, name: str):
        self._threads, self._name, self._started = threads, name, False
        self._queue: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._lock, self._closed = threading.Lock(), False

    def submit(self, call: Callable[[], Any]) -> None:
        """Runs a call as soon as a thread is free; nothing after `close`."""
        with self._lock:
            if self._closed:
                return
            if not self._started:
                self._started = True
                for _ in range(self._threads):
                    threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._queue.put(call)

    def close(self) -> None:
        """Drops what waits and ends the threads after what they do; does not wait for that."""
        with self._lock:
            self._closed = True
        for _ in range(self._threads):
            self._queue.put(None)

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            if not self._closed:
                call()
