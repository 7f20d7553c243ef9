"""The desk: what every front end talks to. It takes searches, keeps what it has promised, and knows how each is."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from rollflow.errors import EngineClosed, RequestError, RollflowError, shown, told
from rollflow.journal import Journal, Kept, KeyTaken
from rollflow.serve.dispatcher import Dispatcher
from rollflow.serve.ended import MOST, MOST_BESIDE, Ended, left, told_of, write
from rollflow.serve.messages import Channel
from rollflow.serve.orders import Ordered as Ordered
from rollflow.serve.orders import Progress as Progress
from rollflow.serve.orders import kept_as, recalled
from rollflow.serve.previews import Previews
from rollflow.serve.room import Room
from rollflow.serve.roster import WorkerStats as WorkerStats
from rollflow.serve.tallies import DeskStats as DeskStats
from rollflow.serve.tallies import RewardCounts as RewardCounts
from rollflow.serve.tallies import tallied

KEEP = 86400.0  # seconds that what is over can be asked for
MOST_LISTED = 100
LOG = logging.getLogger("rollflow")


class KeyReused(RequestError):
    """An idempotency key that was used with another request."""


class Desk:
    """Takes searches and answers for them; it belongs to one event loop.

    Args:
        channels: one to each worker.
        journal: keeps searches beyond this process; the caller closes it after the desk. Without one they are in
            memory alone.
        max_queued: searches that may wait.
        max_queued_nfe: NFE of those that wait; None: any number.
        keep: seconds that a search can be asked for after its end; see `rollflow.serve.ended` for what memory holds.
        clock: seconds.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        *,
        journal: Journal | None = None,
        max_queued: int = 1000,
        max_queued_nfe: int | None = None,
        keep: float = KEEP,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ):
        self._dispatcher = Dispatcher(channels, self._news, self._over, clock, **options)
        self._journal, self._keep, self._clock = journal, keep, clock
        self._active: dict[str, Ordered] = {}
        self._room = Room(max_queued, max_queued_nfe, self._active, self._dispatcher.workers, clock)
        self._ended = Ended(keep, clock, self._forget, MOST if journal is None else MOST_BESIDE)
        self._previews = Previews(self._look, clock)
        self._by_key: dict[tuple[str, str], str] = {}
        self._entering_keys: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._counts, self._errors = Counter[str](), Counter[str]()
        self.draining = self._known = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watchers: list[Callable[[Ordered], None]] = []
        self._pruning: asyncio.Task[Any] | None = None
        self._idle = asyncio.Event()

    # Its life.

    async def start(self) -> None:
        """Starts the workers; returns when one is ready. Searches that the journal has left go on.

        Raises:
            RollflowError: no worker could be started.
        """
        for kept in [] if self._journal is None else self._journal.unfinished():  # before anybody can ask for them
            order = self._active[kept.id] = recalled(kept, self)
            if order.fleeting:  # who waited for it has gone with the process before
                self._over(order, left(order), b"")
            else:
                self._dispatcher.give(order)
        self._known = True
        if self._journal is not None:
            ended = sum(order.ending for order in self._active.values())
            on = len(self._active) - ended
            LOG.info("the journal: searches that go on: %d; that are ended, as their clients have gone: %d", on, ended)
        try:
            await self._dispatcher.start()
        except BaseException:
            await self._dispatcher.close()
            raise
        self._pruning = self._do(self._prune())

    async def close(self, grace: float = 0.0) -> None:
        """Takes nothing more, finishes what is there, and ends the workers.

        What is not over within `grace` seconds goes on after the next start if there is a journal, unless it is
        fleeting, and fails without.
        """
        if not self.draining:
            now = Counter(order.status for order in self._active.values() if not order.ending)
            text = "draining: searches that run: %d; that wait: %d; they have %g s, and new ones are refused"
            LOG.info(text, now["running"], now["queued"], grace)
        self.draining = True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_over(), grace)
        await self._dispatcher.close()
        self._leave()
        if self._pruning is not None:
            self._pruning.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._leave()  # what was being accepted meanwhile
        await asyncio.gather(*self._tasks, return_exceptions=True)
        fate = "that were not over and have failed" if self._journal is None else "that are left in the journal"
        LOG.info("closed: searches %s: %d", fate, len(self._active))

    def _leave(self) -> None:
        """Lets go of what is not over."""
        for order in [*self._active.values()]:
            if order.ending or order.done:  # its end is being written
                continue
            if self._journal is None:
                order.end("failed", left(order), None, time.time())
            elif order.fleeting:
                self._over(order, left(order), b"")
            else:
                why = "the service ended before this search did; it goes on when the service starts again"
                order.leave(told(EngineClosed(why)))

    @property
    def ready(self) -> bool:
        """Whether it takes searches."""
        return self._dispatcher.ready and not self.draining

    @property
    def alive(self) -> bool:
        """Whether the loop of at least one worker's engine has ticked of late, or one is being started."""
        return self._dispatcher.alive

    # Searches.

    async def submit(
        self,
        request: dict[str, Any],
        *,
        key: str | None = None,
        owner: str = "",
        fleeting: bool = False,
        sent: dict[str, Any] | None = None,
        of: object = None,
    ) -> Ordered:
        """Takes a search; when it returns, the search is durable, if there is a journal.

        Args:
            request: plain JSON, see `rollflow.wire`.
            key: an idempotency key of the owner's: the same one gives the same search.
            owner: whose it is.
            fleeting: it is only for who waits for it now: it does not go on after a restart.
            sent: what the client sent, plain JSON: a second request with its key is the same if it was sent alike.
            of: what it is a part of, with others: these do not count as waiting before it.

        Raises:
            RequestError: it cannot be honoured.
            KeyReused: the key came with another request before.
            EngineBusy: too many wait, or no worker is ready; its `seconds` say when to come again.
            EngineClosed: the desk is closing.
        """
        order = Ordered(f"srch_{secrets.token_hex(12)}", request, owner, key, self)
        order.fleeting, order.sent, order.of = fleeting, sent if key is not None else None, of
        task = self._do(self._submit(order))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # nobody will know of the search, unless by its key
            task.add_done_callback(partial(self._forsake, key))
            raise

    async def _submit(self, order: Ordered) -> Ordered:
        owner, key = order.owner, order.key
        if key is None:
            return await self._accept(order)
        while (entering := self._entering_keys.get((owner, key))) is not None:
            await asyncio.shield(entering)
        if (known := self._of_key(owner, key)) is not None:
            return self._same(known, order)
        self._entering_keys[owner, key] = asyncio.get_running_loop().create_future()
        try:
            return await self._accept(order)
        except KeyTaken as taken:
            if (known := self.get(taken.id)) is None:
                raise
            return self._same(known, order)
        finally:
            self._entering_keys.pop((owner, key)).set_result(None)

    async def _accept(self, order: Ordered) -> Ordered:
        self._check_open()
        with self._room.entering(order.id, order.of):
            answer = await self._dispatcher.ask({"op": "check", "request": order.request})
            order.budget = self._room.expected(order.request, int(answer.header["nfe"]))
            self._check_open()  # again: others came, or the desk began to close
            self._room.reserve(order.id, order.budget, order.of)
            if self._journal is not None:
                accepted = self._journal.accept(order.id, kept_as(order), key=order.key, owner=order.owner)
                await asyncio.wrap_future(accepted)
        self._active[order.id] = order
        if order.key is not None:
            self._by_key[order.owner, order.key] = order.id
        self._dispatcher.give(order)
        return order

    def get(self, id: str) -> Ordered | None:
        """A search by its id, also one of before a restart if there is a journal; None if there is none."""
        found = self._active.get(id) or self._ended.get(id)
        if found is None and self._journal is not None and (kept := self._journal.get(id)) is not None:
            found = self._recalled(kept)
        return found

    async def listed(self, owner: str = "", limit: int = MOST_LISTED) -> list[Ordered]:
        """The last searches of an owner, the last first; 100 at most."""
        limit = min(limit, MOST_LISTED)
        kept = [] if self._journal is None else await asyncio.to_thread(self._journal.jobs, limit, owner=owner)
        here = [*self._active.values(), *self._ended.orders()]
        found = {order.id: order for order in here if order.owner == owner}
        found |= {one.id: self._recalled(one) for one in kept if one.id not in found}
        return sorted(found.values(), key=lambda order: -order.created)[:limit]

    def _recalled(self, kept: Kept) -> Ordered:
        """A search that memory does not have; one without an end is only of the journal."""
        order = recalled(kept, self)
        if kept.status == "accepted" and self._known and kept.id not in self._room:
            why = "the end of this search could not be written to the journal: it runs again when the service starts"
            order.end("failed", {"error": told(RollflowError(why))}, None, time.time())
        return order

    def stats(self) -> DeskStats:
        """What it holds now."""
        active, workers, limit = [*self._active.values()], self._dispatcher.workers, self._dispatcher.limit
        return tallied(active, workers, self._counts, self._errors, self.ready, self.draining, limit, self._clock())

    def watch(self, seen: Callable[[Ordered], None]) -> None:
        """Has every search shown to a function when it is over; those of before a restart, too."""
        self._watchers.append(seen)

    # What searches ask of their desk.

    async def preview(self, order: Ordered) -> bytes | None:
        """See `Ordered.preview`."""
        if order.status in ("queued", "running"):
            found = await self._previews.get(order)
            if found is not None or order.status in ("queued", "running"):
                return found
        return await self.image(order)

    async def _look(self, order: Ordered) -> bytes | None:
        with suppress(RollflowError, TimeoutError):  # it ended in between, or with its worker
            return (await self._dispatcher.ask({"op": "peek", "id": order.id}, order)).payload or None
        return None

    async def image(self, order: Ordered) -> bytes | None:
        """See `Ordered.image`."""
        if order.file is not None or self._journal is None or order.result is None:
            return order.file
        found = await asyncio.to_thread(self._journal.image, order.id)
        if found is not None:
            self._journal.fetched(order.id)
        return found

    async def cancel(self, order: Ordered) -> bool:
        """See `Ordered.cancel`."""
        if order.done or order.id not in self._active:
            return False
        if not order.cancelling and not order.ending:
            self._dispatcher.cancel(order)
        await order.over()
        return order.status == "cancelled"

    # What the dispatcher tells.

    def _news(self, order: Ordered, news: dict[str, Any]) -> None:
        scored = order.heard(news)
        if scored is None or self._journal is None:
            return
        if scored.anew:
            self._journal.restart(order.id)
        try:
            self._journal.log(order.id, scored.start, scored.replay)
        except RollflowError:  # scores before these could not be written
            self._journal.restart(order.id)
            self._journal.log(order.id, 0, order.replay)

    def _over(self, order: Ordered, outcome: dict[str, Any], payload: bytes) -> None:
        order.ending = True
        self._do(self._end(order, outcome, payload))

    async def _end(self, order: Ordered, outcome: dict[str, Any], payload: bytes) -> None:
        """A search is over for those who ask when that is durable."""
        status, file = outcome["status"], payload or None
        outcome = {**outcome, "better": order.merged(outcome.get("better", []))}
        if self._journal is not None and await write(self._journal, order.id, outcome, payload):
            file = None
        self._counts[status] += 1
        if status == "failed":
            LOG.warning("the search %s failed (%s)", order.id, told_of(order, outcome["error"]))
        if status == "failed" and outcome["error"]["type"] in ("FunctionError", "RewardUnavailable"):
            self._errors[_reward(order.request)] += 1
        order.end(status, outcome, file, time.time())
        self._active.pop(order.id, None)
        self._previews.forget(order.id)
        self._ended.add(order)
        for seen in self._watchers:
            seen(order)
        if not self._active:
            self._idle.set()

    # The rest is its own affair.

    def _check_open(self) -> None:
        if self.draining:
            raise EngineClosed("the service is closing: ask again later")

    def _of_key(self, owner: str, key: str) -> Ordered | None:
        id = self._by_key.get((owner, key))
        if id is None and self._journal is not None:
            id = self._journal.by_key(owner, key)
        return None if id is None else self.get(id)

    @staticmethod
    def _same(known: Ordered, order: Ordered) -> Ordered:
        if not known.same(order.request, order.sent):
            raise KeyReused(
                f"the idempotency key {shown(order.key)} came with another request before ({known.id}): use a new one"
            )
        return known

    def _forget(self, order: Ordered) -> None:
        if order.key is not None:
            self._by_key.pop((order.owner, order.key), None)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(min(60.0, max(0.05, self._keep / 4)))
            self._ended.trim()
            if self._journal is not None:
                self._journal.prune(self._keep)

    async def _all_over(self) -> None:
        while self._active or len(self._room):
            self._idle.clear()
            if not self._active:
                await asyncio.sleep(0.01)  # one is being checked
                continue
            await self._idle.wait()

    def _forsake(self, key: str | None, task: asyncio.Task[Ordered]) -> None:
        """Who handed it in has gone."""
        if not task.cancelled() and task.exception() is None and key is None:
            self._do(self.cancel(task.result()))

    def _do(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _reward(request: dict[str, Any]) -> str:
    """What metrics call its reward: a name without options; clients may ask for any number of expressions."""
    name = str(request.get("reward", "count")).partition(":")[0]
    return name if re.fullmatch(r"[A-Za-z_][\w.-]*", name) else "expression"
