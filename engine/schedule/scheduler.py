"""Packs the rows of all live searches into batches, several of which are on their way at a time.

While one batch is decoded, judged and decided on, the other searches' rows are in the transformer: searches fall into
cohorts that alternate. Rows of one batch belong to different prompts at different times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, nlargest
from itertools import count, islice
from queue import Empty, SimpleQueue
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from rollflow.models import Geometry
from rollflow.schedule.cost import NEGLIGIBLE, SURE, CostModel
from rollflow.search.search import Row, Search

Kind = tuple[Geometry, bool]  # rows of one batch share an image size, and either all are guided or none is


@dataclass(frozen=True)
class Report:
    """What a runner says of its work: that a lane is free (no work), or what came of a part of what it was given.

    Attributes:
        work: rows, or searches that are over and whose images are made; a batch may come back in parts.
        results: of rows their rewards, None for a row that is not scored; of searches an `Outcome` each.
        error: what went wrong instead.
    """

    work: list[Row] | list[Search]
    results: Sequence[Any] | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Outcome:
    """The image of a search that is over: float32 and 8-bit pixels [3, height, width] on the CPU, and its scores."""

    pixels: Tensor
    rounded: Tensor
    reward: float
    held_out: float | None


@runtime_checkable
class Runner(Protocol):
    """What the scheduler needs of a runner.

    Attributes:
        lanes: how many batches may be on the device at a time.
        parallel: whether lanes compute side by side (threads of a CPU) or one after another (one GPU, where a second
            batch only keeps the device busy while the first is decided on).
    """

    lanes: int
    parallel: bool

    def cost(self, geometry: Geometry, guided: bool) -> CostModel:
        """What batches of this kind cost; its buckets are the batch sizes."""
        ...

    def submit(self, rows: list[Row], report: Callable[[Report], None]) -> None:
        """Starts a batch of one kind and returns; reports, from any thread, a free lane once, and every row once."""
        ...

    def submit_images(self, searches: list[Search], report: Callable[[Report], None]) -> None:
        """Starts making the images of searches of one geometry; reports a free lane once, and every search once."""
        ...


class Scheduler:
    """Runs live searches in shared batches: by priority, round robin between requests of the same priority.

    Its work a batch does not depend on how many searches are live: what can run waits in a queue.
    """

    def __init__(self, runner: Runner):
        self.runner = runner
        self.live: dict[Search, None] = {}
        self._queues: dict[Kind, list[tuple[int, int, Search]]] = {}
        self._order: deque[Kind] = deque()  # kinds take turns
        self._ahead: dict[Search, None] = {}  # those whose answers others of their rows could run ahead of
        self._tickets = count()
        self._reports: SimpleQueue[Report] = SimpleQueue()
        self._lanes = 0  # taken
        self._flying: dict[Kind, int] = {}  # rows whose rewards are not here yet
        self._away = 0  # rows and searches with a runner
        self.news = False  # whether the last tick brought rewards
        self._done: list[Search] = []  # searches whose images are to be made

    def add(self, search: Search) -> None:
        """Makes a search live."""
        self.live[search] = None
        self._enqueue(search)

    def tick(self) -> list[tuple[Search, Outcome]]:
        """Fills the free lanes, waits until something comes back, and returns the searches that are over."""
        self.news = False
        self._launch()
        if not self._away:
            raise RuntimeError(f"{len(self.live)} live requests wait for nothing: this is a fault of rollflow")
        over: list[tuple[Search, Outcome]] = []
        report: Report | None = self._reports.get()
        while report is not None:
            over += self._take_back(report)
            try:
                report = self._reports.get_nowait()
            except Empty:
                report = None
        for search, _ in over:
            del self.live[search]
        return over

    def drain(self) -> None:
        """Waits for all that is on its way and drops what it gives: after an error or an interruption."""
        while self._away > 0:
            report = self._reports.get()
            self._land(report)
            for work in report.work:
                if isinstance(work, Row):
                    work.search.in_flight -= 1
            report.work.clear()

    def _take_back(self, report: Report) -> list[tuple[Search, Outcome]]:
        if not report.work:
            self._lanes -= 1
            return []
        self._land(report)
        if report.error is not None:
            for work in report.work:
                if isinstance(work, Row):  # whoever keeps the exception must not keep these particles' slots with it
                    work.search.in_flight -= 1
                    del work.particle.slot
            report.work.clear()
            raise report.error
        assert report.results is not None
        over: list[tuple[Search, Outcome]] = []
        touched: dict[Search, None] = {}
        for i, result in enumerate(report.results):
            done = report.work[i]
            if isinstance(done, Search):
                over.append((done, result))
            else:
                done.search.deliver(done, result)
                self.news = True
                touched[done.search] = None
        report.work.clear()  # the thread that ran it may still hold the list, and with it slots
        for search in touched:
            self._enqueue(search)
            if search.done:
                self._done.append(search)
        return over

    def _land(self, report: Report) -> None:
        """Gives back what rows hold while they are on their way, but for their slots."""
        self._away -= len(report.work)
        for work in report.work:
            if isinstance(work, Row):
                self._flying[_kind(work)] -= 1

    def _enqueue(self, search: Search) -> None:
        """Puts a search that has rows to run into the queue of their kind, once."""
        for guided in (False, True):
            if search.waiting(guided) and not search.queued[guided]:
                kind = (search.geometry, guided)
                if kind not in self._queues:
                    self._queues[kind], self._flying[kind] = [], 0
                    self._order.append(kind)
                search.queued[guided] = True
                heappush(self._queues[kind], (-search.plan.request.priority, next(self._tickets), search))
            self._may_run_ahead(search, guided)

    def _may_run_ahead(self, search: Search, guided: bool) -> None:
        if next(search.chances(guided), None):
            self._ahead[search] = None

    def _launch(self) -> None:
        """Starts images and batches while lanes are free and there are rows worth running."""
        while self._lanes < self.runner.lanes:
            free = self.runner.lanes - self._lanes if self.runner.parallel else 1
            if self._done:
                self._start(self._take_done(free), self.runner.submit_images)
                continue
            rows = self._choose(free)
            if not rows:
                return
            self._flying[_kind(rows[0])] += len(rows)
            lanes = min(free, len(rows))
            for lane in range(lanes):
                batch = rows[lane::lanes]
                self._account(batch)
                self._start(batch, self.runner.submit)

    def _start(self, work: list, submit: Callable[[Any, Callable[[Report], None]], None]) -> None:
        self._lanes += 1
        self._away += len(work)
        try:
            submit(work, self._reports.put)
        except BaseException:
            self._lanes -= 1
            self._away -= len(work)
            raise

    def _take_done(self, lanes: int) -> list[Search]:
        """Searches of one geometry whose images are to be made: a share for each free lane, at most a batch's."""
        geometry = self._done[0].geometry
        alike = [search for search in self._done if search.geometry == geometry]
        most = max(1, self.runner.cost(geometry, False).largest // max(len(search.finalists) for search in alike))
        taken = alike[: min(most, -(-len(alike) // lanes))]
        self._done = [search for search in self._done if search not in taken]
        return taken

    def _choose(self, lanes: int) -> list[Row]:
        """The rows to run now on `lanes` free lanes: of the kind with the highest priority, and of equals in turn."""
        for kind in sorted(self._order, key=lambda kind: self._queues[kind][0][0] if self._queues[kind] else 0):
            if rows := self._choose_of(kind, lanes):
                self._order.remove(kind)
                self._order.append(kind)
                return rows
        return []

    def _choose_of(self, kind: Kind, lanes: int) -> list[Row]:
        """Rows that are needed, in turns, and where that pays, rows that run ahead of the answer."""
        queue, cost = self._queues[kind], self.runner.cost(*kind)
        most, waiting = self.runner.lanes * cost.largest, 0
        for _, _, search in queue:
            waiting += search.waiting(kind[1])
            if waiting >= most:
                break
        certain = waiting
        if lanes < self.runner.lanes:  # leave the other lanes their share, or cohorts of unequal size would stay so
            certain = min(certain, -(-(certain + self._flying[kind]) // self.runner.lanes))
        rows = self._take(kind, cost.rows(certain, [], lanes)) if certain else []
        if waiting > len(rows):
            return rows
        chances = self._chances(kind, lanes * cost.largest - len(rows), NEGLIGIBLE if rows else SURE)
        wanted = cost.rows(len(rows), [chance for chance, *_ in chances], lanes) if rows or chances else 0
        for _, _, search, draw in chances[: max(0, wanted - len(rows))]:
            if (row := search.take_ahead(draw)) is not None:
                rows.append(row)
        return rows

    def _take(self, kind: Kind, wanted: int) -> list[Row]:
        """That many rows, one of each search in turn, searches of the highest priority first."""
        queue, guided = self._queues[kind], kind[1]
        rows: list[Row] = []
        while queue and len(rows) < wanted:
            priority, _, search = heappop(queue)
            if search.waiting(guided):
                rows.append(search.take(guided))
            search.queued[guided] = bool(search.waiting(guided))
            if search.queued[guided]:
                heappush(queue, (priority, next(self._tickets), search))
            self._may_run_ahead(search, guided)
        while queue and not queue[0][2].waiting(guided):
            heappop(queue)[2].queued[guided] = False
        return rows

    def _chances(self, kind: Kind, most: int, least: float) -> list[tuple[float, int, Search, int]]:
        """The rows that may run ahead, those most likely to be needed first: chance, minus place, search, draw."""
        found: list[tuple[float, int, Search, int]] = []
        geometry, guided = kind
        for search in list(islice(self._ahead, 2 * most)):
            if search.geometry != geometry:
                continue
            chances = [(chance, draw) for chance, draw in search.chances(guided) if chance >= least]
            found += [(chance, -len(found) - i, search, draw) for i, (chance, draw) in enumerate(chances)]
            if not chances and not next(search.chances(not guided), None):
                del self._ahead[search]
        return nlargest(most, found)

    def _account(self, rows: list[Row]) -> None:
        """Counts executed rows; the bucket's padding is shared out in turns."""
        for i in range(self.runner.cost(*_kind(rows[0])).bucket(len(rows))):
            row = rows[i % len(rows)]
            row.search.executed += rows[0].nfe


def _kind(row: Row) -> Kind:
    return row.search.geometry, row.kind == "guided"
