"""What is with the device: which lanes are taken, what is started on them, and which rewards are called again later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from rollflow.errors import Cancelled
from rollflow.models import Geometry
from rollflow.preparing import Preparations
from rollflow.row import Again, Began, Brief, Candidate, Done, Failed, Free, Report, Rerun, Row, Show
from rollflow.schedule.scheduler import Scheduler
from rollflow.ticket import Ticket
from rollflow.timers import Timers


@runtime_checkable
class Device(Protocol):
    """What the loop needs of a runner; see `rollflow.device.runner.Runner`."""

    lanes: int
    parallel: bool
    preview: bool
    judge: Any  # see `rollflow.device.judge.Judge`

    def bucket(self, rows: int, geometry: Geometry, guided: bool = False) -> int:
        """The batch size of that many rows, guided or plain ones."""
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

    def submit_work(self, work: Callable[[], Any], then: Callable, report: Report, kind: str = "other") -> None:
        """Starts something else; `kind` is what the ledger calls it."""
        ...

    def peek(self, candidate: Candidate, brief: Brief) -> Any:
        """Makes an image of a particle; on a lane."""
        ...


class Dispatch:
    """Starts chores, images and batches while lanes are free: images before batches, and chores in turn with both.

    Args:
        device: runs them.
        preparations: the chores, and what batches cost.
        scheduler: which rows run next.
        tickets: the requests, by number.
        over: searches whose images are to be made.
        timers: for calls of rewards that are made again.
        clock: seconds.
        report: takes the device's answers.

    Attributes:
        lanes: how many are taken.
        away: how many rows and images are on the device or with a reward.
    """

    def __init__(
        self,
        device: Device,
        preparations: Preparations,
        scheduler: Scheduler,
        tickets: Mapping[int, Ticket],
        over: list[Ticket],
        timers: Timers,
        clock: Callable[[], float],
        report: Report,
    ):
        self.device, self._preparations, self._scheduler = device, preparations, scheduler
        self._tickets, self._over = tickets, over
        self._timers, self._clock, self._report = timers, clock, report
        self.lanes = self.away = 0
        self._chore = False  # whether one is on a lane: no more than one is at a time
        self._chores_first = True  # they alternate with batches, so that neither waits for all of the other
        self._reruns: deque[Rerun] = deque()

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way, so that nothing will come back."""
        return not self.away and not self.lanes

    def launch(self) -> None:
        """Starts what can be started, while lanes are free and there are rows worth running."""
        device = self.device
        while self.lanes < device.lanes:
            free = device.lanes - self.lanes if device.parallel else 1
            chores = bool(self._preparations.chores) and not self._chore
            if chores and self._chores_first:
                self._do_chore()
            elif self._reruns:
                self._run_again(self._reruns.popleft())
            elif self._over:
                self._show(free)
            elif rows := self._scheduler.choose(free):
                self.away += len(rows)
                for lane in range(lanes := min(free, len(rows))):
                    self._run(rows[lane::lanes])
            elif chores:
                self._do_chore()
            else:
                return

    def forget(self) -> None:
        """Waits no longer for what is on the device."""
        self.lanes = self.away = 0

    def _do_chore(self) -> None:
        """Starts a chore; whatever else can run goes before the next one."""
        self._chore, self._chores_first = True, False
        self.lanes += 1
        work, then, kind = self._preparations.chores.popleft()
        self.device.submit_work(work, then, self._report, kind)

    def _run(self, rows: Sequence[Row], attempt: int = 0) -> None:
        """Starts a batch and counts its rows; the bucket's padding is shared out in turns."""
        self.lanes += 1
        self._chores_first = True
        nfe = rows[0].nfe
        for i in range(self.device.bucket(len(rows), rows[0].brief.geometry, rows[0].kind == "guided")):
            search = self._tickets[rows[i % len(rows)].brief.ticket].search
            assert search is not None
            search.history.executed += nfe
        self.device.submit(rows, self._report, attempt)

    def _show(self, lanes: int) -> None:
        """Starts images of searches of one geometry: a share for each free lane, at most a batch's."""
        geometry = self._over[0].geometry
        alike = [ticket for ticket in self._over if ticket.geometry == geometry]
        every = self.device.preview
        finalists = max(ticket.plan.finalists for ticket in alike) if every else 1
        most = max(1, self._preparations.cost(geometry).largest // finalists)
        taken = alike[: min(most, -(-len(alike) // lanes))]
        self._over[:] = [ticket for ticket in self._over if ticket not in taken]
        self.lanes += 1
        self.away += len(taken)
        shows = []
        for ticket in taken:
            assert ticket.search is not None
            ticket.shown = True
            shows.append(ticket.search.show(every))
        self.device.submit_images(shows, self._report)

    # What comes back of it.

    def on_free(self, event: Free) -> None:
        """A lane can take more."""
        self.lanes -= 1

    def on_done(self, event: Done) -> None:
        """A chore was done."""
        self._chore = False
        event.then(event.value, event.error)

    def on_began(self, event: Began) -> None:
        """A call of a reward that has a time limit began, or is over."""
        call, seconds, turn = event
        if seconds is None:
            self._timers.cancel(call.timer)
            call.timer = None
        else:
            call.timer = self._timers.at(self._clock() + seconds, self._abandon, call, seconds, turn)

    def on_again(self, event: Again) -> None:
        """A reward was not available: its call is made again later, while others run."""
        self._timers.at(self._clock() + event.seconds, self._judge_again, event.call)

    def on_rerun(self, event: Rerun) -> None:
        """The same of guided rows, whose reward is called on a lane."""
        self._timers.at(self._clock() + event.seconds, self._reruns.append, event)

    def _abandon(self, call: Any, seconds: float, turn: Any) -> None:
        """A call of a reward takes too long: its requests fail, and its thread is given up."""
        if self.device.judge.abandon(turn):
            call.give_up(seconds, self._report)

    def _judge_again(self, call: Any) -> None:
        if all(self._is_over(one) for one in call.work):
            if (event := call.failed(call.work, _too_late())) is not None:
                self._report(event)
        else:
            self.device.judge.post(call, self._report)

    def _run_again(self, again: Rerun) -> None:
        """Rows whose reward was not available, but for those of requests that are over by now."""
        over = [row for row in again.rows if self._is_over(row)]
        if over:
            self._report(Failed(over, _too_late()))
        rows = [row for row in again.rows if row not in over]
        if rows:
            self._run(rows, again.attempt)

    def _is_over(self, one: Row | Show) -> bool:
        """Whether nobody needs it any more: its request failed, or its search ended and it is no step of a finish."""
        ticket = self._tickets.get(one.brief.ticket)
        if ticket is None or ticket.error is not None or ticket.search is None:
            return True
        return isinstance(one, Row) and one.kind not in ("finish", "refresh") and ticket.search.ending


def _too_late() -> Cancelled:
    return Cancelled("the request was over before its reward could be called again")
