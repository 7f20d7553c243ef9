"""What a client may ask of a server: sizes of what it sends, budgets, and how often."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as Call

from rollflow.errors import RequestError, shown
from rollflow.request import Request
from rollflow.serve.failures import Failure, later

PATIENCE = 30.0  # seconds within which a body has to be there
SURPLUS = 2**23  # bytes beyond the limit that are read and dropped, so that the client is there to read the answer


@dataclass(frozen=True)
class ServeSettings:
    """How a server serves.

    Attributes:
        model: what the served model is called.
        rewards: what requests may name: names, with options that only steer what is measured, and whole specs such as
            "http:url=http://judge:8000/score"; None is what `rollflow.serve.allowed.usual` says. One that says nothing
            of a reward gets `Request.reward`, or where that is not among them, the first.
        keys: the file of API keys; None: none are asked for.
        host: where the server listens.
        max_body: bytes of a request's body.
        max_prompt: characters of a prompt.
        max_n: images of a request.
        max_nfe: function evaluations of a search.
        max_pixels: of an image, or of a clip's frames together; `own` is what a request that leaves a side to the model
            counts with.
        own: the model's own height, width and frames, as far as they are known.
        max_priority: the highest priority that a request may have; lower ones, also below 0, are everybody's.
        max_seconds: seconds that a search may ask for in place of function evaluations.
        requests_per_minute: of each key, or of all clients where there are no keys; None: any number.
        heartbeat: seconds without an event after which a stream sends a comment, so that proxies keep it.
    """

    model: str = "shapes"
    rewards: tuple[str, ...] | None = None
    keys: str | None = None
    host: str = "127.0.0.1"
    max_body: int = 2**20
    max_prompt: int = 4000
    max_n: int = 16
    max_nfe: int = 10_000
    max_pixels: int = 2048 * 2048
    own: tuple[int, int, int] = (512, 512, 1)
    max_priority: int = 0
    max_seconds: float = 600.0
    requests_per_minute: int | None = None
    heartbeat: float = 15.0

    def __post_init__(self) -> None:
        above = ("max_body", "max_prompt", "max_n", "max_nfe", "max_pixels", "max_seconds", "requests_per_minute")
        for name in (*above, "heartbeat"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"{name}={shown(value)}: it must be above 0")
        if self.max_priority < 0:  # that of a request which names none
            raise RequestError(f"max_priority={shown(self.max_priority)}: it must be at least 0")

    @property
    def reward(self) -> str:
        """That of a request which names none."""
        allowed = self.rewards
        return Request.reward if not allowed or Request.reward in allowed else allowed[0]


class Rate:
    """So many requests a minute for each owner, by a bucket that holds a minute's and fills steadily.

    Args:
        per_minute: how many; None: any number.
        clock: seconds.
    """

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic):
        self._most, self._clock = per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}  # by owner: requests left, and when that was

    def take(self, owner: str) -> None:
        """Counts one request; raises `Failure` (429) where there have been too many."""
        if self._most is None:
            return
        now = self._clock()
        left, since = self._left.get(owner, (float(self._most), now))
        left = min(float(self._most), left + (now - since) * self._most / 60)
        if left < 1:
            self._left[owner] = left, now
            seconds = (1 - left) * 60 / self._most
            raise Failure(
                f"more than {self._most} requests a minute: come again in {seconds:.1f} s",
                429,
                None,
                "rate_limit_exceeded",
                later(seconds),
            )
        self._left[owner] = left - 1, now


async def read_json(call: Call, most: int) -> dict[str, Any]:
    """The body of a request as a JSON object.

    Raises:
        Failure: it is none (400), too large (413), of another type (415), or not there in time (408).
    """
    kind = call.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Failure(
            f"Content-Type {shown(kind)}: send JSON, with Content-Type: application/json", 415, None, "unsupported_type"
        )
    try:
        body = await asyncio.wait_for(_read(call, most), PATIENCE)
    except (asyncio.TimeoutError, TimeoutError):
        raise Failure(f"the body did not come within {PATIENCE:g} s: send it again", 408, None, "timeout") from None
    except ClientDisconnect:
        raise Failure("the client has gone", 400, None, "disconnected") from None
    return parsed(body)


def parsed(body: bytes) -> dict[str, Any]:
    """A JSON object out of bytes; raises `Failure` (400) for what is none."""
    try:
        found = json.loads(body.decode(), parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)
        json.dumps(found, ensure_ascii=False).encode()  # a half of a surrogate pair is no character
    except UnicodeError:
        raise Failure("the body is no UTF-8 text: send JSON in UTF-8", 400, None, "invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise Failure(f"the body is no JSON ({_told(error)}): send an object", 400, None, "invalid_json") from None
    if not isinstance(found, dict):
        raise Failure(f"the body is {shown(found)}: send a JSON object of fields", 400, None, "invalid_json")
    return found


async def _read(call: Call, most: int) -> bytes:
    told = call.headers.get("content-length", "0")
    size, parts = 0, list[bytes]()
    async for part in call.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        elif size > most + SURPLUS:
            break
    if size > most:
        given = f"{told} bytes" if told.isdigit() and int(told) > most else f"more than {most} bytes"
        raise Failure(f"the body has {given}: at most {most} are read", 413, None, "body_too_large")
    return b"".join(parts)


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field is given twice")
    return found


def _told(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
