"""Who is woken when something changes: threads by their events, tasks by their asyncio loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Watchers:
    """Functions that are called whenever something changes; of any thread. They must return at once."""

    def __init__(self) -> None:
        self._wakes: tuple[Callable[[], None], ...] = ()
        self._lock = threading.Lock()

    def wake(self) -> None:
        """Calls all."""
        for wake in self._wakes:
            wake()

    @contextmanager
    def watched(self, wake: Callable[[], None]) -> Iterator[None]:
        """Calls `wake`, too, inside of the context."""
        with self._lock:
            self._wakes = (*self._wakes, wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakes = tuple(other for other in self._wakes if other is not wake)


class Wake:
    """Wakes a task of an asyncio loop from any thread; several calls before it runs are one."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._event, self._asked = loop, asyncio.Event(), False

    def __call__(self) -> None:
        if not self._asked:
            self._asked = True
            with suppress(RuntimeError):  # of a loop that was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Until somebody called."""
        await self._event.wait()
        self._asked = False
        self._event.clear()
