"""Which requests are let in, and when: they wait in line until the pool can promise the slots that they need."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from rollflow.errors import EngineBusy, RollflowError, said
from rollflow.models import Geometry
from rollflow.plan import Plan
from rollflow.schedule.pool import Lease, Pool
from rollflow.schedule.scheduler import AGEING
from rollflow.ticket import Ticket


class Admission:
    """The line of waiting requests of each geometry, and the pools that they wait for.

    A place in a line is the time of arrival, less `AGEING` seconds for each step of priority: so a higher priority goes
    first, and nobody waits for ever. The first in line holds up those behind it, or a large request would starve.

    Args:
        slots: how many particles of a geometry can live at once.
        allocate: makes the storage of a geometry.
        most: how many requests may wait; None for any number.
    """

    def __init__(
        self, slots: Callable[[Geometry], int], allocate: Callable[[Geometry, int], None], most: int | None = None
    ):
        self._slots, self._allocate, self._most = slots, allocate, most
        self.pools: dict[Geometry, Pool] = {}
        self._lines: dict[Geometry, list[tuple[float, int, Ticket]]] = {}
        self._gone = Counter[Geometry]()  # those who ceased to wait since a line was last cleared of them
        self._lock, self.waiting = threading.Lock(), 0

    def enter(self, force: bool, expected: Callable[[], float]) -> None:
        """Counts one more request that waits; of any thread.

        Args:
            force: whether it passes by the bound.
            expected: seconds until one more would be let in.

        Raises:
            EngineBusy: as many as may wait already do.
        """
        with self._lock:
            if self._most is None or force or self.waiting < self._most:
                self.waiting += 1
                return
        seconds = expected()
        raise EngineBusy(
            f"{self._most} requests wait already, as many as max_queued allows: come again in about {seconds:.1f} s, "
            "or make the engine with a larger max_queued",
            seconds,
        )

    def leave(self, ticket: Ticket) -> None:
        """A request does not wait any more, whether it was let in or is over; further calls do nothing."""
        if ticket.queued:
            ticket.queued = False
            with self._lock:
                self.waiting -= 1
                self._gone[ticket.geometry] += 1

    def line_up(self, ticket: Ticket) -> None:
        """All that a request needs is prepared, but for its slots."""
        place = ticket.submitted - AGEING * ticket.plan.request.priority
        heappush(self._lines.setdefault(ticket.geometry, []), (place, ticket.id, ticket))

    def admit(
        self, settle: Callable[[Ticket], None], refuse: Callable[[Ticket, BaseException], None]
    ) -> Iterator[tuple[Ticket, Lease]]:
        """The requests whose slots are there, first come first, each with its lease.

        Args:
            settle: makes the last change to a request's plan, or ends the request, before its slots are counted.
            refuse: ends a request with an error.
        """
        for geometry, line in self._lines.items():
            self._clear(geometry, line)
            while line:
                ticket = line[0][2]
                if not ticket.over:
                    settle(ticket)
                lease = None
                if not ticket.over:
                    try:
                        lease = self._pool(ticket.geometry).lease(promise(ticket.plan))
                    except Exception as error:
                        refuse(ticket, self._no_room(ticket.geometry, error))
                if lease is None and not ticket.over:
                    break
                heappop(line)
                if lease is not None:
                    self.leave(ticket)
                    yield ticket, lease

    def _clear(self, geometry: Geometry, line: list[tuple[float, int, Ticket]]) -> None:
        """Takes those out of a line who are over, once they may be half of it: its head may wait for long."""
        if line and 2 * self._gone[geometry] >= len(line):
            line[:] = [place for place in line if not place[2].over]
            heapify(line)
            self._gone[geometry] = 0

    def _no_room(self, geometry: Geometry, error: Exception) -> RollflowError:
        size = f"{geometry.height}x{geometry.width}"
        full = RollflowError(
            f"there is no room for {self._slots(geometry)} particles of {size} ({said(error)}): ask for smaller "
            "images, or make the engine with fewer, by Engine(slots=...)"
        )
        full.__cause__ = error
        return full

    def _pool(self, geometry: Geometry) -> Pool:
        if geometry not in self.pools:
            slots = self._slots(geometry)
            self._allocate(geometry, slots)
            self.pools[geometry] = Pool(slots)
        return self.pools[geometry]


def promise(plan: Plan) -> int:
    """How many slots a request needs to go on: what its method holds, its finalists, and one row on its way.

    A finalist on its way to t = 0 takes up to three: itself, the step that it is at and the next one.
    """
    return min(plan.nfe, max(plan.held + plan.finalists + 1, 3 * plan.finalists))
