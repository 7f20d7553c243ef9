"""The loop: one thread owns every search, every slot and every queue; all others talk to it through its inbox.

A step takes what is in the inbox (requests, answers of the device, cancellations), lets those in who fit, and fills the
lanes. Tests drive it by hand.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from rollflow.admission import Admission
from rollflow.dispatch import Device, Dispatch
from rollflow.entries import Replay
from rollflow.errors import EngineClosed, EngineDead
from rollflow.models import Geometry
from rollflow.plan import Plan
from rollflow.preparing import Preparations
from rollflow.profile.ledger import Ledger
from rollflow.register import Register, method_error, no_more
from rollflow.row import Again, Began, Done, Event, Failed, Free, Landed, Rerun, Row, Shown, Shrunk
from rollflow.schedule.pace import Pace
from rollflow.schedule.scheduler import Scheduler
from rollflow.ticket import EVALUATED, News, Ticket
from rollflow.timers import Rate, Timers

FORSAKE = 5.0  # seconds after which a closing engine gives up what does not come back


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
        self.device, self.preparations, self.clock = device, preparations, clock
        self.inbox: SimpleQueue[Event | tuple[Callable[..., None], tuple[Any, ...]]] = SimpleQueue()
        self._timers, self._rate, self._ledger = Timers(), Rate(), ledger
        self._short = set[tuple[Geometry, bool]]()  # of whose shortness of memory was warned, of plain and guided rows
        self._ended, self._lock = False, threading.RLock()  # a collected engine may be closed anywhere
        self._admission = Admission(slots, device.allocate, max_queued)
        self._scheduler = scheduler = Scheduler(device.lanes, preparations.cost, clock)
        preparations.changed = self._lanes_changed
        self.pace = pace = Pace(preparations.costs, lambda: device.lanes if device.parallel else 1)
        self._register = register = Register(
            self._admission, scheduler, preparations, pace, self._timers, ledger, clock
        )
        self._dispatch = dispatch = Dispatch(
            device, preparations, scheduler, register.tickets, register.over, self._timers, clock, self.inbox.put
        )
        self._handlers: dict[type, Callable[[Any], None]] = {
            Free: dispatch.on_free, Landed: self._on_landed, Shown: self._on_shown, Failed: self._on_failed,
            Shrunk: self._on_shrunk, Began: dispatch.on_began, Again: dispatch.on_again, Rerun: dispatch.on_rerun,
            Done: dispatch.on_done, tuple: self._on_call,
        }  # fmt: skip

    # Of any thread.

    def submit(
        self,
        plan: Plan,
        geometry: Geometry,
        tell: Callable[[News], None],
        force: bool = False,
        resize: Callable[[int], Plan] | None = None,
        replay: Replay | None = None,
    ) -> Ticket:
        """Hands in a request.

        Args:
            plan: what is asked.
            geometry: of its images.
            tell: is told the news, on the loop's thread; must return at once and never raise.
            force: whether it passes by `max_queued`.
            resize: makes the plan for another budget, where the time decides how large it is.
            replay: what was evaluated of it elsewhere; a search that this does not fit begins anew.

        Raises:
            EngineBusy: as many requests as may wait already do.
            EngineClosed: it has ended.
            EngineDead: the device, or the loop itself, failed for good.
        """
        if self._register.dead is not None:
            raise no_more(self._register.dead)
        self._admission.enter(force, self._expected_wait)
        ticket = self._register.issue(plan, geometry, tell, resize, replay)
        if not self.call(self._register.take_on, ticket):
            self._admission.leave(ticket)
            raise EngineClosed("the engine was closed: make a new one")
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request: its queued rows go now, its rows on the device are dropped when they come back."""
        self.call(self._register.cancel, ticket)

    def peek(self, ticket: Ticket, then: Callable[[Any, BaseException | None], None]) -> None:
        """Makes an image of a request's best particle so far, for `then`; None where there is none."""
        if not self.call(self._peek, ticket, then):
            then(None, None)

    def close(self, drain: bool) -> None:
        """Takes no more requests; those that are here are finished, or without `drain` cancelled."""
        self.call(self._close, drain)

    def call(self, work: Callable[..., None], *args: Any) -> bool:
        """Has the loop's thread do something; False if the loop has ended, and nobody would do it."""
        with self._lock:
            if not self._ended:
                self.inbox.put((work, args))
            return not self._ended

    # Of its one thread.

    def step(self, wait: float | None = None) -> bool:
        """Takes what came, waiting for it at most that many seconds (None: for ever), and starts what can be.

        Returns:
            False when it was closed and nothing is left.
        """
        self._receive(wait)
        self._timers.run(self.clock())
        register, dispatch = self._register, self._dispatch
        register.admit()
        self._scheduler.freed()
        if register.dead is None:
            self._ledger.choosing()
            dispatch.launch()
        else:
            self._drop_chores(register.dead)
        if register.tickets and dispatch.idle and self.inbox.empty() and register.unstick():
            self.call(_nothing)  # what can start now starts in the next step
        if register.closing and not register.tickets and dispatch.lanes <= 0:
            with self._lock:  # what is in the inbox by now is still answered; what comes later is refused
                self._ended = self.inbox.empty()
        if self._ended:
            self._drop_chores(EngineClosed("the engine was closed"))
            self._admission.pools.clear()
        return not self._ended

    @property
    def due(self) -> float | None:
        """When, by its clock, it has something to do though nothing comes; None where that is never."""
        return self._timers.due

    def fail(self, error: BaseException) -> None:
        """Ends everything, at once, with an error: the device, or the loop itself, can do no more."""
        self._register.fail(error)
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

    def _peek(self, ticket: Ticket, then: Callable[[Any, BaseException | None], None]) -> None:
        search = ticket.search
        best = None if search is None or ticket.left or self._register.dead is not None else search.best
        if best is None:
            then(None, None)
            return

        unpin = best.slot.pin()  # or another particle, perhaps another request's, could be in its place by then

        def seen(image: Any, error: BaseException | None) -> None:
            unpin()
            then(image, error)

        assert search is not None, "it has a best particle"
        brief, candidate = search.brief, best.candidate
        self.preparations.chores.append((lambda: self.device.peek(candidate, brief), seen, "peek"))

    def _close(self, drain: bool) -> None:
        self._register.close(drain)
        if not drain or self._register.dead is not None:
            self._timers.at(self.clock() + FORSAKE, self._forsake)

    def _forsake(self) -> None:
        self._register.forsake()
        self._dispatch.forget()

    # What comes back.

    def _on_landed(self, event: Landed) -> None:
        with self._ledger.deciding(event.rows[0]):
            self._deliver(event)

    def _deliver(self, event: Landed) -> None:
        touched: dict[Ticket, None] = {}
        invalid = frozenset(event.invalid)
        self._dispatch.away -= len(event.rows)
        self._scheduler.landed(event.rows)
        self._ledger.spared([row for row, score in zip(event.rows, event.scores, strict=True) if score is None])
        for row, score in zip(event.rows, event.scores, strict=True):
            ticket = self._register.tickets.get(row.brief.ticket)
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
            except BaseException as error:  # SystemExit too: a method ends its own request alone
                self._register.refuse(ticket, method_error(ticket.plan, error))
        self._rate.add(self.clock(), len(event.rows) * event.rows[0].nfe)
        for ticket in touched:
            self._register.touched(ticket)
            if not ticket.over:
                ticket.tell(EVALUATED)

    def _on_shown(self, event: Shown) -> None:
        self._dispatch.away -= len(event.shows)
        with self._ledger.deciding(event.shows[0]):
            for show, outcome in zip(event.shows, event.outcomes, strict=True):
                ticket = self._register.tickets.get(show.brief.ticket)
                if ticket is not None:
                    self._register.finish(ticket, outcome)

    def _on_failed(self, event: Failed) -> None:
        self._dispatch.away -= len(event.work)
        if isinstance(event.work[0], Row):
            self._scheduler.landed([one for one in event.work if isinstance(one, Row)])
        if isinstance(event.error, EngineDead):
            self.fail(event.error)
            return
        for one in event.work:
            ticket = self._register.tickets.get(one.brief.ticket)
            if ticket is None:
                continue
            search = ticket.search
            assert search is not None
            if not isinstance(one, Row):
                ticket.shown = False
                self._register.refuse(ticket, event.error)
            elif ticket.error is not None:
                search.lost(one)
            else:
                try:
                    search.failed(one, event.error)
                except BaseException as error:
                    self._register.refuse(ticket, method_error(ticket.plan, error))
            self._register.touched(ticket)

    def _on_shrunk(self, event: Shrunk) -> None:
        kind = event.geometry, event.guided
        if self.preparations.shrink(event.geometry, event.rows, event.guided) and kind not in self._short:
            self._short.add(kind)
            warn_of_memory(event, self.preparations.cost(*kind).largest)

    def _lanes_changed(self) -> None:
        self._scheduler.lanes = self.device.lanes

    # What can be known of it.

    def snapshot(self) -> Snapshot:
        """Counts of what is here; of any thread, as it finds them."""
        pools = [*self._admission.pools.values()]
        return Snapshot(
            queued=self._admission.waiting,
            running=self._register.running,
            live=sum(pool.live for pool in pools),
            promised=sum(pool.promised for pool in pools),
            free=sum(pool.slots - pool.live for pool in pools),
            rows=self._dispatch.away,
            nfe_per_second=self._rate.value(self.clock()),
            dead=self._register.dead,
        )

    def _expected_wait(self) -> float:
        """Seconds until all that is here is done, at the present rate, or else at that of bare batches."""
        tickets = [*self._register.tickets.values()]
        rates = [self.pace.assumed(ticket.geometry) or 0.0 for ticket in tickets]
        rate = self._rate.value(self.clock()) or max(rates, default=0.0)
        return self._register.unspent / rate if rate else 1.0  # nothing ran yet, and nothing is known


def warn_of_memory(event: Shrunk, largest: int) -> None:
    """A batch did not fit into the device's memory."""
    size, rows = f"{event.geometry.height}x{event.geometry.width}", "guided rows" if event.guided else "rows"
    with suppress(RuntimeWarning):  # where warnings are errors, this thread is nobody's to raise it to
        warnings.warn(
            f"a batch of {event.rows} {rows} of {size} did not fit into the device's memory and was split; from now on "
            f"batches of this size have at most {largest} {rows} (fewer, should those not fit either), which may be "
            "slower. This warning comes once for each size",
            RuntimeWarning,
            stacklevel=2,
        )


def _nothing() -> None:
    pass
