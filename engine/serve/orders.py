"""A search at the desk: how far it is, its improvements as they come, and its result."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from rollflow.draw import GUIDED_NFE
from rollflow.entries import Replay, read, written
from rollflow.errors import QUOTED, shown
from rollflow.journal import Kept

USUAL = 100  # NFE of a request that leaves its budget open
TEXTS = ("prompt", "negative")  # fields whose words are the client's own, and which messages quote
QUOTATIONS = (QUOTED, 60)  # characters to which messages cut what they quote
FLEETING, SENT = "_fleeting", "_sent"  # beside a request's own fields in a journal
Status = Literal["queued", "running", "done", "cancelled", "failed"]


class Progress(NamedTuple):
    """How far a search is: NFE spent, best reward so far (minus infinity before the first), level, and seconds."""

    nfe: int = 0
    best_reward: float = -math.inf
    level: int = 0
    seconds: float = 0.0


class Scored(NamedTuple):
    """Scores of a search from a place of its history on; `anew` if those that were known before do not count."""

    start: int
    replay: Replay
    anew: bool


@runtime_checkable
class Front(Protocol):
    """What a search needs of its desk."""

    async def preview(self, order: Ordered) -> bytes | None:
        """The best so far."""
        ...

    async def cancel(self, order: Ordered) -> bool:
        """Ends it."""
        ...

    async def image(self, order: Ordered) -> bytes | None:
        """The file of the result's image."""
        ...


class Ordered:
    """One search at the desk; it belongs to the desk's event loop.

    Attributes:
        id: "srch_" and random hexadecimal digits.
        request: as it was asked for, plain JSON, see `rollflow.wire`.
        owner, key: whose it is, and its idempotency key.
        sent: what its client sent with an idempotency key, by which it is compared, beside the request; None: unknown.
        of: what it was handed in as a part of.
        fleeting: whether it is only for who waits for it now, and not to go on after a restart.
        again: whether it is of before a restart.
        created, started, ended: in seconds since 1970, None before; it starts when an engine lets it in.
        status: "queued" until an engine has let it in, "running", then "done", "cancelled" or "failed".
        budget: its NFE.
        progress: how far it is.
        result: what it found, see `rollflow.pictures.described`; of a cancelled one the best until then, if any.
        error: why it failed: its "type", a name of `rollflow.errors`, and its "message".
    """

    def __init__(self, id: str, request: dict[str, Any], owner: str, key: str | None, front: Front, budget: int = 0):
        self.id, self.request, self.owner, self.key, self.budget = id, request, owner, key, budget
        self.created = time.time()
        self.started: float | None = None
        self.ended: float | None = None
        self.status: Status = "queued"
        self.progress = Progress()
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.file: bytes | None = None  # of the image, where no journal has it
        self.replay = Replay(())  # its scores so far, for another worker
        self.place = self.deaths = self.alone = 0  # the dispatcher's: its turn, and deaths of its workers
        self.cancelling = self.ending = False
        self.fleeting = self.again = False
        self.sent: dict[str, Any] | None = None
        self.of: object = None
        self._front, self._better, self._changed, self._over = front, list[Progress](), asyncio.Event(), False

    def __repr__(self) -> str:
        return f"Ordered({self.id}, {self.status})"

    def same(self, request: dict[str, Any], sent: dict[str, Any] | None) -> bool:
        """Whether another request asks for this search, or was sent as this one was: a server's defaults may change."""
        return self.request == request or (sent is not None and self.sent == sent)

    @property
    def left(self) -> int:
        """NFE that it has left to spend, at least 1."""
        return max(1, self.budget - self.progress.nfe)

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    @property
    def improvements(self) -> list[tuple[int, float, float]]:
        """NFE, reward and seconds of each evaluation that was better than all before it.

        NFE and rewards depend on the request alone, also where another worker went on with it.
        """
        return [(one.nfe, one.best_reward, one.seconds) for one in self._better]

    async def image(self) -> bytes | None:
        """The file of the result's image, in `result["format"]`; None where there is none (yet)."""
        return await self._front.image(self)

    async def preview(self) -> bytes | None:
        """A PNG of the best so far, decoded now; None where there is nothing yet."""
        return await self._front.preview(self)

    async def over(self) -> None:
        """Waits until nothing more will come."""
        while not self._over:
            await self._changed.wait()

    async def events(self, after: int = -1, every: bool = False) -> AsyncIterator[Progress | Literal["over"]]:
        """Improvements beyond `after` NFE, those that were and those that come, and "over" at the end.

        Args:
            after: NFE of the last one that the reader has.
            every: also how far it is between improvements, as often as workers say so.
        """
        told: Progress | None = None
        while True:
            changed, over = self._changed, self._over
            for one in self._since(after):
                after, told = one.nfe, one
                yield one
            if every and not over and self.progress not in (told, Progress()):
                told = self.progress
                yield told
            if over:
                yield "over"
                return
            await changed.wait()  # which is set if something came while the reader had the last

    async def cancel(self) -> bool:
        """Ends it with what it has found; False if it was over before that."""
        return await self._front.cancel(self)

    # What the desk tells.

    def before(self, kept: Replay) -> None:
        """Takes how far it was, as far as its scores say: of a combined reward they do not say its sum."""
        best, nfe = -math.inf, 0
        for one in kept.entries:
            nfe += GUIDED_NFE if one.kind == "guided" else 1
            if isinstance(one.score, float) and math.isfinite(one.score) and one.score > best:
                best = one.score
                self._better.append(Progress(nfe, best, one.level, kept.seconds))  # when it came is not kept
        if kept.entries:
            self.progress = Progress(nfe, best, kept.entries[-1].level, kept.seconds)

    def heard(self, news: dict[str, Any]) -> Scored | None:
        """Takes news of a worker's; returns the scores that are new."""
        if news["status"] == "running" and self.status == "queued":
            self.status = "running"
        if self.started is None and "seconds" in news:
            self.started = time.time() - news["seconds"]
        self._progressed(news, anew=False)
        added = None
        if "entries" in news:
            added = self._recorded(int(news["start"]), read(news["entries"]))
        self._wake()
        return added

    def end(self, status: Status, outcome: dict[str, Any], file: bytes | None, ended: float) -> None:
        """It is over; what waits for it goes on."""
        self.status, self.result, self.error = status, outcome.get("result"), outcome.get("error")
        self.file, self.ended, self.replay = file, ended, Replay(())
        if self.started is None and "seconds" in outcome:
            self.started = ended - outcome["seconds"]
        self._progressed(outcome, anew=True)
        self.leave()

    def leave(self, error: dict[str, Any] | None = None) -> None:
        """Nothing more will come from this desk."""
        self._over, self.error = True, self.error or error
        self._wake()

    def merged(self, better: list[list[Any]]) -> list[list[Any]]:
        """All improvements (NFE, reward, level, seconds) as they are known in the end, with the seconds of before."""
        known = {one.nfe: one.seconds for one in self._better}
        return [[nfe, reward, level, known.get(nfe, seconds)] for nfe, reward, level, seconds in better]

    def _progressed(self, news: dict[str, Any], anew: bool) -> None:
        if "nfe" in news and news["nfe"] >= self.progress.nfe:  # less: a replay that has not caught up
            self.progress = Progress(news["nfe"], news["best"], news["level"], news["seconds"])
        better = [Progress(nfe, reward, level, seconds) for nfe, reward, level, seconds in news.get("better", [])]
        if anew and better:
            self._better = better
        for one in [] if anew else better:
            if not self._better or (one.nfe > self._better[-1].nfe and one.best_reward > self._better[-1].best_reward):
                self._better.append(one)

    def _recorded(self, start: int, found: Replay) -> Scored | None:
        """Adds scores; where they differ from those that were known, they and what came before them are the search's.

        A replay that did not fit, or an engine that is not reproducible, does that.
        """
        known = self.replay.entries
        overlap = known[start : start + len(found.entries)]
        new, scales = found.entries[len(overlap) :], found.scales or self.replay.scales
        again = found.entries[: len(overlap)]
        anew = bool(overlap) and written(Replay(overlap)) != written(Replay(again))  # where NaN equals NaN
        if not anew and not new and scales == self.replay.scales:
            return None
        entries = (*known[:start], *found.entries) if anew else (*known, *new)
        self.replay = found._replace(entries=entries, scales=scales)
        self.budget = found.nfe or self.budget  # of a limited time it is settled when it is let in
        first = 0 if anew else len(known)
        return Scored(first, self.replay._replace(entries=entries[first:]), anew)

    def _since(self, after: int) -> list[Progress]:
        return [one for one in self._better if one.nfe > after]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def quoted(request: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The texts of a request as messages quote them, each with its field."""
    for name in TEXTS:
        text = request.get(name)
        if isinstance(text, str) and text:
            yield from ((name, shown(text, most)) for most in QUOTATIONS)


def kept_as(order: Ordered) -> dict[str, Any]:
    """What a journal keeps of a request; `recalled` reads it."""
    beside: dict[str, Any] = {FLEETING: True} if order.fleeting else {}
    if order.sent is not None:
        beside[SENT] = order.sent
    return order.request | beside


def recalled(kept: Kept, front: Front) -> Ordered:
    """A search of a journal, from before a restart; its budget is a guess where the request leaves it open."""
    request = {name: value for name, value in kept.request.items() if name not in (FLEETING, SENT)}
    budget = request.get("nfe")
    order = Ordered(kept.id, request, kept.owner, kept.key, front, budget if isinstance(budget, int) else USUAL)
    order.fleeting, order.sent, order.again = FLEETING in kept.request, kept.request.get(SENT), True
    order.created, order.replay = kept.created, kept.replay
    if kept.status == "accepted":
        order.before(kept.replay)
    else:
        result = dict(kept.result or {})
        better, last = result.pop("improvements", []), result.pop("level", None)
        outcome: dict[str, Any] = {"result": result or None, "error": kept.error, "better": better}
        if better:
            nfe, reward, level, seconds = better[-1]
            outcome |= {"nfe": result.get("nfe", nfe), "best": reward, "level": level if last is None else last}
            outcome["seconds"] = result.get("seconds", seconds)
        order.end(kept.status, outcome, None, kept.ended or kept.created)
    return order
