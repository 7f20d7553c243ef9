"""Clients of a soak: they come, stream, vanish, cancel, come again and resume, and write down what became of it.

Each scenario is one visit. What it is about, and what it asks for, is drawn from the client's own dice.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rollflow.bench import prompt_sets
from rollflow.bench.http_loads import IMAGES, REFUSALS, answer_of
from rollflow.bench.soak_books import OVER, Books

if TYPE_CHECKING:
    import httpx

SEARCHES = "/v1/searches"
METHODS = ("rbf", "bon", "smc")
BUDGETS = (20, 30, 40, 60)
LONGEST_BREAK = 1.0  # seconds that a refused client stays away at most, to come again soon
POLL = 0.2
END = "[DONE]"  # the data of a last event of streams in OpenAI's shape


class Refused(Exception):
    """The server is full, or drains."""


class Event(NamedTuple):
    """A server-sent event."""

    name: str
    id: str
    data: str


@dataclass
class Customer:
    """A client.

    Attributes:
        client: its connections.
        books: where it writes down what it sees.
        dice: what it does and asks for.
        patience: seconds that an answer may take.
    """

    client: httpx.AsyncClient
    books: Books
    dice: random.Random
    patience: float

    async def visit(self) -> None:
        """One scenario, whatever becomes of it."""
        import httpx

        scenario = self.dice.choices([*SCENARIOS], [weight for weight, _ in SCENARIOS.values()])[0]
        try:
            outcome = await asyncio.wait_for(SCENARIOS[scenario][1](self), self.patience)
        except Refused:
            outcome = "refused"
            await asyncio.sleep(LONGEST_BREAK * self.dice.random())
        except (httpx.HTTPError, OSError, TimeoutError, asyncio.TimeoutError, ValueError, KeyError) as error:
            outcome = "lost"
            self.books.lose(f"{scenario}: {type(error).__name__}: {error}")
        self.books.outcomes[scenario, outcome] += 1

    def body(self) -> dict[str, Any]:
        """A search, as a request to the server."""
        return {
            "prompt": self.dice.choice(prompt_sets.load("medium")),
            "reward": "count",
            "method": self.dice.choice(METHODS),
            "nfe": self.dice.choice(BUDGETS),
            "seed": self.dice.randrange(2**31),
        }

    async def accepted(self, scenario: str, body: Mapping[str, Any], key: str | None = None) -> str:
        """The number of a search that the server accepted."""
        headers = {"Idempotency-Key": key or self.key()}
        answer = await self.client.post(SEARCHES, json=body, headers=headers)
        if answer.status_code in REFUSALS:
            raise Refused
        if answer.status_code != 202:
            raise ValueError(f"{answer.status_code} for a good search: {answer.text[:200]}")
        id = str(answer.json()["id"])
        self.books.accept(id, scenario)
        return id

    def key(self) -> str:
        """An idempotency key that nobody has had."""
        return f"soak-{self.dice.getrandbits(64):016x}"

    async def until_over(self, id: str, until: float = math.inf) -> str:
        """Waits until a search is over, reads result and image, and writes them down; returns its status.

        Raises:
            TimeoutError: it is not over at `until`, by the clock of the event loop.
        """
        while True:
            answer = await self.client.get(f"{SEARCHES}/{id}")
            if answer.status_code != 200:
                raise ValueError(f"{answer.status_code} for the accepted search {id}: {answer.text[:200]}")
            found = answer.json()
            if found["status"] in OVER:
                break
            if asyncio.get_running_loop().time() > until:
                raise TimeoutError(f"it is {found['status']} still")
            await asyncio.sleep(POLL)
        image = None
        if found["status"] == "done":
            picture = await self.client.get(f"{SEARCHES}/{id}/image")
            if picture.status_code != 200 or not picture.content:
                raise ValueError(f"{picture.status_code} for the image of {id}")
            image = picture.content
        self.books.see(id, found["status"], found.get("result"), image)
        return str(found["status"])

    def events(self, id: str, after: str = "") -> AsyncGenerator[Event, None]:
        """The events of a search, after the one with this number."""
        headers = {"Last-Event-ID": after} if after else {}
        return events(self.client, "GET", f"{SEARCHES}/{id}/events", headers=headers)


async def events(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> AsyncGenerator[Event, None]:
    """Server-sent events of an answer; closing the iterator closes the connection."""
    async with client.stream(method, path, **options) as answer:
        if answer.status_code in REFUSALS:
            raise Refused
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code} instead of events: {(await answer.aread())[:200]!r}")
        fields: dict[str, str] = {}
        async for text in answer.aiter_lines():
            name, _, value = text.partition(":")
            if text and name:
                fields[name] = fields.get(name, "") + value.removeprefix(" ")
            elif fields and not text:
                if "data" in fields:
                    yield Event(fields.get("event", "message"), fields.get("id", ""), fields["data"])
                fields = {}


async def _some(came: AsyncGenerator[Event, None], most: int) -> str:
    """Reads so many events, or all; returns the number of the last one that has one."""
    last = ""
    async for event in came:
        last, most = event.id or last, most - 1
        if not most:
            break
    return last


async def image(customer: Customer) -> str:
    """Asks for an image and waits."""
    answer = await customer.client.post(IMAGES, json=customer.body())
    became = answer_of(answer.status_code, answer.headers, answer.content)
    if became.fate == "lost":
        customer.books.lose(f"image: {became.detail}")
    return became.fate


async def stream(customer: Customer) -> str:
    """Asks for an image and watches it become better."""
    name = ""
    body = {**customer.body(), "stream": True, "partial_images": 2}
    async for event in events(customer.client, "POST", IMAGES, json=body):
        name = event.name if event.data != END else name
    if name != "image_generation.completed":
        raise ValueError(f"the stream of an image ended with {name or 'nothing'}")
    return "served"


async def vanish(customer: Customer) -> str:
    """Asks for an image, and is gone before it is there."""
    body = {**customer.body(), "stream": True, "partial_images": 3}
    left, came = customer.dice.randrange(1, 4), events(customer.client, "POST", IMAGES, json=body)
    with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
        await asyncio.wait_for(_some(came, left), 0.05 + customer.dice.random())
    await came.aclose()
    return "vanished"


async def search(customer: Customer) -> str:
    """Orders a search and fetches what came of it."""
    return await customer.until_over(await customer.accepted("search", customer.body()))


async def watch(customer: Customer) -> str:
    """Orders a search, watches it for a while, is gone, and fetches what came of it: nobody cancelled it."""
    id = await customer.accepted("watch", customer.body())
    came = customer.events(id)
    await _some(came, customer.dice.randrange(1, 6))
    await came.aclose()
    return await customer.until_over(id)


async def resume(customer: Customer) -> str:
    """Watches a search, breaks off, and goes on after the last event that it saw."""
    id = await customer.accepted("resume", customer.body())
    came = customer.events(id)
    last = await _some(came, customer.dice.randrange(1, 4))
    await came.aclose()
    async for event in customer.events(id, last):
        if last and event.id and event.name not in OVER and int(event.id) < int(last):
            customer.books.fault(f"resume: event {event.id} came again after {last}")
    return await customer.until_over(id)


async def cancel(customer: Customer) -> str:
    """Orders a search, and does not want it any more."""
    id = await customer.accepted("cancel", customer.body())
    await asyncio.sleep(customer.dice.random())
    customer.books.accounts[id].cancelled = True
    answer = await customer.client.delete(f"{SEARCHES}/{id}")
    if answer.status_code not in (200, 202, 204, 409):  # 409: it is over
        raise ValueError(f"{answer.status_code} for a cancellation: {answer.text[:200]}")
    return await customer.until_over(id)


async def again(customer: Customer) -> str:
    """Orders the same search several times at once with one key, and another one with that key."""
    body, key = customer.body(), customer.key()
    ids = await asyncio.gather(
        *(customer.accepted("again", body, key) for _ in range(customer.dice.randrange(2, 5))), return_exceptions=True
    )
    for failed in ids:
        if isinstance(failed, BaseException):
            raise failed
    if len({*ids}) != 1:
        customer.books.differing.append(f"one key, several searches: {ids}")
    other = {**body, "seed": body["seed"] + 1}
    answer = await customer.client.post(SEARCHES, json=other, headers={"Idempotency-Key": key})
    if answer.status_code not in (409, 422):
        customer.books.fault(f"again: {answer.status_code} for another search with a key that is taken")
    first = await customer.until_over(str(ids[0]))
    if first == "done" and await customer.accepted("again", body, key) != ids[0]:
        customer.books.differing.append(f"the key of {ids[0]} gave another search once it was over")
    return first


async def garbage(customer: Customer) -> str:
    """Sends something that is no request."""
    from rollflow.bench.soak_garbage import send

    return await send(customer.client, customer.books, customer.dice)


Scenario = Callable[[Customer], Awaitable[str]]
SCENARIOS: dict[str, tuple[float, Scenario]] = {  # with how often they are chosen
    "image": (2, image),
    "stream": (2, stream),
    "vanish": (3, vanish),
    "search": (2, search),
    "watch": (2, watch),
    "resume": (2, resume),
    "cancel": (3, cancel),
    "again": (1, again),
    "garbage": (4, garbage),
}
