"""Previews of searches: one look at a time for all who ask, since each is a decoding on the device."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from rollflow.serve.orders import Ordered

FRESH = 0.25  # seconds that a preview serves others who ask for it


class Previews:
    """Shares looks at searches.

    Args:
        look: gives the file of a search's best so far, None where there is none.
        clock: seconds.
    """

    def __init__(
        self, look: Callable[[Ordered], Coroutine[Any, Any, bytes | None]], clock: Callable[[], float] = time.monotonic
    ):
        self._look, self._clock = look, clock
        self._looks: dict[str, asyncio.Task[bytes | None]] = {}  # the last one of each search
        self._until: dict[str, float] = {}  # when it is no longer fresh

    async def get(self, order: Ordered) -> bytes | None:
        """The best so far of a search that runs, at most `FRESH` seconds old."""
        look = self._looks.get(order.id)
        if look is None or self._clock() >= self._until[order.id]:
            look = self._looks[order.id] = asyncio.get_running_loop().create_task(self._look(order))
            self._until[order.id] = math.inf
            look.add_done_callback(lambda _: self._seen(order.id))
        return await asyncio.shield(look)

    def forget(self, id: str) -> None:
        """It is over."""
        self._looks.pop(id, None)
        self._until.pop(id, None)

    def _seen(self, id: str) -> None:
        if id in self._until:
            self._until[id] = self._clock() + FRESH
