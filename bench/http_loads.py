"""Open and closed loops over HTTP: what became of every request, on the clock of the event loop.

As in `rollflow.bench.loads`, but requests are answers to come and not jobs: each is either served, refused by a server
that says when to come again, or lost. Lost is whatever is none of the others, so that nothing can go missing unseen.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Float
from numpy import ndarray

from rollflow.errors import RequestError, RollflowError, line, said

if TYPE_CHECKING:
    import httpx

Fate = Literal["served", "refused", "lost"]
REFUSALS = (429, 503)  # with Retry-After: the server is full, or drains
IDLE = 2.0  # seconds after which a connection is not used again: before a server closes it (uvicorn: 5 s)
IMAGES = "/v1/images/generations"


class Unaccounted(RollflowError):
    """Nobody knows what became of a request."""


@dataclass(frozen=True)
class Answer:
    """What a server made of a request.

    Attributes:
        fate: "served" with an image; "refused" with 429 or 503 and when to come again; "lost" in any other case.
        detail: why it was lost.
    """

    fate: Fate
    detail: str = ""


Send = Callable[[int], Awaitable[Answer]]


@dataclass
class Sent:
    """One request, in seconds of the event loop's clock.

    Attributes:
        due: when it was to be sent. Latencies count from here, also where the client was late (coordinated omission).
        sent: when it was sent.
        ended: when its answer was there in full.
        answer: what it was.
    """

    due: float
    sent: float = 0.0
    ended: float = 0.0
    answer: Answer = Answer("lost", "no answer came")

    @property
    def latency(self) -> float:
        """Seconds from when it was to be sent."""
        return self.ended - self.due


async def open_loop(send: Send, arrivals: Float[ndarray, " request"]) -> list[Sent]:
    """Sends request i at `arrivals[i]` seconds from now, whatever became of the others; waits for all answers."""
    clock = asyncio.get_running_loop().time
    start = clock()
    requests = [Sent(start + float(arrival)) for arrival in arrivals]
    running = []
    for i, request in enumerate(requests):
        await asyncio.sleep(max(0.0, request.due - clock()))
        running.append(asyncio.create_task(_follow(send, i, request)))
    await asyncio.gather(*running)
    return requests


async def closed_loop(send: Send, count: int, concurrency: int, seconds: float, first: int = 0) -> list[Sent]:
    """Keeps `concurrency` requests in flight until `count` were sent or `seconds` are over; waits for all answers.

    They are numbered from `first`, and returned in the order in which they were sent.
    """
    clock = asyncio.get_running_loop().time
    start, requests = clock(), list[Sent]()

    async def client() -> None:
        while len(requests) < count and clock() - start < seconds:
            request = Sent(clock())
            requests.append(request)
            await _follow(send, first + len(requests) - 1, request)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return requests


async def _follow(send: Send, i: int, request: Sent) -> None:
    clock = asyncio.get_running_loop().time
    request.sent = clock()
    request.answer = await send(i)
    request.ended = clock()


def check_accounts(requests: Sequence[Sent], what: str) -> None:
    """Makes sure that of every request it is known what became of it.

    Raises:
        Unaccounted: it is not, of one or more.
    """
    if lost := [request.answer.detail for request in requests if request.answer.fate == "lost"]:
        raise Unaccounted(f"{len(lost)} of {len(requests)} requests are unaccounted for ({what}), such as: {lost[0]}")


def rate(ended: Sequence[float], ends: int) -> float:
    """Ends a second, without the first and the last `ends` of them: there a server fills and empties.

    Raises:
        RequestError: too few to measure a rate.
    """
    ordered = sorted(ended)
    first, last = max(ends, 1) - 1, len(ordered) - ends - 1
    if last <= first or ordered[last] <= ordered[first]:
        raise RequestError(f"{len(ordered)} requests ended, too few to measure: more than {2 * ends + 1} are needed")
    return (last - first) / (ordered[last] - ordered[first])


def connected(url: str, patience: float) -> httpx.AsyncClient:
    """A client with a connection for every request in flight, which gives up after `patience` seconds of silence.

    Raises:
        RequestError: httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise RequestError("httpx is not installed: pip install 'rollflow[serve]'") from error
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE)
    return httpx.AsyncClient(base_url=url, timeout=patience, limits=limits, trust_env=False)


def sender(client: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], path: str = IMAGES) -> Send:
    """Posts body `i`, in turns, and makes sure that an image came back."""
    import httpx

    async def send(i: int) -> Answer:
        try:
            answer = await client.post(path, json=bodies[i % len(bodies)])
            return answer_of(answer.status_code, answer.headers, answer.content)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Answer("lost", said(error))

    return send


def answer_of(status: int, headers: Mapping[str, str], content: bytes) -> Answer:
    """What an answer to `POST /v1/images/generations` says."""
    if status in REFUSALS:
        if "retry-after" in {name.lower() for name in headers}:
            return Answer("refused")
        return Answer("lost", f"{status} without Retry-After")
    if status != 200:
        return Answer("lost", line(f"{status}: {content[:200].decode(errors='replace')}", 200))
    try:
        images = json.loads(content)["data"]
    except (ValueError, TypeError, KeyError):
        return Answer("lost", "200, but what came is no JSON with data")
    if not images or not all(image.get("b64_json") or image.get("url") for image in images):
        return Answer("lost", "200, but without an image")
    return Answer("served")
