"""A request in the loop, and the news that it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rollflow.entries import Replay
from rollflow.models import Geometry
from rollflow.plan import Plan
from rollflow.row import Outcome
from rollflow.search.record import History
from rollflow.search.search import Search
from rollflow.timers import Timer


class Started(NamedTuple):
    """A request was let in, with this budget; its counts can be read from now on."""

    history: History
    seconds: float
    nfe: int = 0


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
        network_rows: how many rows of the network an evaluation took.
        ticket: its number.
    """

    outcome: Outcome
    history: History
    stopped: str
    seconds: float
    plan: Plan
    network_rows: int = 1
    ticket: int = -1


class Refused(NamedTuple):
    """A request failed, or was cancelled; `last` says that its best so far will not come either."""

    error: BaseException
    last: bool


News = Started | Evaluated | Finished | Refused
EVALUATED = Evaluated()


class Ticket:
    """A request in the loop.

    Attributes:
        id: its number.
        plan, geometry: what was asked.
        tell: is told the news.
        submitted: when it came.
        came: the same by the ledger's clock.
        spec: what was asked as plain values, see `rollflow.specs`.
        resize: makes the plan for the budget that its time pays for; None when the budget is settled.
        replay: what another process has evaluated of it, or None.
        conditioning: what the model made of its prompt, once it may be let in.
        start: what it starts from of an image, or None.
        search: once it was let in.
        over: whether its fate was told; rows of it may still be on the device.
        left: whether nothing of it is left anywhere.
        overdue: why it is to end as soon as it has something to show.
        cancelled: whether what it finds is only kept for those who ask for the best so far.
        queued: whether it is counted among those that wait.
        shown: whether its image is being made.
        started, ended: when it was let in, and when its search was over.
        error: why it fails, as soon as nothing of it is on the device any more.
        timers: those that will end it.
    """

    __slots__ = (
        "came", "cancelled", "conditioning", "ended", "error", "geometry", "id", "left", "over", "overdue", "plan",
        "queued", "replay", "resize", "search", "shown", "spec", "start", "started", "submitted", "tell", "timers",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        plan: Plan,
        geometry: Geometry,
        tell: Callable[[News], None],
        now: float,
        resize: Callable[[int], Plan] | None = None,
        came: float = 0.0,
        replay: Replay | None = None,
    ):
        self.id, self.plan, self.geometry, self.tell, self.submitted = number, plan, geometry, tell, now
        self.resize, self.came, self.spec, self.replay = resize, came, dict[str, Any](), replay
        self.conditioning: Any = None
        self.start: Any = None
        self.search: Search | None = None
        self.error: BaseException | None = None
        self.started = self.ended = now
        self.over = self.left = self.shown = self.cancelled = False
        self.queued = True
        self.overdue: str | None = None
        self.timers: list[Timer] = []
