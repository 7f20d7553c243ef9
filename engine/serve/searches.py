"""Searches as jobs: /v1/searches, and what is told of each."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response

from rollflow.errors import shown
from rollflow.serve import fields, sse
from rollflow.serve.counter import FORMATS, Counter, finite
from rollflow.serve.failures import Failure
from rollflow.serve.limits import read_json
from rollflow.serve.orders import Ordered, Progress

LONGEST_KEY = 255  # characters of an Idempotency-Key
MOST_LISTED = 100


def told(order: Ordered, call: Call, counter: Counter) -> dict[str, Any]:
    """A search as JSON."""
    found: dict[str, Any] = {
        "id": order.id,
        "object": "search",
        "status": order.status,
        "created_at": int(order.created),
        "request": order.request,
        "budget": order.budget or order.request.get("nfe"),
        "progress": finite(order.progress._asdict()),
        "improvements": [
            {"nfe": nfe, "reward": finite(reward), "seconds": seconds} for nfe, reward, seconds in order.improvements
        ],
        "result": finite(order.result),
        "error": None,
        "image": counter.address(call, order) if order.result is not None else None,
    }
    if order.status == "failed" or (order.done and order.error is not None and order.result is None):
        found["error"] = finite(order.error)
    return found


async def create(call: Call, counter: Counter, owner: str) -> Response:
    """Hands in a search and answers at once, 202; the same Idempotency-Key gives the same search."""
    with counter.admitting():
        key = _key(call)
        body = await read_json(call, counter.settings.max_body)
        asked = fields.search(body, counter.settings)
        (order,) = await counter.place(asked, owner, key, call.headers.get("traceparent"))
    return JSONResponse(told(order, call, counter), 202, {"Location": f"/v1/searches/{order.id}"})


async def listed(call: Call, counter: Counter, owner: str) -> Response:
    """The owner's latest searches, newest first."""
    given = call.query_params.get("limit", "20")
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:9]) <= MOST_LISTED):
        raise Failure(
            f"limit={shown(given)}: it must be a whole number from 1 to {MOST_LISTED}", 400, "limit", "invalid_value"
        )
    found = await counter.desk.listed(owner, int(given))
    return JSONResponse({"object": "list", "data": [told(one, call, counter) for one in found]})


async def show(call: Call, counter: Counter, owner: str) -> Response:
    """How far a search is, and what it found."""
    return JSONResponse(told(_order(call, counter, owner), call, counter))


async def delete(call: Call, counter: Counter, owner: str) -> Response:
    """Ends a search with the best that it has found; one that is over stays as it is."""
    order = _order(call, counter, owner)
    if await order.cancel():
        await order.over()
    return JSONResponse(told(order, call, counter))


async def image(call: Call, counter: Counter, owner: str) -> Response:
    """The image of a search: the result's, or while it runs the best so far, decoded now."""
    order = _order(call, counter, owner)
    result = order.result
    file = await order.image() if result is not None else None if order.done else await order.preview()
    if file is None and result is None and order.result is not None:  # it ended meanwhile
        result, file = order.result, await order.image()
    if file is None:
        why = "nothing is there yet" if not order.done else "it found none, or it is no longer kept"
        raise Failure(f"the search {order.id} has no image: {why}", 404, None, "no_image")
    kind = str((result or {}).get("format", "png"))
    headers = {"Cache-Control": "no-store" if result is None else "private, max-age=3600"}
    headers["Content-Disposition"] = f'inline; filename="{order.id}.{kind}"'
    return Response(file, 200, headers, FORMATS[kind])


async def events(call: Call, counter: Counter, owner: str) -> Response:
    """Improvements as they come and the end, as server-sent events; with ?every=1 also how far it is in between.

    An event's id is its NFE; a client that comes again with it as Last-Event-ID (or ?after=) gets what followed.
    """
    order = _order(call, counter, owner)
    given = call.headers.get("last-event-id") or call.query_params.get("after") or "-1"
    if not given.removeprefix("-").isdigit() or not given.isascii() or len(given) > 15:
        raise Failure(f"Last-Event-ID {shown(given)}: it must be the id of an event, a number of NFE", 400, "after")
    every = call.query_params.get("every", "0") not in ("0", "false")
    return sse.EventStream(_told(call, counter, order, int(given), every), counter.settings.heartbeat)


async def _told(call: Call, counter: Counter, order: Ordered, after: int, every: bool) -> AsyncGenerator[bytes, None]:
    best = max((reward for nfe, reward, _ in order.improvements if nfe <= after), default=-math.inf)
    async for one in order.events(after, every):
        if isinstance(one, Progress):
            better, best = one.best_reward > best, max(best, one.best_reward)
            about = finite(one._asdict()) | {"id": order.id, "status": order.status}
            yield sse.event("search.improved" if better else "search.progress", about, one.nfe if better else None)
    if order.status not in ("queued", "running"):  # of one that goes on after a restart the client asks again
        yield sse.event(f"search.{order.status}", told(order, call, counter), order.progress.nfe)


def _key(call: Call) -> str | None:
    key = call.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= LONGEST_KEY and key.isprintable()):
        raise Failure(
            f"Idempotency-Key {shown(key)}: it must be 1 to {LONGEST_KEY} characters that can be printed",
            400,
            None,
            "invalid_idempotency_key",
        )
    return key


def _order(call: Call, counter: Counter, owner: str) -> Ordered:
    id = call.path_params["id"]
    order = counter.found(id, owner)
    if order is None:
        raise Failure(f"there is no search {shown(id)}: it is not known, or no longer kept", 404, None, "not_found")
    return order
