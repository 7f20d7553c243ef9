"""Searches that a request of HTTP asks for: handed in together, told as JSON, and counted when they are over."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request as Call

from rollflow.errors import RollflowError, shown
from rollflow.request import Request
from rollflow.serve import fields
from rollflow.serve.desk import Desk
from rollflow.serve.failures import INTERNAL, Failure, refused
from rollflow.serve.keys import Keys
from rollflow.serve.limits import Rate, ServeSettings
from rollflow.serve.metrics import Metrics
from rollflow.serve.orders import Ordered
from rollflow.serve.tracing import Tracing

FORMATS = {"png": "image/png", "gif": "image/gif", "webp": "image/webp"}


class Counter:
    """Where requests are handed in: what endpoints share.

    Args:
        desk: runs the searches.
        settings: limits and names.
        keys: whose requests they are.
    """

    def __init__(self, desk: Desk, settings: ServeSettings, keys: Keys):
        self.desk, self.settings, self.keys = desk, settings, keys
        self.rate, self.metrics, self.tracing = Rate(settings.requests_per_minute), Metrics(desk), Tracing()
        desk.watch(self._count)
        self._followed: dict[str, asyncio.Task[None]] = {}  # by id: an idempotency key may find one again

    @contextmanager
    def admitting(self) -> Iterator[None]:
        """Counts a request for searches or images that is refused in this block, by the code of its answer."""
        try:
            yield
        except RollflowError as error:
            self.metrics.refused(refused(error).code)
            raise
        except Exception:
            self.metrics.refused(INTERNAL.code)
            raise

    async def place(
        self,
        asked: fields.Asked,
        owner: str,
        key: str | None = None,
        parent: str | None = None,
        fleeting: bool = False,
    ) -> list[Ordered]:
        """Hands in all searches of a request, or none.

        Args:
            asked: the searches.
            owner: whose they are.
            key: of the client, by which the same search is found again; of one search.
            parent: the trace that the client says it belongs to, in W3C's traceparent.
            fleeting: they are only for who waits for the answer, see `Desk.submit`.

        Raises:
            Failure: one of them was refused.
        """
        self.rate.take(owner)
        whole: Any = object()
        same = {"key": key, "owner": owner, "fleeting": fleeting, "sent": dict(asked.sent), "of": whole}
        placing = [self.desk.submit(one, **same) for one in asked.requests]
        found = await asyncio.gather(*placing, return_exceptions=True)
        placed = [one for one in found if isinstance(one, Ordered)]
        error = next((one for one in found if isinstance(one, BaseException)), None)
        if error is not None:
            await cancel(placed)
            if not isinstance(error, RollflowError):
                raise error
            first = asked.requests[0]
            failure = refused(error, fields.names(first.get("method")), first)
            own = self.settings.reward
            if failure.param in ("reward", "prompt") and "reward" not in asked.sent and own != Request.reward:
                what = f"{failure} ({shown(own)} judges requests that name no reward: name another one)"
                failure = Failure(what, failure.status, failure.param, failure.code, failure.headers)
            raise failure from error
        for one in placed:
            self._follow(one, parent)
        return placed

    def _follow(self, one: Ordered, parent: str | None) -> None:
        """Makes a span of a search, once, where there is a tracer."""
        if one.done or one.id in self._followed or (span := self.tracing.begin(one.request, parent)) is None:
            return
        task = self._followed[one.id] = asyncio.ensure_future(self._over(one, span))
        task.add_done_callback(lambda _: self._followed.pop(one.id))

    async def _over(self, one: Ordered, span: Any) -> None:
        await one.over()
        self.tracing.end(span, one.status, one.result, _times(one)[1])

    def _count(self, one: Ordered) -> None:
        """Counts a search that is over."""
        self.metrics.over(*_times(one))

    def found(self, id: str, owner: str) -> Ordered | None:
        """A search of an owner's."""
        one = self.desk.get(id)
        return one if one is not None and one.owner == owner else None

    def address(self, call: Call, one: Ordered) -> str:
        """Where the image of a search is to be had; with keys, signed by its owner's."""
        signature = self.keys.signature(one.owner, one.id)
        url = f"{call.url.scheme}://{call.url.netloc}/v1/searches/{one.id}/image"
        return f"{url}?signature={signature}" if signature else url


def _times(one: Ordered) -> tuple[float, float | None]:
    """Seconds from when a search was handed in to its end, and to its start where that is known.

    After a restart it is not: what a search has spent does not say when it first began.
    """
    seconds = max(0.0, (one.ended or one.created) - one.created)
    searched = None if one.again or one.ended is None else (one.result or {}).get("seconds")
    return seconds, None if searched is None else max(0.0, seconds - searched)


async def cancel(searches: Sequence[Ordered]) -> None:
    """Cancels those that are not over."""
    await asyncio.gather(*(one.cancel() for one in searches if not one.done))


def finite(value: Any) -> Any:
    """A value as JSON has it: numbers that are none are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def media_type(one: Ordered) -> str:
    """Of a search's image."""
    return FORMATS[str((one.result or {}).get("format", "png"))]
