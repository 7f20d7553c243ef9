"""The loop: one thread owns every search, every slot and every queue; all others talk to it through its inbox.

A step takes what is in the inbox (requests, answers of the device, cancellations), lets those in who fit, and fills the
lanes. Tests drive it by hand.
"""

from __future__ import annotations

import itertools
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rollflow import methods
from rollflow.errors import (
    Cancelled,
    EngineBusy,
    EngineClosed,
    EngineDead,
    FunctionError,
    ModelError,
    OutOfTime,
    RollflowError,
    said,
)
from rollflow.models import Geometry
from rollflow.plan import Plan
from rollflow.preparing import Preparations
from rollflow.profile.ledger import Ledger
from rollflow.row import (
    Again,
    Began,
    Brief,
    Candidate,
    Done,
    Event,
    Failed,
    Free,
    Landed,
    Outcome,
    Report,
    Rerun,
    Row,
    Show,
    Shown,
    Shrunk,
)  # fmt: skip
from rollflow.schedule.odds import Odds
from rollflow.schedule.pace import Pace
from rollflow.schedule.pool import Lease, Pool
from rollflow.schedule.scheduler import AGEING, Scheduler
from rollflow.search.record import History
from rollflow.search.search import Search
from rollflow.timers import Rate, Timers

FORSAKE = 5.0  # seconds after which a closing engine gives up what does not come back


@runtime_checkable
class Device(Protocol):
    """What the loop needs of a runner; see `rollflow.device.runner.Runner`."""

    lanes: int
    parallel: bool
    preview: bool
    judge: Any  # see `rollflow.device.judge.Judge`

    def bucket(self, rows: int, geometry: Geometry) -> int:
        """The batch size of that many rows."""
        ...

    def allocate(self, geometry: Geometry, slots: int) -> None:
        """Makes the storage of a geometry."""
        ...

    def submit(self, rows: Sequence[Row], report: Report, attempt: int = 0) -> None:
        """Starts a batch."""
        ...

    def submit_images(self, shows: Sequence[Show], report: Report) -> None:
        """Starts making images."""
        ...

    def submit_work(self, work: Callable[[], Any], then: Callable, report: Report) -> None:
        """Starts something else."""
        ...

    def peek(self, candidate: Candidate, geometry: Geometry) -> Any:
        """Makes an image of a particle; on a lane."""
        ...


class Started(NamedTuple):
    """A request was let in; its counts can be read from now on."""

    history: History
    seconds: float


class Evaluated(NamedTuple):
    """Rewards of a request came."""


class Finished(NamedTuple):
    """A request is over.

    Attributes:
        outcome: its image.
        history: its records and counts.
        stopped: what ended it.
        seconds: from when it was let in.
        plan: what was asked.
    """

    outcome: Outcome
    history: History
    stopped: str
    seconds: float
    plan: Plan


class Refused(NamedTuple):
    """A request failed, or was cancelled; `last` says that its best so far will not come either."""

    error: BaseException
    last: bool


News = Started | Evaluated | Finished | Refused
_EVALUATED = Evaluated()


class Ticket:
    """A request in the loop.

    Attributes:
        id: its number.
        plan, geometry: what was asked.
        tell: is told the news.
        submitted: when it came.
        resize: makes the plan for the budget that its time pays for; None when the budget is settled.
        search: once it was let in.
        over: whether its fate was told; rows of it may still be on the device.
        left: whether nothing of it is left anywhere.
        overdue: why it is to end as soon as it has something to show.
        cancelled: whether what it finds is only kept for those who ask for the best so far.
    """

    __slots__ = (
        "cancelled", "ended", "error", "geometry", "id", "left", "over", "overdue", "plan", "queued", "resize",
        "search", "shown", "started", "submitted", "tell",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        plan: Plan,
        geometry: Geometry,
        tell: Callable[[News], None],
        now: float,
        resize: Callable[[int], Plan] | None = None,
    ):
        self.id, self.plan, self.geometry, self.tell, self.submitted = number, plan, geometry, tell, now
        self.resize = resize
        self.search: Search | None = None
        self.error: BaseException | None = None
        self.started = self.ended = now
        self.over = self.left = self.shown = self.cancelled = False
        self.queued = True
        self.overdue: str | None = None


class Snapshot(NamedTuple):
    """What the loop holds; see `rollflow.engine.Stats`."""

    queued: int
    running: int
    live: int
    promised: int
    free: int
    rows: int
    nfe_per_second: float
    dead: BaseException | None


class Loop:
    """Runs requests on a device.

    Args:
        device: runs batches, and reports to the inbox.
        preparations: encodings and measured costs.
        ledger: where rows are counted.
        slots: how many particles of a geometry can live at once.
        max_queued: how many requests may wait; more are refused. None: any number.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        device: Device,
        preparations: Preparations,
        ledger: Ledger,
        slots: Callable[[Geometry], int],
        max_queued: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.device, self.preparations, self.ledger, self.clock = device, preparations, ledger, clock
        self.inbox: SimpleQueue[Event | tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self.dead: BaseException | None = None
        self.pace = Pace(preparations.costs, lambda: device.lanes if device.parallel else 1)
        self._slots, self._max_queued = slots, max_queued
        self._odds, self._timers, self._rate = Odds(), Timers(), Rate()
        self._scheduler = Scheduler(device.lanes, preparations.cost, clock)
        preparations.changed = self._lanes_changed
        self._numbers = itertools.count()
        self._tickets: dict[int, Ticket] = {}
        self._pools: dict[Geometry, Pool] = {}
        self._queues: dict[Geometry, list[tuple[float, int, Ticket]]] = {}
        self._lanes = self._away = 0  # lanes taken; rows and images with the device
        self._chore = self._closing = self._ended = False
        self._reruns: deque[Rerun] = deque()
        self._done: list[Ticket] = []  # searches whose images are to be made
        self._lock, self._queued = threading.Lock(), 0
        self._handlers: dict[type, Callable[[Any], None]] = {
            Free: self._on_free, Landed: self._on_landed, Shown: self._on_shown, Failed: self._on_failed,
            Shrunk: self._on_shrunk, Began: self._on_began, Again: self._on_again, Rerun: self._on_rerun,
            Done: self._on_done, tuple: self._on_call,
        }  # fmt: skip

    # Of any thread.

    def submit(
        self,
        plan: Plan,
        geometry: Geometry,
        tell: Callable[[News], None],
        force: bool = False,
        resize: Callable[[int], Plan] | None = None,
    ) -> Ticket:
        """Hands in a request.

        Args:
            plan: what is asked.
            geometry: of its images.
            tell: is told the news, on the loop's thread; must return at once and never raise.
            force: whether it passes by `max_queued`.
            resize: makes the plan for another budget, where the time decides how large it is.

        Raises:
            EngineBusy: as many requests as may wait already do.
        """
        with self._lock:
            if self._max_queued is not None and not force and self._queued >= self._max_queued:
                raise self._busy()
            self._queued += 1
        ticket = Ticket(next(self._numbers), plan, geometry, tell, self.clock(), resize)
        self.call(self._take_on, ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request: its queued rows go now, its rows on the device are dropped when they come back."""
        self.call(self._cancel, ticket)

    def peek(self, ticket: Ticket, then: Callable[[Any, BaseException | None], None]) -> None:
        """Makes an image of a request's best particle so far, for `then`; None where there is none."""
        self.call(self._peek, ticket, then)

    def close(self, drain: bool) -> None:
        """Takes no more requests; those that are here are finished, or without `drain` cancelled."""
        self.call(self._close, drain)

    def call(self, work: Callable[..., None], *args: Any) -> None:
        """Has the loop's thread do something."""
        self.inbox.put((work, args))

    # Of its one thread.

    def step(self, wait: float | None = None) -> bool:
        """Takes what came, waiting for it at most that many seconds (None: for ever), and starts what can be.

        Returns:
            False when it was closed and nothing is left.
        """
        self._receive(wait)
        self._timers.run(self.clock())
        self._admit()
        self._launch()
        if self._closing and not self._tickets and not self._lanes:
            self._ended = True
            self._drop_chores(EngineClosed("the engine was closed"))
        return not self._ended

    def fail(self, error: BaseException) -> None:
        """Ends everything, at once, with an error: the device, or the loop itself, can do no more."""
        self.dead = self.dead or error
        for ticket in [*self._tickets.values()]:
            self._refuse(ticket, error)
            self._leave(ticket)
        self._drop_chores(error)

    def _drop_chores(self, error: BaseException) -> None:
        chores = self.preparations.chores
        while chores:
            chores.popleft()[1](None, error)

    def _receive(self, wait: float | None) -> None:
        wait = self._timers.wait(self.clock(), wait)
        try:
            message = self.inbox.get(timeout=wait) if wait is None or wait > 0 else self.inbox.get_nowait()
        except Empty:
            return
        while True:
            self._handlers[type(message)](message)
            if self.inbox.empty():
                return
            message = self.inbox.get_nowait()

    def _on_call(self, message: tuple[Callable[..., None], tuple[Any, ...]]) -> None:
        message[0](*message[1])

    # How requests come and go.

    def _take_on(self, ticket: Ticket) -> None:
        self._tickets[ticket.id] = ticket
        if self.dead is not None or self._closing:
            dead = EngineDead("the device failed for good: make a new engine")
            dead.__cause__ = self.dead
            self._refuse(ticket, EngineClosed("the engine was closed") if self.dead is None else dead)
            return
        deadline = ticket.plan.request.deadline
        if deadline is not None:
            self._timers.at(deadline - self._reserve(ticket), self._expire, ticket, "deadline")
        self.preparations.want(ticket.plan.request.prompt, ticket.geometry, lambda error: self._prepared(ticket, error))

    def _prepared(self, ticket: Ticket, error: BaseException | None) -> None:
        if ticket.over:
            return
        if error is not None:
            self._refuse(ticket, error)
            return
        place = ticket.submitted - AGEING * ticket.plan.request.priority
        heappush(self._queues.setdefault(ticket.geometry, []), (place, ticket.id, ticket))

    def _admit(self) -> None:
        for geometry, queue in self._queues.items():
            while queue:
                ticket = queue[0][2]
                self._resize(ticket)
                try:
                    lease = None if ticket.over else self._pool(geometry).lease(promise(ticket.plan))
                except Exception as error:  # no memory for the pool of this size: others go on
                    heappop(queue)
                    self._refuse(ticket, pool_error(geometry, error))
                    continue
                if lease is None and not ticket.over:
                    break
                heappop(queue)
                if lease is not None:
                    self._start(ticket, lease)

    def _resize(self, ticket: Ticket) -> None:
        """Settles the budget of a request that has a time alone, by what batches were measured to cost."""
        resize, ticket.resize = ticket.resize, None
        if resize is None or ticket.over:
            return
        request, now = ticket.plan.request, self.clock()
        ends = [now + request.seconds] if request.seconds is not None else []
        ends += [request.deadline] if request.deadline is not None else []
        company = sum(other.search is not None for other in self._tickets.values())
        method = methods.title(request.method)
        nfe = self.pace.affordable(method, ticket.geometry, min(ends) - now, request.finish, company)
        if nfe is not None:
            try:
                ticket.plan = resize(nfe)
            except Exception as error:
                self._refuse(ticket, method_error(ticket.plan, error))

    def _pool(self, geometry: Geometry) -> Pool:
        if geometry not in self._pools:
            slots = self._slots(geometry)
            self.device.allocate(geometry, slots)
            self._pools[geometry] = Pool(slots)
        return self._pools[geometry]

    def _start(self, ticket: Ticket, lease: Lease) -> None:
        request, now = ticket.plan.request, self.clock()
        self._dequeue(ticket)
        brief = Brief(
            ticket.id, request.prompt, ticket.geometry, request.seed, float(request.guidance),
            self.preparations.conditioning[request.prompt], ticket.plan.reward, ticket.plan.latents,
        )  # fmt: skip
        try:
            ticket.search = Search(ticket.plan, brief, lease, self.ledger, self._odds)
        except BaseException as error:
            lease.close()
            self._refuse(ticket, method_error(ticket.plan, error))
            return
        ticket.started = now
        ticket.tell(Started(ticket.search.history, now))
        if request.seconds is not None:
            self._timers.at(now + request.seconds - self._reserve(ticket), self._expire, ticket, "seconds")
        self._scheduler.add(ticket.search)

    def _reserve(self, ticket: Ticket) -> float:
        """Seconds that the end of a search takes: its finish and its image."""
        return self.pace.ending(ticket.geometry, ticket.plan.request.finish)

    def _dequeue(self, ticket: Ticket) -> None:
        if ticket.queued:
            ticket.queued = False
            with self._lock:
                self._queued -= 1

    def _expire(self, ticket: Ticket, reason: str) -> None:
        """The time of a request is up: it ends with its best so far, or with the first that it will have."""
        if ticket.over or ticket.cancelled:
            return
        if ticket.search is None:
            self._refuse(ticket, OutOfTime(f"the {reason} of the request passed before it could begin: give it more"))
        elif not ticket.search.ending:
            ticket.overdue = reason
            self._stop(ticket)

    def _stop(self, ticket: Ticket, finish: bool = True) -> None:
        """Ends a search with its best so far, if it has one already."""
        search, reason = ticket.search, ticket.overdue
        if search is None or reason is None or search.ending:
            return
        try:
            ended = search.stop(reason, finish)
        except Exception as error:
            self._refuse(ticket, method_error(ticket.plan, error))
            return
        if ended:
            self._touched(ticket)

    def _cancel(self, ticket: Ticket) -> None:
        if ticket.over:
            return
        error = Cancelled("the request was cancelled")
        if ticket.search is None or ticket.search.best is None:
            self._refuse(ticket, error)
            return
        ticket.cancelled, ticket.overdue = True, "cancelled"
        ticket.over = True
        ticket.tell(Refused(error, last=False))
        if ticket.search.ending:
            ticket.search.cut()
        self._scheduler.discard(ticket.search)
        self._stop(ticket, finish=False)
        self._touched(ticket)

    def _refuse(self, ticket: Ticket, error: BaseException) -> None:
        """Ends a request with an error, of which it is told when nothing of it is on the device any more."""
        if ticket.left or ticket.error is not None:
            return
        ticket.error = error
        self._dequeue(ticket)
        search = ticket.search
        if search is not None:
            self._scheduler.discard(search)
            try:
                search.discard()
            except Exception as raised:  # of a method that does not take its end well: its request has failed anyway
                ticket.error.__context__ = raised
        if ticket in self._done:
            self._done.remove(ticket)
        if search is None or not (search.flying or ticket.shown):
            self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Nothing of a request is left on the device: its slots come back, and its fate is told."""
        if ticket.left:
            return
        ticket.left = True
        del self._tickets[ticket.id]
        if ticket.search is not None:
            try:
                ticket.search.close()
            except Exception as raised:
                ticket.error = ticket.error or method_error(ticket.plan, raised)
            self._scheduler.freed()
        if ticket.error is not None:
            ticket.over = True
            ticket.tell(Refused(ticket.error, last=True))

    def _peek(self, ticket: Ticket, then: Callable[[Any, BaseException | None], None]) -> None:
        search = ticket.search
        best = None if search is None or ticket.left or self.dead is not None else search.best
        if best is None:
            then(None, None)
            return

        def seen(image: Any, error: BaseException | None, kept: Any = best) -> None:  # holds the particle's slot
            then(image, error)

        geometry, candidate = ticket.geometry, best.candidate
        self.preparations.chores.append((lambda: self.device.peek(candidate, geometry), seen))

    def _close(self, drain: bool) -> None:
        self._closing = True
        if not drain:
            for ticket in [*self._tickets.values()]:
                self._refuse(ticket, Cancelled("the engine was closed"))
            self._timers.at(self.clock() + FORSAKE, self._forsake)

    def _forsake(self) -> None:
        for ticket in [*self._tickets.values()]:
            self._leave(ticket)
        self._lanes = self._away = 0

    # What starts.

    def _launch(self) -> None:
        """Starts chores, images and batches while lanes are free and there are rows worth running."""
        device = self.device
        while self._lanes < device.lanes and self.dead is None:
            free = device.lanes - self._lanes if device.parallel else 1
            if self.preparations.chores and not self._chore:
                self._chore = True
                self._lanes += 1
                device.submit_work(*self.preparations.chores.popleft(), self.inbox.put)
            elif self._reruns:
                self._run_again(self._reruns.popleft())
            elif self._done:
                self._show(free)
            elif rows := self._scheduler.choose(free):
                self._away += len(rows)
                for lane in range(lanes := min(free, len(rows))):
                    self._run(rows[lane::lanes])
            else:
                break
        if not self._away and not self._lanes and not self._timers and self._tickets:
            self._unstick()

    def _run(self, rows: Sequence[Row], attempt: int = 0) -> None:
        """Starts a batch and counts its rows; the bucket's padding is shared out in turns."""
        self._lanes += 1
        nfe = rows[0].nfe
        for i in range(self.device.bucket(len(rows), rows[0].brief.geometry)):
            search = self._tickets[rows[i % len(rows)].brief.ticket].search
            assert search is not None
            search.history.executed += nfe
        self.device.submit(rows, self.inbox.put, attempt)

    def _run_again(self, again: Rerun) -> None:
        """Rows whose reward was not available, but for those of requests that are over by now."""
        over = [row for row in again.rows if self._is_over(row)]
        if over:
            self._on_failed(Failed(over, Cancelled("the request was over before its reward could be called again")))
        rows = [row for row in again.rows if row not in over]
        if rows:
            self._run(rows, again.attempt)

    def _is_over(self, one: Row | Show) -> bool:
        ticket = self._tickets.get(one.brief.ticket)
        return ticket is None or ticket.error is not None

    def _show(self, lanes: int) -> None:
        """Starts images of searches of one geometry: a share for each free lane, at most a batch's."""
        geometry = self._done[0].geometry
        alike = [ticket for ticket in self._done if ticket.geometry == geometry]
        every = self.device.preview
        finalists = max(ticket.plan.finalists for ticket in alike) if every else 1
        most = max(1, self.preparations.cost(geometry).largest // finalists)
        taken = alike[: min(most, -(-len(alike) // lanes))]
        self._done = [ticket for ticket in self._done if ticket not in taken]
        self._lanes += 1
        self._away += len(taken)
        shows = []
        for ticket in taken:
            assert ticket.search is not None
            ticket.shown = True
            shows.append(ticket.search.show(every))
        self.device.submit_images(shows, self.inbox.put)

    def _unstick(self) -> None:
        """Nothing is on its way, and nothing can start: whoever runs holds more than its method said it would."""
        stuck = [ticket for ticket in self._tickets.values() if ticket.search is not None and not ticket.left]
        for ticket in stuck:
            name = methods.title(ticket.plan.request.method)
            self._refuse(
                ticket,
                RollflowError(
                    f"the method {name} holds more particles than it declared, and there is no slot left for the next: "
                    "correct what it declares, or make the engine with more slots"
                ),
            )

    # What comes back.

    def _on_free(self, event: Free) -> None:
        self._lanes -= 1

    def _on_landed(self, event: Landed) -> None:
        touched: dict[Ticket, None] = {}
        invalid = frozenset(event.invalid)
        self._away -= len(event.rows)
        self._scheduler.landed(event.rows)
        for row, score in zip(event.rows, event.scores, strict=True):
            ticket = self._tickets.get(row.brief.ticket)
            if ticket is None:  # it was forsaken
                continue
            search = ticket.search
            assert search is not None
            touched[ticket] = None
            if ticket.error is not None:
                search.lost(row)
                continue
            try:
                search.deliver(row, score, bool(invalid) and (ticket.id, row.number) in invalid)
            except Exception as error:
                self._refuse(ticket, method_error(ticket.plan, error))
        self._rate.add(self.clock(), len(event.rows) * event.rows[0].nfe)
        for ticket in touched:
            self._touched(ticket)
            if not ticket.over:
                ticket.tell(_EVALUATED)

    def _touched(self, ticket: Ticket) -> None:
        """Something changed for a search: it goes on, or is over."""
        search = ticket.search
        if search is None or ticket.left:
            return
        if ticket.error is not None:
            if not search.flying and not ticket.shown:
                self._leave(ticket)
            return
        if ticket.overdue is not None and not search.ending:
            self._stop(ticket, finish=not ticket.cancelled)
            return
        self._scheduler.add(search)
        if search.done and not ticket.shown and ticket not in self._done:
            ticket.ended = self.clock()
            self._done.append(ticket)
        self._scheduler.freed()

    def _on_shown(self, event: Shown) -> None:
        self._away -= len(event.shows)
        now = self.clock()
        for show, outcome in zip(event.shows, event.outcomes, strict=True):
            ticket = self._tickets.get(show.brief.ticket)
            if ticket is None:
                continue
            ticket.shown = False
            search = ticket.search
            assert search is not None and search.stopped is not None
            if ticket.error is None:
                seconds = now - ticket.started
                self.pace.learn(
                    methods.title(ticket.plan.request.method), ticket.geometry, search.history.committed, seconds,
                    now - ticket.ended, sum(other.search is not None for other in self._tickets.values()),
                )  # fmt: skip
                self._leave(ticket)
                ticket.over = True
                ticket.tell(Finished(outcome, search.history, search.stopped, seconds, ticket.plan))
            else:
                self._leave(ticket)

    def _on_failed(self, event: Failed) -> None:
        self._away -= len(event.work)
        if isinstance(event.work[0], Row):
            self._scheduler.landed([one for one in event.work if isinstance(one, Row)])
        if isinstance(event.error, EngineDead):
            self.fail(event.error)
            return
        for one in event.work:
            ticket = self._tickets.get(one.brief.ticket)
            if ticket is None:
                continue
            if isinstance(one, Row):
                assert ticket.search is not None
                ticket.search.lost(one)
            else:
                ticket.shown = False
            self._refuse(ticket, event.error)
            self._touched(ticket)

    def _on_shrunk(self, event: Shrunk) -> None:
        if self.preparations.shrink(event.geometry, event.rows):
            warn_of_memory(event, self.preparations.cost(event.geometry).largest)

    def _on_began(self, event: Began) -> None:
        self._timers.at(self.clock() + event.seconds, self._abandon, weakref.ref(event.call), event.seconds)

    def _abandon(self, call_of: Callable[[], Any], seconds: float) -> None:
        """A call of a reward takes too long: its requests fail, and its thread is given up."""
        call = call_of()  # a call that is over is gone
        if call is not None and self.device.judge.abandon(call):
            name, images = call.reward.name, len(call.briefs)
            error = FunctionError(
                f"the reward {name} did not answer for {images} images within its timeout of {seconds:g} s"
            )
            error.__cause__ = TimeoutError(f"{seconds:g} s")
            self._on_failed(Failed(call.work, error))

    def _on_again(self, event: Again) -> None:
        self._timers.at(self.clock() + event.seconds, self._judge_again, event.call)

    def _judge_again(self, call: Any) -> None:
        if all(self._is_over(one) for one in call.work):
            self._on_failed(
                Failed(call.work, Cancelled("the request was over before its reward could be called again"))
            )
        else:
            self.device.judge.post(call, self.inbox.put)

    def _on_rerun(self, event: Rerun) -> None:
        self._timers.at(self.clock() + event.seconds, self._reruns.append, event)

    def _on_done(self, event: Done) -> None:
        self._chore = False
        event.then(event.value, event.error)

    def _lanes_changed(self) -> None:
        self._scheduler.lanes = self.device.lanes

    # What can be known of it.

    def snapshot(self) -> Snapshot:
        """Counts of what is here; of any thread, as it finds them."""
        pools = [*self._pools.values()]
        return Snapshot(
            queued=self._queued,
            running=sum(1 for ticket in [*self._tickets.values()] if ticket.search is not None and not ticket.left),
            live=sum(pool.live for pool in pools),
            promised=sum(pool.promised for pool in pools),
            free=sum(pool.slots - pool.live for pool in pools),
            rows=self._away,
            nfe_per_second=self._rate.value(self.clock()),
            dead=self.dead,
        )

    def _busy(self) -> EngineBusy:
        tickets = [*self._tickets.values()]
        left = sum(ticket.plan.request.nfe or 0 for ticket in tickets) - sum(
            ticket.search.history.committed for ticket in tickets if ticket.search is not None
        )
        seconds = max(0.0, left / max(self._rate.value(self.clock()), 1e-3))
        return EngineBusy(
            f"{self._queued} requests wait already, as many as max_queued allows: come again in about {seconds:.1f} s, "
            "or make the engine with a larger max_queued",
            seconds,
        )


def promise(plan: Plan) -> int:
    """How many slots a request needs to go on: what its method holds, its finalists, and one row on its way.

    A finalist on its way to t = 0 takes up to three: itself, the step that it is at and the next one.
    """
    request, options = plan.request, plan.request.options
    held = methods.holds(request.method, request.nfe, len(plan.steps), plan.finish_nfe, **options)
    return min(request.nfe, max(held + plan.finalists + 2, 3 * plan.finalists))


def method_error(plan: Plan, error: BaseException) -> BaseException:
    """What a request is told of an error in its method."""
    if isinstance(error, RollflowError):
        return error
    name = methods.title(plan.request.method)
    raised = FunctionError(f"the method {name} raised {said(error)}")
    raised.__cause__ = error
    return raised


def pool_error(geometry: Geometry, error: BaseException) -> BaseException:
    """What a request is told where the particles of its image size find no memory."""
    if isinstance(error, RollflowError):
        return error
    raised = ModelError(
        f"the slots of {geometry.height}x{geometry.width} cannot be allocated ({said(error)}): ask for smaller images, "
        "or make the engine with fewer slots"
    )
    raised.__cause__ = error
    return raised


def warn_of_memory(event: Shrunk, largest: int) -> None:
    """A batch did not fit into the device's memory."""
    size = f"{event.geometry.height}x{event.geometry.width}"
    warnings.warn(
        f"a batch of {event.rows} rows of {size} did not fit into the device's memory and was split; from now on "
        f"batches of this size have at most {largest} rows, which may be slower",
        RuntimeWarning,
        stacklevel=2,
    )
