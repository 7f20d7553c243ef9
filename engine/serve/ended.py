"""Searches that are over: how their end is kept, and in memory for some time, no more than so many and so large."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from rollflow.errors import LONGEST, EngineClosed, RollflowError, line, told
from rollflow.journal import Journal
from rollflow.serve.orders import TEXTS, Ordered, quoted

PAUSES = (0.1, 0.5, 2.0)  # seconds before an end that could not be written is written again
LOG = logging.getLogger("rollflow")
MOST, MOST_BYTES = 20_000, 1 << 30  # searches, and the files of their images
MOST_BESIDE = 1000  # searches, where a journal has them, too
ENOUGH = 12  # characters of such a text by which a message that has it is known


class Ended:
    """Keeps searches after their end; the oldest are forgotten first.

    Args:
        keep: seconds.
        clock: seconds.
        forget: is told of each that goes.
        most: how many.
    """

    def __init__(self, keep: float, clock: Callable[[], float], forget: Callable[[Ordered], None], most: int = MOST):
        self._keep, self._clock, self._forget, self._most = keep, clock, forget, most
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
            if ended >= before and len(self._found) <= self._most and self._bytes <= MOST_BYTES:
                return
            del self._found[id]
            self._bytes -= len(order.file or b"")
            self._forget(order)


def left(order: Ordered) -> dict[str, Any]:
    """The outcome of a search whose service has ended."""
    why = f"the service ended before the search {order.id} did: ask again"
    return {"status": "cancelled", "error": told(EngineClosed(why))}


def told_of(order: Ordered, error: Mapping[str, Any]) -> str:
    """Why a search failed, as a log may have it: one line without the words of its prompt."""
    message = str(error.get("message") or "it does not say why")
    for name, text in quoted(order.request):
        message = message.replace(text, f"<{name}>")
    for name in TEXTS:
        message = _without(message, str(order.request.get(name) or ""), f"<{name}>")
    return line(f"{error.get('type')}: {message}", LONGEST)


def _without(message: str, text: str, mark: str) -> str:
    """A message without a text, of which it may have the beginning alone; short ones may be words of the message."""
    parts, at = list[str](), 0
    if len(text) < ENOUGH:
        return message
    while (found := message.find(text[:ENOUGH], at)) >= 0:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(message[found:], text, strict=False)))
        parts += [message[at:found], mark]
        at = found + same
    return "".join([*parts, message[at:]])


async def write(journal: Journal, id: str, outcome: dict[str, Any], payload: bytes) -> bool:
    """Writes an end; False where that cannot be, as on a full disk: the result is there nevertheless."""
    for pause in (*PAUSES, None):
        try:
            await asyncio.wrap_future(_written(journal, id, outcome, payload))
            return True
        except RollflowError as error:
            if pause is None or isinstance(error, EngineClosed):
                LOG.exception("the end of the search %s could not be written: after a restart it runs again", id)
                return False
            await asyncio.sleep(pause)
    return False


def _written(journal: Journal, id: str, outcome: dict[str, Any], payload: bytes) -> concurrent.futures.Future[None]:
    found = outcome.get("result")
    beside = {"improvements": outcome.get("better", []), "level": outcome.get("level")}
    result = None if found is None else {**found, **beside}
    if outcome["status"] == "done":
        return journal.finish(id, result or {}, payload)
    return journal.fail(id, outcome["status"], outcome["error"], result=result, image=payload or None)
