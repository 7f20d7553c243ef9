"""Searches that are over, in memory: for some time, and no more than so many and so large."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from rollflow.serve.orders import Ordered

MOST, MOST_BYTES = 20_000, 1 << 30  # searches, and the files of their images


class Ended:
    """Keeps searches after their end; the oldest are forgotten first.

    Args:
        keep: seconds.
        clock: seconds.
        forget: is told of each that goes.
    """

    def __init__(self, keep: float, clock: Callable[[], float], forget: Callable[[Ordered], None]):
        self._keep, self._clock, self._forget = keep, clock, forget
        self._found: OrderedDict[str, tuple[float, Ordered]] = OrderedDict()
        self._bytes = 0

    def add(self, order: Ordered) -> None:
        """Keeps one that is over now."""
        self._found[order.id] = self._clock(), order
        self._bytes += len(order.file or b"")
        self.trim()

    def get(self, id: str) -> Ordered | None:
        """One that is kept."""
        found = self._found.get(id)
        return None if found is None else found[1]

    def orders(self) -> list[Ordered]:
        """All that are kept, the oldest first."""
        return [order for _, order in self._found.values()]

    def trim(self) -> None:
        """Forgets those that are over for too long, and the oldest of too many."""
        before = self._clock() - self._keep
        while self._found:
            id, (ended, order) = next(iter(self._found.items()))
            if ended >= before and len(self._found) <= MOST and self._bytes <= MOST_BYTES:
                return
            del self._found[id]
            self._bytes -= len(order.file or b"")
            self._forget(order)
