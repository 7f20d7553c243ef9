"""The register: every request from its arrival to its departure, and what each is told."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from rollflow import methods
from rollflow.admission import Admission
from rollflow.device.attempts import model_error
from rollflow.entries import Replay
from rollflow.errors import (
    Abandoned,
    Cancelled,
    EngineClosed,
    EngineDead,
    FunctionError,
    OutOfTime,
    RollflowError,
    said,
)
from rollflow.models import Geometry
from rollflow.models.text import Text
from rollflow.plan import Plan
from rollflow.preparing import Preparations
from rollflow.profile.ledger import Ledger
from rollflow.request import Request
from rollflow.row import Brief, Outcome
from rollflow.schedule.odds import Odds
from rollflow.schedule.pace import Pace
from rollflow.schedule.pool import Lease
from rollflow.schedule.scheduler import Scheduler
from rollflow.search.search import Search
from rollflow.specs import spec
from rollflow.ticket import Finished, News, Refused, Started, Ticket
from rollflow.timers import Timers

LOG = logging.getLogger("rollflow")


class Register:
    """The requests that are here, by number.

    Args:
        admission: who is let in.
        scheduler: which rows run next.
        preparations: encodings and measured costs.
        pace: what a time pays for.
        timers: ends of requests whose time is limited.
        ledger: where requests and their rows are written.
        clock: seconds.

    Attributes:
        tickets: all that are here, rows on the device included.
        over: searches whose images are to be made.
        running: how many were let in and are not over.
        dead: why no request can be taken any more; None while they can.
        closing: whether none is taken any more because the engine closes.
    """

    def __init__(
        self,
        admission: Admission,
        scheduler: Scheduler,
        preparations: Preparations,
        pace: Pace,
        timers: Timers,
        ledger: Ledger,
        clock: Callable[[], float],
    ):
        self._admission, self._scheduler, self._preparations = admission, scheduler, preparations
        self._pace, self._timers, self._ledger, self._clock = pace, timers, ledger, clock
        self._odds, self._numbers = Odds(), itertools.count()
        self.tickets: dict[int, Ticket] = {}
        self.over: list[Ticket] = []
        self.dead: BaseException | None = None
        self.closing, self.running = False, 0

    # How requests come.

    def issue(
        self,
        plan: Plan,
        geometry: Geometry,
        tell: Callable[[News], None],
        resize: Callable[[int], Plan] | None,
        replay: Replay | None = None,
    ) -> Ticket:
        """A ticket for a request; of any thread."""
        ticket = Ticket(next(self._numbers), plan, geometry, tell, self._clock(), resize, self._ledger.clock(), replay)
        ticket.spec = spec(plan, geometry)  # here, on the caller's thread: it looks at what he made
        return ticket

    def take_on(self, ticket: Ticket) -> None:
        """A request is here: what it needs is prepared, and then it waits in line."""
        self.tickets[ticket.id] = ticket
        self._ledger.came(ticket.id, ticket.spec, ticket.came)
        if self.dead is not None or self.closing:
            self.refuse(ticket, EngineClosed("the engine was closed") if self.dead is None else no_more(self.dead))
            return
        request = ticket.plan.request
        if request.deadline is not None:
            self._end_at(ticket, request.deadline, "deadline")
        self._prepare(ticket)

    def _prepare(self, ticket: Ticket) -> None:
        request, preparations = ticket.plan.request, self._preparations
        guided = methods.guided(request.method, request.options)
        want = preparations.want_guided if guided else preparations.want
        want(text_of(ticket.plan), ticket.geometry, lambda error: self._prepared(ticket, error))

    def _prepared(self, ticket: Ticket, error: BaseException | None) -> None:
        if error is not None:
            self.refuse(ticket, error)
        elif not ticket.over:
            try:  # held from now on: what others ask for meanwhile may push it out
                ticket.conditioning = self._preparations.known(text_of(ticket.plan), ticket.geometry)
            except KeyError:
                self._prepare(ticket)
            else:
                self._started(ticket, None, None)

    def _started(self, ticket: Ticket, state: Any, error: BaseException | None) -> None:
        """What a request starts from is there, or is made of its image first; then it waits in line."""
        image, mask = ticket.plan.request.image, ticket.plan.request.mask
        if error is not None:
            self.refuse(ticket, error)
        elif ticket.over:
            return
        elif image is not None and state is None:
            assert isinstance(image, Tensor) and (mask is None or isinstance(mask, Tensor)), "checked at the door"
            self._preparations.start(image, mask, ticket.geometry, partial(self._started, ticket))
        else:
            ticket.start = state
            self._admission.line_up(ticket)

    def admit(self) -> None:
        """Lets those in whose slots are there."""
        for ticket, lease in self._admission.admit(self._settle, self.refuse):
            self._start(ticket, lease)

    def _settle(self, ticket: Ticket) -> None:
        """Settles the budget of a request that has a time alone, by what batches were measured to cost."""
        resize, ticket.resize = ticket.resize, None
        if resize is None:
            return
        request, now = ticket.plan.request, self._clock()
        ends = [now + request.seconds] if request.seconds is not None else []
        ends += [request.deadline] if request.deadline is not None else []
        method = methods.title(request.method)
        nfe = self._pace.affordable(method, ticket.geometry, min(ends) - now, _ending(request), self.running)
        if nfe is not None:
            try:
                ticket.plan = resize(nfe)
            except Exception as error:
                self.refuse(ticket, method_error(ticket.plan, error))

    def _start(self, ticket: Ticket, lease: Lease) -> None:
        request, now = ticket.plan.request, self._clock()
        try:
            ticket.search = self._search(ticket, lease)
        except BaseException as error:
            lease.close()
            self.refuse(ticket, method_error(ticket.plan, error))
            return
        ticket.started = now
        self.running += 1
        self._ledger.changed(ticket.id, "running", started=self._ledger.clock(), nfe=ticket.plan.nfe)
        ticket.tell(Started(ticket.search.history, now, ticket.plan.nfe))
        if request.seconds is not None:
            self._end_at(ticket, now + request.seconds, "seconds")
        self.touched(ticket)

    def _search(self, ticket: Ticket, lease: Lease) -> Search:
        """A request's search, at its beginning or where another process has left it."""
        brief, (replay, ticket.replay) = self._brief(ticket), (ticket.replay, None)
        if replay is not None and replay.entries:
            search = Search(ticket.plan, brief, lease, self._ledger, self._odds)
            try:
                search.replay(replay)
                return search
            except Exception as error:  # of what the method does with scores of others: it did not with its own
                search.discard()
                LOG.warning("a search that was to be resumed begins anew (%s)", said(error))
        return Search(ticket.plan, brief, lease, self._ledger, self._odds)

    def _brief(self, ticket: Ticket) -> Brief:
        """What every row of a request carries; raises `ModelError` for what its model raises."""
        request = ticket.plan.request
        guidance = float(request.guidance or 0.0)
        given = (ticket.plan.reward, ticket.plan.latents, ticket.start)
        try:
            rest = self._preparations.company(ticket.conditioning, guidance, *given)
        except RollflowError:
            raise
        except BaseException as error:
            raise model_error(error) from error
        whose = ticket.id, request.prompt, ticket.geometry, request.seed
        return replace(Brief(*whose, guidance, *rest), held_out=ticket.plan.held_out)

    @property
    def unspent(self) -> int:
        """Evaluations that those who are here have yet to spend; of any thread."""
        tickets = [*self.tickets.values()]
        spent = sum(ticket.search.history.committed for ticket in tickets if ticket.search is not None)
        return max(0, sum(ticket.plan.nfe for ticket in tickets) - spent)

    # How requests go on.

    def touched(self, ticket: Ticket) -> None:
        """Something changed for a search: it goes on, or is over."""
        search = ticket.search
        if search is None or ticket.left:
            return
        if ticket.error is not None:
            if not search.flying and not ticket.shown:
                self.leave(ticket)
            return
        if ticket.overdue is not None and not search.ending:
            self._stop(ticket, finish=not ticket.cancelled)
            if search.ending:  # and was looked at by that
                return
        self._scheduler.add(search)
        if search.done and not ticket.shown and ticket not in self.over:
            ticket.ended = self._clock()
            self._ledger.changed(ticket.id, searched=self._ledger.clock())
            self.over.append(ticket)

    def _end_at(self, ticket: Ticket, when: float, reason: str) -> None:
        """Ends a request so early that its finish and its image are there at `when`."""
        reserve = self._pace.ending(ticket.geometry, _ending(ticket.plan.request))
        ticket.timers.append(self._timers.at(when - reserve, self._expire, ticket, reason))

    def _expire(self, ticket: Ticket, reason: str) -> None:
        """The time of a request is up: it ends with its best so far, or with the first that it will have."""
        if ticket.over or ticket.cancelled:
            return
        if ticket.search is None and ticket.replay is not None and ticket.replay.entries:
            ticket.overdue = reason  # what it has found already is its result
        elif ticket.search is None:
            self.refuse(ticket, OutOfTime(f"the {reason} of the request passed before it could begin: give it more"))
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
        except BaseException as error:
            self.refuse(ticket, method_error(ticket.plan, error))
            return
        if ended:
            self.touched(ticket)

    def unstick(self) -> bool:
        """Nothing is on its way, and nothing can start: of those that run, the one that holds most beyond its promise
        ends, and the others go on with its slots. False where nobody runs.
        """
        excess = {ticket.search.excess: ticket for ticket in self.tickets.values() if ticket.search is not None}
        if not excess:
            return False
        ticket = excess[max(excess)]
        error = RollflowError(
            f"the method {methods.title(ticket.plan.request.method)} holds more particles than it declared, and there "
            "is no slot left for the next: correct what it declares, or make the engine with more slots"
        )
        self.refuse(ticket, error)
        return True

    # How requests go.

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request with an error; what it has found is still made an image of, for those who ask."""
        if ticket.over:
            return
        error = Cancelled("the request was cancelled")
        if ticket.search is None or ticket.search.best is None:
            self.refuse(ticket, error)
            return
        ticket.cancelled, ticket.overdue = True, "cancelled"
        ticket.over = True
        ticket.tell(Refused(error, last=False))
        if ticket.search.ending:
            ticket.search.cut()
        self._scheduler.discard(ticket.search)
        self._stop(ticket, finish=False)
        self.touched(ticket)

    def refuse(self, ticket: Ticket, error: BaseException) -> None:
        """Ends a request with an error, of which it is told when nothing of it is on the device any more."""
        if ticket.left or ticket.error is not None:
            return
        ticket.error = error
        self._admission.leave(ticket)
        search = ticket.search
        if search is not None:
            self._scheduler.discard(search)
            try:
                search.discard()
            except BaseException as raised:  # a method that does not take its end well: its request has failed anyway
                ticket.error.__context__ = raised
        if ticket in self.over:
            self.over.remove(ticket)
        if search is None or not (search.flying or ticket.shown):
            self.leave(ticket)

    def finish(self, ticket: Ticket, outcome: Outcome) -> None:
        """The image of a search that is over was made."""
        ticket.shown = False
        search, now = ticket.search, self._clock()
        assert search is not None and search.stopped is not None
        if ticket.error is not None:
            self.leave(ticket)
            return
        search.shown(outcome)
        seconds = now - ticket.started
        self._pace.learn(
            methods.title(ticket.plan.request.method), ticket.geometry, search.history.committed, seconds,
            now - ticket.ended, self.running,
        )  # fmt: skip
        self.leave(ticket)
        ticket.over = True
        self._ended(
            ticket, "cancelled" if ticket.cancelled else "done", stopped=search.stopped, score=outcome.reward,
            held_out=math.nan if outcome.held_out is None else outcome.held_out,
        )  # fmt: skip
        rows = search.brief.network_rows
        ticket.tell(Finished(outcome, search.history, search.stopped, seconds, ticket.plan, rows, ticket.id))

    def leave(self, ticket: Ticket) -> None:
        """Nothing of a request is left on the device: its slots come back, and its fate is told."""
        if ticket.left:
            return
        ticket.left = True
        del self.tickets[ticket.id]
        for timer in ticket.timers:
            self._timers.cancel(timer)
        if ticket.search is not None:
            self.running -= 1
            try:
                ticket.search.close()
            except BaseException as raised:
                ticket.error = ticket.error or method_error(ticket.plan, raised)
        if ticket.error is not None:
            ticket.over = True
            cancelled = ticket.cancelled or isinstance(ticket.error, Cancelled)
            self._ended(ticket, "cancelled" if cancelled else "failed")
            ticket.tell(Refused(ticket.error, last=True))

    def _ended(self, ticket: Ticket, state: str, **fields: Any) -> None:
        """Writes the end of a request down."""
        if ticket.search is not None:
            history = ticket.search.history
            fields |= {"committed": history.committed, "executed": history.executed}
        self._ledger.changed(ticket.id, state, ended=self._ledger.clock(), **fields)

    def fail(self, error: BaseException) -> None:
        """Ends all, at once, and takes no more."""
        self.dead = self.dead or error
        for ticket in [*self.tickets.values()]:
            self.refuse(ticket, error)
            self.leave(ticket)

    def close(self, drain: bool) -> None:
        """Takes no more; those that are here go on, or without `drain` are cancelled."""
        self.closing = True
        if not drain:
            for ticket in [*self.tickets.values()]:
                self.refuse(ticket, Abandoned("the engine was closed"))

    def forsake(self) -> None:
        """Waits no longer for what is on the device."""
        for ticket in [*self.tickets.values()]:
            self.leave(ticket)


def _ending(request: Request) -> int:
    """Evaluations one after another from the end of a search proper to its image."""
    return request.finish + request.cache


def text_of(plan: Plan) -> Text:
    """What a request asks its model for."""
    return Text(plan.request.prompt, plan.request.negative)


def no_more(cause: BaseException) -> EngineDead:
    """What is told of an engine that can do no more to those who come later."""
    dead = EngineDead(f"the engine failed for good ({said(cause)}): make a new engine")
    dead.__cause__ = cause
    return dead


def method_error(plan: Plan, error: BaseException) -> BaseException:
    """What a request is told of an error in its method."""
    if isinstance(error, RollflowError):
        return error
    name = methods.title(plan.request.method)
    raised = FunctionError(f"the method {name} raised {said(error)}")
    raised.__cause__ = error
    return raised
