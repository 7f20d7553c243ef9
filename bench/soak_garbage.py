"""What no server should have to read: bad JSON, unknown fields, huge and half bodies, wrong methods, noise."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rollflow.bench.http_loads import IMAGES
from rollflow.bench.soak_books import Books

if TYPE_CHECKING:
    import httpx

HUGE = 16 << 20  # bytes
PIECE = 1 << 16
GOOD = {"prompt": "two red circles", "nfe": 20, "seed": 0}
BAD_BODIES: dict[str, bytes] = {
    "no JSON": b"{'prompt': two red circles",
    "half JSON": b'{"prompt": "two red',
    "nothing": b"",
    "no object": b"[1, 2, 3]",
    "not UTF-8": b'{"prompt": "\xff\xfe\xfa"}',
    "deep": b"[" * 50_000 + b"]" * 50_000,
    "not a number": b'{"prompt": "two red circles", "nfe": NaN}',
    "a huge number": b'{"prompt": "two red circles", "nfe": ' + b"9" * 5000 + b"}",
    **{
        name: json.dumps(body).encode()
        for name, body in {
            "no prompt": {"nfe": 20},
            "an unknown field": {**GOOD, "nfee": 3},
            "a pickle": {**GOOD, "reward": "__import__('os').system('true')"},
            "no budget": {**GOOD, "nfe": -1},
            "a word for a number": {**GOOD, "nfe": "many"},
            "an endless budget": {**GOOD, "nfe": 10**12},
            "many images": {**GOOD, "n": 10**9},
            "an unknown method": {**GOOD, "method": "magic"},
            "an unknown reward": {**GOOD, "reward": "/etc/passwd"},
            "a prompt that is none": {**GOOD, "prompt": {"a": 1}},
            "a long prompt": {**GOOD, "prompt": "circle " * 100_000},
        }.items()
    },
}
BAD_CALLS: dict[str, tuple[str, str]] = {
    "wrong method": ("PUT", IMAGES),
    "wrong method of a search": ("PATCH", "/v1/searches"),
    "no such path": ("GET", "/v1/nothing"),
    "no such search": ("GET", "/v1/searches/srch_0000"),
    "events of no search": ("GET", "/v1/searches/srch_0000/events"),
    "an image of no search": ("GET", "/v1/searches/..%2f..%2fetc%2fpasswd/image"),
    "cancelling no search": ("DELETE", "/v1/searches/srch_0000"),
}
NOISE: dict[str, bytes] = {
    "noise": bytes(range(256)) * 4,
    "half a body": b"POST /v1/searches HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{",
    "half a head": b"POST /v1/searches HTTP/1.1\r\nHost: a\r\nContent-Le",
    "a bad length": b"POST /v1/searches HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n{}",
    "no chunks": b"POST /v1/searches HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "nothing at all": b"",
}
KINDS = (*BAD_BODIES, *BAD_CALLS, *NOISE, "a huge body")


async def send(client: httpx.AsyncClient, books: Books, dice: random.Random) -> str:
    """Sends one of them; it is a fault where the answer is not an error of the client's, in one line of JSON."""
    kind = dice.choice(KINDS)
    path = dice.choice((IMAGES, "/v1/searches"))
    if kind in NOISE:
        return await _noise(client, NOISE[kind], dice)
    if kind == "a huge body":
        return await _huge(client, books, path)
    if kind in BAD_CALLS:
        method, path = BAD_CALLS[kind]
        answer = await client.request(method, path)
    else:
        answer = await client.post(path, content=BAD_BODIES[kind], headers={"Content-Type": "application/json"})
    check(books, kind, answer.status_code, answer.content)
    return "refused"


def check(books: Books, kind: str, status: int, content: bytes) -> None:
    """Writes down what is wrong with the answer to something bad."""
    if not 400 <= status < 500:
        books.fault(f"garbage ({kind}): {status} {content[:100]!r}")
    elif b"Traceback" in content:
        books.fault(f"garbage ({kind}): a traceback")
    else:
        try:
            told: Any = json.loads(content)
        except ValueError:
            told = None
        if not isinstance(told, dict) or "error" not in told:
            books.fault(f"garbage ({kind}): {status} without an error in JSON, {content[:100]!r}")


async def _huge(client: httpx.AsyncClient, books: Books, path: str) -> str:
    import httpx

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(HUGE // PIECE):
            yield b"a" * PIECE

    try:
        answer = await client.post(path, content=pieces(), headers={"Content-Type": "application/json"})
    except httpx.TransportError:  # the server does not read on, which is as good
        return "cut off"
    check(books, "a huge body", answer.status_code, answer.content)
    return "refused"


async def _noise(client: httpx.AsyncClient, noise: bytes, dice: random.Random) -> str:
    """Bytes on a connection that is closed soon, whatever comes back."""
    where = urlsplit(str(client.base_url))
    try:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(noise)
        await writer.drain()
        await asyncio.sleep(dice.random())
        del reader
        writer.close()
        await writer.wait_closed()
    except OSError:
        return "cut off"
    return "sent"
