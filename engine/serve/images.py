"""POST /v1/images/generations, in the shape of OpenAI's Images API."""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response

from rollflow.serve import fields, sse
from rollflow.serve.counter import Counter, cancel, finite
from rollflow.serve.failures import INTERNAL, Failure, ended
from rollflow.serve.limits import read_json
from rollflow.serve.orders import Ordered

LOG = logging.getLogger("rollflow")
TIMEOUT = "x-stainless-read-timeout"  # seconds that OpenAI's client waits for an answer
NO_TOKENS = {  # what OpenAI's client expects to read; a search has function evaluations, see `nfe`
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


async def generate(call: Call, counter: Counter, owner: str) -> Response:
    """Searches for images and answers with them, or with events until they are there.

    A client that goes cancels its searches, so that nothing would be there for its Idempotency-Key to find.
    """
    with counter.admitting():
        if "idempotency-key" in call.headers:
            what = "images are not kept for a second request: leave it out, or hand in a job at POST /v1/searches"
            raise Failure(f"Idempotency-Key: {what}", 400, None, "idempotency_key_unsupported")
        body = await read_json(call, counter.settings.max_body)
        asked = fields.images(body, counter.settings, call.headers.get(TIMEOUT))
        orders = await counter.place(asked, owner, parent=call.headers.get("traceparent"), fleeting=True)
    if asked.stream:  # every refusal came before this: a stream that has begun has been let in
        events = _events(call, counter, asked, orders)
        return sse.EventStream(events, counter.settings.heartbeat, partial(cancel, orders))
    try:
        told = await sse.unless_gone(call.receive, _all(call, counter, asked, orders))
    finally:
        await cancel(orders)
    return Response(status_code=499) if told is None else JSONResponse(told)


async def _all(call: Call, counter: Counter, asked: fields.Asked, orders: Sequence[Ordered]) -> dict[str, Any]:
    """The whole answer; raises `Failure` as soon as a search has failed."""
    await asyncio.gather(*map(_whole, orders))
    data = [await _datum(call, counter, asked, one) for one in orders]
    return {"created": int(time.time()), "data": data, **_shape(orders[0]), "model": counter.settings.model}


async def _whole(order: Ordered) -> None:
    """Until a search has an image; of one that was ended early, too."""
    await order.over()
    if order.result is None:
        raise ended(order.error)


async def _datum(call: Call, counter: Counter, asked: fields.Asked, order: Ordered) -> dict[str, Any]:
    """One image and what was found of it."""
    if asked.url:
        image: dict[str, Any] = {"url": counter.address(call, order)}
    else:
        image = {"b64_json": await _text(await order.image())}
    return {**image, "id": order.id, **finite(order.result or {})}


async def _text(file: bytes | None) -> str:
    if file is None:
        raise Failure("the image of the search is no longer kept", 410, None, "gone", {"x-should-retry": "false"})
    return base64.b64encode(file).decode()


def _shape(order: Ordered) -> dict[str, Any]:
    """What OpenAI's answers say of an image's form."""
    found = order.result or {}
    return {
        "size": f"{found['width']}x{found['height']}" if "width" in found else "auto",
        "output_format": found.get("format", "png"),
        "quality": "auto",
        "background": "opaque",
    }


async def _events(
    call: Call, counter: Counter, asked: fields.Asked, orders: Sequence[Ordered]
) -> AsyncGenerator[bytes, None]:
    """The events of all searches as they come, those that fail included."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(1)  # a slow client's events are made when it can take them

    async def tell(index: int, order: Ordered) -> None:
        try:
            async for event in _of_one(call, counter, asked, index, order):
                await queue.put(event)
        except Failure as failure:
            await queue.put(sse.event("error", failure.body))
        except Exception:
            LOG.exception("a stream of images met a fault of rollflow")
            await queue.put(sse.event("error", INTERNAL.body))
        await queue.put(None)

    tasks = [asyncio.ensure_future(tell(index, order)) for index, order in enumerate(orders)]
    left = len(tasks)
    try:
        while left:
            event = await queue.get()
            left -= event is None
            if event is not None:
                yield event
        yield sse.END
    finally:
        await sse.ended(*tasks)


async def _of_one(
    call: Call, counter: Counter, asked: fields.Asked, index: int, order: Ordered
) -> AsyncIterator[bytes]:
    """Images that get better, at even shares of the budget, and the final one."""
    sent = 0
    async for one in order.events(every=True) if asked.partial or asked.progress else _end_of(order):
        if isinstance(one, str):
            break
        about = {"id": order.id, "index": index, "nfe": one.nfe, "reward": finite(one.best_reward)}
        if asked.progress:
            yield sse.event("image_generation.progress", {"type": "image_generation.progress", **about})
        budget = order.budget or asked.nfe  # anew: that of a limited time is a guess until the search begins
        if sent < asked.partial and one.nfe * (asked.partial + 1) >= budget * (sent + 1):
            image = await order.preview()
            if image is not None and not order.done:
                name = "image_generation.partial_image"
                picture = {"b64_json": base64.b64encode(image).decode(), "partial_image_index": sent}
                told = {"type": name, **picture, **about, "created_at": int(time.time()), **_shape(order)}
                yield sse.event(name, {**told, "output_format": "png"})
                sent += 1
    await _whole(order)
    name = "image_generation.completed"
    told = {"type": name, **await _datum(call, counter, asked, order), "index": index, "created_at": int(time.time())}
    yield sse.event(name, {**told, **_shape(order), "usage": NO_TOKENS})


async def _end_of(order: Ordered) -> AsyncIterator[str]:
    """As `Ordered.events`, the end alone: nobody is woken before."""
    await order.over()
    yield "over"
