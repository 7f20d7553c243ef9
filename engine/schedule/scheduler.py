"""Which rows run next: packs the rows of all live searches into batches, by priority, and round robin between equals.

While one batch is decoded, judged and decided on, the other searches' rows are in the transformer: searches fall into
cohorts that alternate. Rows of one batch belong to different prompts at different times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from heapq import heappop, heappush, nlargest
from itertools import count, islice
from typing import Protocol, runtime_checkable

from rollflow.models import Geometry
from rollflow.row import Row
from rollflow.schedule.cost import NEGLIGIBLE, SURE, CostModel

AGEING = 10.0  # seconds of waiting that count as much as one step of priority
# Rows of one batch share an image size and whatever else the model asks for, and either all run apart or none does:
# guided rows (as such rows are called here), or of requests with a cache those that are evaluated from it.
Batch = tuple[Geometry, Hashable, bool]


@runtime_checkable
class Client(Protocol):
    """What the scheduler needs of a search; see `rollflow.search.search.Search`.

    Attributes:
        geometry: the image size of its rows.
        company: what else rows of one batch have in common.
        priority: searches of a higher one go first.
        kinds: whether it has plain rows (False), guided ones (True) or both.
        queued: the scheduler's own: whether it stands in the queue of plain and of guided rows.
    """

    geometry: Geometry
    company: Hashable
    priority: int
    kinds: tuple[bool, ...]
    queued: list[bool]

    def waiting(self, guided: bool) -> int:
        """How many rows can run now."""
        ...

    def take(self, guided: bool) -> Row | None:
        """The next of them, or None while there is no slot for it."""
        ...

    def may_run_ahead(self, guided: bool) -> bool:
        """Whether there are rows that may run before it is known whether they are needed."""
        ...

    def chances(self, guided: bool, least: float = 0.0) -> Iterator[tuple[float, int]]:
        """Of rows that may run ahead: the chance to be needed, and the draw."""
        ...

    def take_ahead(self, i: int) -> Row | None:
        """The next row of draw `i`, or None while there is no slot for it."""
        ...


class Scheduler:
    """The queues of waiting rows, and the choice among them.

    Its work a batch does not depend on how many searches are live: what can run waits in a queue. A place in a queue is
    the time at which it was taken, less `AGEING` for each step of priority: so a higher priority goes first, and nobody
    waits for ever.

    Args:
        lanes: how many batches may be on the device at a time.
        cost: what batches of a geometry cost, of plain rows (False) or guided ones (True).
        clock: seconds.
    """

    def __init__(self, lanes: int, cost: Callable[[Geometry, bool], CostModel], clock: Callable[[], float]):
        self.lanes, self._cost, self._clock = lanes, cost, clock
        self._queues: dict[Batch, list[tuple[float, int, Client]]] = {}
        self._order: deque[Batch] = deque()  # kinds take turns
        self._ahead: dict[Client, None] = {}  # searches with a draw that could issue speculative rows
        self._blocked: dict[Client, None] = {}  # searches that wait for a slot
        self._tickets = count()
        self._flying: dict[Batch, int] = {}  # rows whose rewards are not here yet

    def add(self, search: Client) -> None:
        """Puts a search that has rows to run into the queue of their kind, once."""
        for guided in search.kinds:
            if not search.queued[guided] and search.waiting(guided):
                kind = (search.geometry, search.company, guided)
                if kind not in self._queues:
                    self._queues[kind], self._flying[kind] = [], 0
                    self._order.append(kind)
                self._push(kind, search)
            self._may_run_ahead(search, guided)

    def discard(self, search: Client) -> None:
        """Forgets a search; its rows on the device still count until they land."""
        for guided in (False, True):
            if search.queued[guided]:
                queue = self._queues[search.geometry, search.company, guided]
                queue[:] = [entry for entry in queue if entry[2] is not search]
                queue.sort()
                search.queued[guided] = False
        self._ahead.pop(search, None)
        self._blocked.pop(search, None)

    def freed(self) -> None:
        """Slots came back that others may have waited for."""
        if self._blocked:
            blocked, self._blocked = self._blocked, {}
            for search in blocked:
                self.add(search)

    def landed(self, rows: Sequence[Row]) -> None:
        """Rows of one batch are no longer on the device."""
        brief = rows[0].brief
        kind = (brief.geometry, brief.company, rows[0].apart)
        self._flying[kind] -= len(rows)
        if (
            brief.company is not None and not self._queues[kind] and not self._flying[kind]
        ):  # there may be ever new ones
            del self._queues[kind], self._flying[kind]
            self._order.remove(kind)

    def choose(self, lanes: int) -> list[Row]:
        """The rows to run now on `lanes` free lanes: of the kind with the highest priority, and of equals in turn."""
        now = self._clock()
        for kind in sorted(self._order, key=lambda kind: self._queues[kind][0][0] if self._queues[kind] else now):
            if rows := self._choose_of(kind, lanes):
                self._order.remove(kind)
                self._order.append(kind)
                self._flying[kind] += len(rows)
                return rows
        return []

    def _push(self, kind: Batch, search: Client) -> None:
        search.queued[kind[2]] = True
        place = self._clock() - AGEING * search.priority
        heappush(self._queues[kind], (place, next(self._tickets), search))

    def _may_run_ahead(self, search: Client, guided: bool) -> None:
        if search.may_run_ahead(guided):
            self._ahead[search] = None

    def _choose_of(self, kind: Batch, lanes: int) -> list[Row]:
        """Rows that are needed, in turns, and where that pays, rows that run ahead of the answer."""
        queue, cost = self._queues[kind], self._cost(kind[0], kind[2])
        most, waiting = self.lanes * cost.largest, 0
        for _, _, search in queue:
            waiting += search.waiting(kind[2])
            if waiting >= most:
                break
        certain = waiting
        if lanes < self.lanes:  # leave the other lanes their share, or cohorts of unequal size would stay so
            certain = min(certain, -(-(certain + self._flying[kind]) // self.lanes))
        rows = self._take(kind, cost.rows(certain, [], lanes)) if certain else []
        if waiting > len(rows):
            return rows
        chances = self._chances(kind, lanes * cost.largest - len(rows), NEGLIGIBLE if rows else SURE)
        wanted = cost.rows(len(rows), [chance for chance, *_ in chances], lanes) if rows or chances else 0
        for _, _, search, draw in chances[: max(0, wanted - len(rows))]:
            if (row := search.take_ahead(draw)) is not None:
                rows.append(row)
        return rows

    def _take(self, kind: Batch, wanted: int) -> list[Row]:
        """That many rows, one of each search in turn, searches of the highest priority first."""
        queue, guided = self._queues[kind], kind[2]
        rows: list[Row] = []
        while queue and len(rows) < wanted:
            search = heappop(queue)[2]
            search.queued[guided] = False
            if search.waiting(guided):
                row = search.take(guided)
                if row is None:
                    self._blocked[search] = None
                    continue
                rows.append(row)
                if search.waiting(guided):
                    self._push(kind, search)
            self._may_run_ahead(search, guided)
        while queue and not queue[0][2].waiting(guided):
            heappop(queue)[2].queued[guided] = False
        return rows

    def _chances(self, kind: Batch, most: int, least: float) -> list[tuple[float, int, Client, int]]:
        """The rows that may run ahead, those most likely to be needed first: chance, minus place, search, draw."""
        found: list[tuple[float, int, Client, int]] = []
        geometry, company, guided = kind
        for search in list(islice(self._ahead, 2 * most)):
            if search.geometry != geometry or search.company != company:
                continue
            chances = list(search.chances(guided, least))
            found += [(chance, -len(found) - i, search, draw) for i, (chance, draw) in enumerate(chances)]
            if not chances and not search.may_run_ahead(not guided):
                del self._ahead[search]
        return nlargest(most, found)
