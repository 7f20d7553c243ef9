"""Server-sent events: how one is written, and an answer of them that ends when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
END = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"


def event(name: str, data: Mapping[str, Any], id: int | None = None) -> bytes:
    """One event; `id` is what a client that comes again names in Last-Event-ID."""
    numbered = "" if id is None else f"id: {id}\n"
    return f"{numbered}event: {name}\ndata: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n".encode()


async def gone(receive: Receive) -> None:
    """Until the client has closed its connection; its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """What comes of `work`; None where the client goes before, and the work is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        await ended(working, leaving)


async def ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends the events of a generator, and closes it at its end, or as soon as the client is gone.

    Args:
        events: what is sent; its `finally` hears of the end, however it comes.
        heartbeat: seconds without an event after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], heartbeat: float):
        self._events, self._heartbeat = events, heartbeat
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, as ASGI has it."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await _part(send, b": open\n\n")  # the client has its headers before anything is there to tell
        following = asyncio.ensure_future(anext(self._events))
        try:
            while True:
                done, _ = await asyncio.wait({following}, timeout=self._heartbeat)
                if not done:
                    await _part(send, ALIVE)
                    continue
                with suppress(StopAsyncIteration):
                    await _part(send, following.result())
                    following = asyncio.ensure_future(anext(self._events))
                    continue
                break
        finally:
            await ended(following)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})
