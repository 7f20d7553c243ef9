"""The desk: what every front end talks to. It takes searches, keeps what it has promised, and knows how each is."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from rollflow.errors import EngineBusy, EngineClosed, RequestError, RollflowError, shown
from rollflow.journal import Journal, Kept, KeyTaken
from rollflow.serve.dispatcher import Dispatcher
from rollflow.serve.messages import Channel, told
from rollflow.serve.orders import Ordered as Ordered
from rollflow.serve.orders import Progress as Progress
from rollflow.serve.roster import WorkerStats as WorkerStats

KEEP = 86400.0  # seconds that what is over can be asked for
MOST_KEPT, MOST_BYTES = 100_000, 1 << 30  # searches that are over, and their images, in memory
USUAL_NFE = 100  # of a request that leaves its budget open
LOG = logging.getLogger("rollflow")


class KeyReused(RequestError):
    """An idempotency key that was used with another request."""


@dataclass(frozen=True)
class RewardCounts:
    """Calls of a reward so far, images that they judged, seconds that they took, and searches that failed by it."""

    calls: int
    images: int
    seconds: float
    errors: int


@dataclass(frozen=True)
class DeskStats:
    """What the desk and its workers hold at a moment, and counters since its start.

    Attributes:
        queued, running: searches that wait, and that an engine has let in.
        outstanding_nfe: what they have left to spend.
        nfe: rows that the workers' devices ran by kind, padding included; see `rollflow.profile.ledger.Ledger`.
        nfe_per_second: of all workers, over the last ten seconds.
        rows, slots: of all batches so far, rows with a purpose, and rows with padding: their ratio is the occupancy.
        free: slots of particles that are not in use.
        rewards: by name.
        workers: each one.
        ended: searches that ended, by status.
        ready, draining: whether it takes searches; whether it is closing.
    """

    queued: int
    running: int
    outstanding_nfe: int
    nfe: dict[str, int]
    nfe_per_second: float
    rows: int
    slots: int
    free: int
    rewards: dict[str, RewardCounts]
    workers: tuple[WorkerStats, ...]
    ended: dict[str, int]
    ready: bool
    draining: bool

    @property
    def occupancy(self) -> float:
        """How full batches were, 0 to 1; 1 before the first."""
        return self.rows / self.slots if self.slots else 1.0


class Desk:
    """Takes searches and answers for them; it belongs to one event loop.

    Args:
        channels: one to each worker.
        journal: keeps searches beyond this process; the caller closes it after the desk. Without one they are in
            memory alone.
        max_queued: searches that may wait.
        max_queued_nfe: NFE of those that wait; None: any number.
        keep: seconds that a search can be asked for after its end. In memory there are at most `MOST_KEPT` of them, and
            `MOST_BYTES` of their images.
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
        self._max_queued, self._max_nfe = max_queued, max_queued_nfe
        self._active: dict[str, Ordered] = {}
        self._ended: OrderedDict[str, tuple[float, Ordered]] = OrderedDict()
        self._bytes, self._entering = 0, 0
        self._by_key: dict[tuple[str, str], str] = {}
        self._entering_keys: dict[tuple[str, str], asyncio.Future[None]] = {}
        self._counts, self._errors = Counter[str](), Counter[str]()
        self._rate, self.draining = 0.0, False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pruning: asyncio.Task[Any] | None = None
        self._idle = asyncio.Event()

    # Its life.

    async def start(self) -> None:
        """Starts the workers; returns when one is ready, and searches that the journal has left go on.

        Raises:
            RollflowError: no worker could be started.
        """
        try:
            await self._dispatcher.start()
        except BaseException:
            await self._dispatcher.close()
            raise
        if self._journal is not None:
            for kept in await asyncio.to_thread(self._journal.unfinished):
                order = self._as_ordered(kept)
                self._active[order.id] = order
                self._dispatcher.give(order)
        self._pruning = self._do(self._prune())

    async def close(self, grace: float = 0.0) -> None:
        """Takes nothing more, finishes what is there, and ends the workers.

        What is not over within `grace` seconds goes on after the next start if there is a journal, and fails without.
        """
        self.draining = True
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_over(), grace)
        await self._dispatcher.close()
        for order in [*self._active.values()]:
            if order.ending:  # its end is being written
                continue
            error = EngineClosed(
                "the service ended before this search did; "
                + ("ask again" if self._journal is None else "it goes on when the service starts again")
            )
            if self._journal is None:
                order.end("failed", {"error": told(error)}, None, time.time())
            else:
                order.leave(told(error))
        if self._pruning is not None:
            self._pruning.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def ready(self) -> bool:
        """Whether it takes searches."""
        return self._dispatcher.ready and not self.draining

    @property
    def alive(self) -> bool:
        """Whether the loop of at least one worker's engine has ticked of late, or one is being started."""
        return self._dispatcher.alive

    # Searches.

    async def submit(self, request: dict[str, Any], *, key: str | None = None, owner: str = "") -> Ordered:
        """Takes a search; when it returns, the search is durable, if there is a journal.

        Args:
            request: plain JSON, see `rollflow.wire`.
            key: an idempotency key of the owner's: the same one gives the same search.
            owner: whose it is.

        Raises:
            RequestError: it cannot be honoured.
            KeyReused: the key came with another request before.
            EngineBusy: too many wait; its `seconds` say when to come again.
            EngineClosed: the desk is closing.
        """
        task = self._do(self._submit(request, key, owner))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:  # nobody will know of the search, unless by its key
            if key is None:
                task.add_done_callback(self._forsake)
            raise

    async def _submit(self, request: dict[str, Any], key: str | None, owner: str) -> Ordered:
        if key is None:
            return await self._accept(request, None, owner)
        while (entering := self._entering_keys.get((owner, key))) is not None:
            await asyncio.shield(entering)
        if (known := self._of_key(owner, key)) is not None:
            return self._same(known, request, key)
        self._entering_keys[owner, key] = asyncio.get_running_loop().create_future()
        try:
            return await self._accept(request, key, owner)
        except KeyTaken as taken:
            if (known := self.get(taken.id)) is None:
                raise
            return self._same(known, request, key)
        finally:
            self._entering_keys.pop((owner, key)).set_result(None)

    async def _accept(self, request: dict[str, Any], key: str | None, owner: str) -> Ordered:
        self._check_room(0)
        self._entering += 1
        try:
            answer = await self._dispatcher.ask({"op": "check", "request": request})
            nfe = int(answer.header["nfe"])
            self._check_room(nfe, own=1)  # again: others came, or the desk began to close
            order = Ordered(f"srch_{secrets.token_hex(12)}", request, owner, key, self, nfe)
            if self._journal is not None:
                await asyncio.wrap_future(self._journal.accept(order.id, request, key=key, owner=owner))
        finally:
            self._entering -= 1
        self._active[order.id] = order
        if key is not None:
            self._by_key[owner, key] = order.id
        self._dispatcher.give(order)
        return order

    def get(self, id: str) -> Ordered | None:
        """A search by its id, also one of before a restart if there is a journal; None if there is none."""
        found = self._active.get(id)
        if found is None and id in self._ended:
            found = self._ended[id][1]
        if found is None and self._journal is not None and (kept := self._journal.get(id)) is not None:
            found = self._as_ordered(kept)
        return found

    def listed(self, owner: str = "", limit: int = 100) -> list[Ordered]:
        """The last searches of an owner, the last first."""
        here = [*self._active.values(), *(order for _, order in self._ended.values())]
        found = {order.id: order for order in here if order.owner == owner}
        if self._journal is not None:
            for kept in self._journal.jobs(limit=limit if not owner else 10 * limit):
                if kept.owner == owner and kept.id not in found:
                    found[kept.id] = self._as_ordered(kept)
        return sorted(found.values(), key=lambda order: -order.created)[:limit]

    def stats(self) -> DeskStats:
        """What it holds now."""
        now, active = self._clock(), [*self._active.values()]
        counted: dict[str, Counter[str]] = {}
        for worker in self._dispatcher.workers:
            for name, counts in worker.counted().items():
                counted[name] = counted.get(name, Counter()) + counts
        ran, names = counted["ran"], {*counted["calls"], *self._errors}
        workers = tuple(worker.now(now) for worker in self._dispatcher.workers)
        return DeskStats(
            queued=sum(order.status == "queued" for order in active),
            running=sum(order.status == "running" for order in active),
            outstanding_nfe=sum(order.left for order in active),
            nfe=dict(ran),
            nfe_per_second=sum(worker.nfe_per_second for worker in workers),
            rows=sum(ran.values()) - ran["padding"],
            slots=sum(ran.values()),
            free=sum(worker.free for worker in workers),
            rewards={
                name: RewardCounts(
                    counted["calls"][name], counted["images"][name], float(counted["seconds"][name]), self._errors[name]
                )
                for name in names
            },
            workers=workers,
            ended=dict(self._counts),
            ready=self.ready,
            draining=self.draining,
        )

    # What searches ask of their desk.

    async def preview(self, order: Ordered) -> bytes | None:
        """See `Ordered.preview`."""
        if order.status in ("queued", "running"):
            with suppress(RollflowError, TimeoutError):  # it ended in between, or with its worker
                return (await self._dispatcher.ask({"op": "peek", "id": order.id}, order)).payload or None
        return await self.image(order)

    async def image(self, order: Ordered) -> bytes | None:
        """See `Ordered.image`."""
        if order.file is not None or self._journal is None or order.status != "done":
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
        if self._journal is not None:
            try:
                await asyncio.wrap_future(self._write_end(self._journal, order.id, outcome, payload))
                file = None if status == "done" else file
            except RollflowError:  # the disk is full, or the like; the result is there nevertheless
                LOG.exception("the end of the search %s could not be written", order.id)
        self._counts[status] += 1
        if status == "failed" and outcome["error"]["type"] in ("FunctionError", "RewardUnavailable"):
            self._errors[str(order.request.get("reward", "count"))] += 1
        order.end(status, outcome, file, time.time())
        self._active.pop(order.id, None)
        self._ended[order.id] = self._clock(), order
        self._bytes += len(file or b"")
        self._trim()
        if not self._active:
            self._idle.set()

    @staticmethod
    def _write_end(journal: Journal, id: str, outcome: dict[str, Any], payload: bytes) -> Any:
        if outcome["status"] == "done":
            result = {**outcome["result"], "improvements": outcome.get("better", [])}
            return journal.finish(id, result, payload)
        return journal.fail(id, outcome["status"], outcome["error"])

    # The rest is its own affair.

    def _check_room(self, nfe: int, own: int = 0) -> None:
        """Raises for a request that cannot wait; `own`: it counts among those that are entering already."""
        if self.draining:
            raise EngineClosed("the service is closing: ask again later")
        active = self._active.values()
        waiting = [order for order in active if order.status == "queued"]
        queued = len(waiting) + self._entering - own
        if queued >= self._max_queued:
            raise EngineBusy(
                f"{queued} searches wait already, and at most {self._max_queued} may: come again", self._wait()
            )
        queued_nfe = sum(order.left for order in waiting)
        if self._max_nfe is not None and queued_nfe and queued_nfe + nfe > self._max_nfe:
            raise EngineBusy(
                f"nfe={nfe}: searches of {queued_nfe} NFE wait already, and at most {self._max_nfe} may: come again",
                self._wait(),
            )

    def _wait(self) -> float:
        """Seconds until all that is here is done, at the measured rate."""
        now = self._clock()
        rate = sum(worker.now(now).nfe_per_second for worker in self._dispatcher.workers)
        self._rate = rate or self._rate
        left = sum(order.left for order in self._active.values())
        return max(1.0, left / self._rate) if self._rate else 1.0

    def _of_key(self, owner: str, key: str) -> Ordered | None:
        id = self._by_key.get((owner, key))
        if id is None and self._journal is not None:
            id = self._journal.by_key(owner, key)
        return None if id is None else self.get(id)

    @staticmethod
    def _same(known: Ordered, request: dict[str, Any], key: str) -> Ordered:
        if known.request != request:
            raise KeyReused(
                f"the idempotency key {shown(key)} came with another request before ({known.id}): use a new one"
            )
        return known

    def _as_ordered(self, kept: Kept) -> Ordered:
        """A search of the journal."""
        budget = kept.request.get("nfe")
        order = Ordered(
            kept.id, kept.request, kept.owner, kept.key, self, budget if isinstance(budget, int) else USUAL_NFE
        )
        order.created, order.replay = kept.created, kept.replay
        if kept.status != "accepted":
            result = dict(kept.result or {})
            better = result.pop("improvements", [])
            outcome: dict[str, Any] = {"result": result or None, "error": kept.error, "better": better}
            if better:
                nfe, reward, level, seconds = better[-1]
                outcome |= {"nfe": result.get("nfe", nfe), "best": reward, "level": level, "seconds": seconds}
            status: Literal["done", "failed", "cancelled"] = kept.status
            order.end(status, outcome, None, kept.ended or kept.created)
        return order

    def _trim(self) -> None:
        """Forgets what is over for too long, or too much of it."""
        before = self._clock() - self._keep
        while self._ended:
            id, (ended, order) = next(iter(self._ended.items()))
            if ended >= before and len(self._ended) <= MOST_KEPT and self._bytes <= MOST_BYTES:
                return
            del self._ended[id]
            self._bytes -= len(order.file or b"")
            if order.key is not None:
                self._by_key.pop((order.owner, order.key), None)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(min(60.0, max(0.05, self._keep / 4)))
            self._trim()
            if self._journal is not None:
                self._journal.prune(self._keep)

    async def _all_over(self) -> None:
        while self._active or self._entering:
            self._idle.clear()
            if not self._active:
                await asyncio.sleep(0.01)  # one is being checked
                continue
            await self._idle.wait()

    def _forsake(self, task: asyncio.Task[Ordered]) -> None:
        if not task.cancelled() and task.exception() is None and not (order := task.result()).done:
            self._do(self.cancel(order))

    def _do(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
