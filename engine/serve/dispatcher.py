"""Gives searches to workers, and again to others when a worker dies; each search ends exactly once.

It lives on one event loop; what workers send comes there from their channels' threads. A search goes to the worker with
the least outstanding NFE, so many to each as keep its batches full; the rest wait here, higher priorities first. When a
worker dies, its searches go on elsewhere from the rewards that they had. One that was on dead workers twice runs alone
from then on, and is given up when two more die that run nothing else: others, and what is killed from outside, are not.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from rollflow.entries import written
from rollflow.errors import EngineBusy, EngineClosed, EngineDead, RollflowError, raised, told
from rollflow.serve.messages import Channel, Message
from rollflow.serve.orders import Ordered
from rollflow.serve.roster import WorkerState

WINDOW = 64  # searches of a worker at a time
SHARED, ALONE = 2, 2  # deaths of workers that a search may be part of among others, and by itself
HUNG = 60.0  # seconds without a tick after which a worker counts as dead
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0  # seconds before a dead worker is started again; doubles with each failure
STARTING = 600.0  # seconds that a start may take before it counts as failed
STARTS = 3  # failed starts in a row of every worker, after which a start of the whole has failed
PATIENCE = 30.0  # seconds that a question waits for a worker
LOG = logging.getLogger("rollflow")


class Died(RollflowError):
    """The worker that was asked has died."""


class Unready(EngineBusy):
    """There is no worker to take it now; `seconds` is when to come again."""


class Dispatcher:
    """Spreads searches over workers.

    Args:
        channels: one to each worker.
        on_news: takes a search and news of it.
        on_over: takes a search, its outcome and the file of its image; once for each search.
        clock: seconds.
        window, hung, pause, starting: see above.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        on_news: Callable[[Ordered, dict[str, Any]], None],
        on_over: Callable[[Ordered, dict[str, Any], bytes], None],
        clock: Callable[[], float] = time.monotonic,
        window: int = WINDOW,
        hung: float = HUNG,
        pause: float = FIRST_PAUSE,
        starting: float = STARTING,
    ):
        self.workers = [WorkerState(channel, number) for number, channel in enumerate(channels)]
        self._on_news, self._on_over, self._clock = on_news, on_over, clock
        self._window, self._hung, self._pause, self._starting = window, hung, pause, starting
        self._waiting: list[tuple[int, int, Ordered]] = []  # a heap: the highest priority, then the first
        self._suspects: deque[Ordered] = deque()
        self._at: dict[str, WorkerState] = {}
        self._places, self._calls = itertools.count(), itertools.count()
        self._asked: dict[int, tuple[WorkerState, asyncio.Future[Message]]] = {}
        self._changed, self._closed = asyncio.Event(), False
        self._unfit: RollflowError | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts the workers and waits until one is ready.

        Raises:
            RollflowError: no worker can be: the first one's reason.
        """
        self._loop = asyncio.get_running_loop()
        for worker in self.workers:
            self._launch(worker)
        self._watching = self._loop.create_task(self._watch())
        while not any(worker.state == "ready" for worker in self.workers):
            if all(worker.unfit or worker.failed_starts >= STARTS for worker in self.workers):
                raise self._unfit or EngineDead("no worker could be started: what they wrote says why")
            await self._changed.wait()

    @property
    def ready(self) -> bool:
        """Whether a worker takes searches."""
        return any(worker.state == "ready" for worker in self.workers)

    @property
    def alive(self) -> bool:
        """Whether the loop of a worker's engine has ticked of late, or a worker is being started or will be soon."""
        now = self._clock()
        started = [worker for worker in self.workers if worker.life and worker.state != "unfit"]
        return not self._closed and any(not self._hangs(worker, now) for worker in started)

    @property
    def limit(self) -> int:
        """Searches that the workers which are ready take at a time."""
        return self._window * sum(worker.state == "ready" for worker in self.workers)

    def give(self, order: Ordered) -> None:
        """Takes a search; its outcome comes by `on_over`."""
        order.place = next(self._places)
        self._queue(order)
        self._spread()

    def cancel(self, order: Ordered) -> None:
        """Ends a search: at once if it waits here, otherwise its worker says when."""
        order.cancelling = True
        worker = self._at.get(order.id)
        if worker is not None:
            worker.channel.send(Message({"op": "cancel", "id": order.id}))
            return
        self._waiting = [one for one in self._waiting if one[2] is not order]
        heapq.heapify(self._waiting)
        self._suspects = deque(one for one in self._suspects if one is not order)
        self._on_over(order, _cancelled(order), b"")
        if not self._suspects:  # a worker that is being emptied for it takes searches again
            for worker in self.workers:
                worker.reserved &= any(one.deaths >= SHARED for one in worker.orders.values())
            self._spread()

    async def ask(self, header: dict[str, Any], order: Ordered | None = None) -> Message:
        """Asks the worker that has a search, or the least loaded one, and waits for its answer.

        Raises:
            Unready: no worker was ready in time, or two that were asked died, of whatever.
            EngineClosed: it was closed.
            RollflowError: what the answer says.
        """
        for _ in range(2):
            worker = await self._asking() if order is None else self._at.get(order.id)
            if worker is None:
                return Message({})
            call = next(self._calls)
            future: asyncio.Future[Message] = self._loop.create_future()
            self._asked[call] = worker, future
            worker.channel.send(Message({**header, "call": call}))
            try:
                answer = await future
            except Died:
                continue
            finally:
                self._asked.pop(call, None)
            if "error" in answer.header:
                raise raised(answer.header["error"])
            return answer
        raise Unready("the workers that were asked about this request died: come again, or see what they wrote", 5.0)

    async def close(self) -> None:
        """Ends the workers."""
        self._closed = True
        if self._watching is not None:
            self._watching.cancel()
        for worker in self.workers:
            worker.life, worker.state = worker.life + 1, "dead"  # nothing is heard of them any more
        self._at.clear()
        for _, future in [*self._asked.values()]:
            if not future.done():
                future.set_exception(Died("the service ends"))
        await asyncio.gather(*(asyncio.to_thread(worker.channel.close) for worker in self.workers))

    # Who gets what.

    def _queue(self, order: Ordered) -> None:
        if order.deaths >= SHARED:
            self._suspects.append(order)
            return
        priority = order.request.get("priority", 0)
        heapq.heappush(self._waiting, (-priority if isinstance(priority, int) else 0, order.place, order))

    def _spread(self) -> None:
        """Gives out what can be given out."""
        ready = [worker for worker in self.workers if worker.state == "ready"]
        if self._suspects and ready and not any(worker.reserved for worker in ready):
            min(ready, key=lambda worker: worker.nfe).reserved = True
        for worker in ready:
            if worker.reserved and not worker.orders:
                if self._suspects:
                    self._run(worker, self._suspects.popleft())
                else:
                    worker.reserved = False
        loads = {worker: worker.nfe for worker in ready if not worker.reserved}
        while self._waiting:
            free = [worker for worker in loads if len(worker.orders) < self._window]
            if not free:
                break
            worker, order = min(free, key=lambda one: loads[one]), heapq.heappop(self._waiting)[2]
            loads[worker] += order.left
            self._run(worker, order)

    def _run(self, worker: WorkerState, order: Ordered) -> None:
        worker.orders[order.id] = order
        self._at[order.id] = worker
        replay = written(order.replay) if order.replay.entries else None
        worker.channel.send(Message({"op": "run", "id": order.id, "request": order.request, "replay": replay}))

    async def _asking(self) -> WorkerState:
        """The least loaded worker that is ready, as soon as there is one."""
        until = self._clock() + PATIENCE
        while not self.ready:
            if self._closed:
                raise EngineClosed("the service has ended: ask again later")
            if self._clock() > until:
                raise Unready("no worker is ready: they are being started again; come again", 5.0)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), 1.0)
        return min((one for one in self.workers if one.state == "ready"), key=lambda one: (one.reserved, one.nfe))

    # What workers say; on the event loop.

    def _launch(self, worker: WorkerState) -> None:
        if self._closed:
            return
        worker.life += 1
        if worker.life > 1:
            LOG.info("the worker %d is started again", worker.number)  # what it is now is not known yet
        worker.state, worker.heard, worker.age = "starting", self._clock(), 0.0
        worker.begun, worker.ended = worker.heard, -math.inf
        of = worker, worker.life
        worker.channel.start(partial(self._come, self._heard, *of), partial(self._come, self._died, *of))

    def _come(self, take: Callable[..., None], *what: Any) -> None:
        """Of a channel's thread."""
        with suppress(RuntimeError):  # the event loop was closed: nobody listens any more
            self._loop.call_soon_threadsafe(take, *what)

    def _heard(self, worker: WorkerState, life: int, message: Message) -> None:
        if life != worker.life:  # of a worker that counts as dead: its searches are with others
            return
        header = message.header
        if "age" in header:  # of the tick of the engine's loop; other messages are of other threads
            worker.heard, worker.age = self._clock(), float(header["age"])
        if "stats" in header:
            worker.stats = header["stats"]
        if header["op"] == "news":
            for id, news in header["searches"].items():
                if (order := worker.orders.get(id)) is not None:
                    self._on_news(order, news)
        elif header["op"] == "over":
            if (order := worker.orders.pop(header["id"], None)) is not None:
                del self._at[order.id]
                self._on_over(order, header, message.payload)
                self._spread()
        elif header["op"] == "answer":
            _, future = self._asked.get(header["call"], (None, None))
            if future is not None and not future.done():
                future.set_result(message)
        elif header["op"] == "ready":
            worker.state, worker.failed_starts, worker.proven, worker.unfit = "ready", 0, True, False
            worker.heard, worker.age = self._clock(), 0.0
            LOG.info("the worker %s is ready", worker)
            self._wake()
            self._spread()
        elif header["op"] == "unfit" and worker.proven:  # what it lacks now may come back
            self._end(worker)
            self._died(worker, life, str(header["error"].get("message")))
        elif header["op"] == "unfit":
            worker.state, worker.unfit, self._unfit = "unfit", True, self._unfit or raised(header["error"])
            if not all(one.unfit for one in self.workers):
                why = header["error"].get("message")
                LOG.warning("the worker %s cannot be used (%s): it is tried again in %g s", worker, why, LONGEST_PAUSE)
            self._end(worker)  # what it holds is for the next try
            self._loop.call_later(LONGEST_PAUSE, self._launch, worker)
            self._wake()

    def _died(self, worker: WorkerState, life: int, reason: str) -> None:
        if life != worker.life or worker.state == "unfit":
            return
        LOG.warning("the worker %s died (%s); its %d searches go on elsewhere", worker, reason, len(worker.orders))
        worker.failed_starts += worker.state != "ready"
        worker.life, worker.deaths = worker.life + 1, worker.deaths + 1
        worker.state, orders, worker.orders = "dead", [*worker.orders.values()], {}
        alone, worker.reserved = worker.reserved and len(orders) == 1 and orders[0].deaths >= SHARED, False
        worker.bury()
        for _, future in [one for one in self._asked.values() if one[0] is worker]:
            if not future.done():
                future.set_exception(Died(reason))
        for order in orders:
            del self._at[order.id]
            order.deaths, order.alone = order.deaths + 1, order.alone + alone
            if order.cancelling:
                self._on_over(order, _cancelled(order), b"")
            elif order.alone >= ALONE:
                self._on_over(order, _killer(order, reason), b"")
            else:
                self._queue(order)
        self._loop.call_later(
            min(LONGEST_PAUSE, self._pause * 2 ** min(worker.failed_starts, 10)), self._launch, worker
        )
        self._wake()
        self._spread()

    async def _watch(self) -> None:
        """Ends workers whose engine does not tick, and those that are not ready for too long."""
        while True:
            await asyncio.sleep(min(1.0, self._hung / 4))
            now = self._clock()
            for worker in self.workers:
                if self._hangs(worker, now) and now - worker.ended >= self._hung:
                    LOG.warning("the worker %s is %s and hangs: it is ended", worker, worker.state)
                    worker.ended = now  # what could not be ended is tried again
                    self._end(worker)

    def _hangs(self, worker: WorkerState, now: float) -> bool:
        if worker.state == "starting":
            return now - worker.begun >= self._starting
        return worker.state == "ready" and worker.tick_age(now) >= self._hung

    def _end(self, worker: WorkerState) -> None:
        """Kills it on a thread of its own, since a cluster's answer may take its time."""
        threading.Thread(target=_kill, args=(worker.channel,), name="rollflow-kill", daemon=True).start()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _kill(channel: Channel) -> None:
    try:
        channel.kill()
    except Exception:  # the worker may be gone already
        LOG.exception("the worker %r could not be ended", channel)


def _cancelled(order: Ordered) -> dict[str, Any]:
    return {"status": "cancelled", "error": {"type": "Cancelled", "message": f"the search {order.id} was cancelled"}}


def _killer(order: Ordered, reason: str) -> dict[str, Any]:
    message = (
        f"{order.deaths} workers died while they ran this search, the last {ALONE} with nothing else ({reason}): it is "
        "given up; try a smaller size or budget, or another reward"
    )
    return {"status": "failed", "error": told(EngineDead(message))}
