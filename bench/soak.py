"""A server among clients that come, stream, vanish, cancel and send garbage: `python -m rollflow.bench soak`.

Every search that the server accepted is accounted for in the end: it is done, or cancelled by its client; asked again,
it gives the same result and image. Memory, descriptors and threads of the server and its workers are sampled; a line
through them says whether they grow, once the first part of the time is left out. A lost search, one with two results,
an answer that no server should give, or growth fail the command.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollflow.bench.environment import environment
from rollflow.bench.http_loads import Unaccounted, connected
from rollflow.bench.outputs import check_file
from rollflow.bench.process_memory import Sample, sample, trend
from rollflow.bench.service import Service, served
from rollflow.bench.soak_books import Books
from rollflow.bench.soak_clients import Customer
from rollflow.errors import RequestError, RollflowError, line

WARM = 0.25  # the share of the time in which memory may grow, as caches fill
ALLOWED = {"rss_bytes": 0.02, "descriptors": 0.1, "threads": 0.1}  # growth over the rest, of the median
SHOWN = 20  # of each kind of fault, in the file
IDLE = ("rollflow_requests_running", "rollflow_requests_waiting")  # metrics that are 0 when nobody asks for anything
SETTLERS = 8  # searches that are asked for at a time in the end
SETTLES = 60.0  # seconds in which they must be


@dataclass(frozen=True)
class Soak:
    """Keeps a server busy with all kinds of clients, accounts for every search, and watches its memory.

    Attributes:
        url: of a server that runs, whose memory is not seen then; by default one is started, with a journal.
        model: of the server that is started.
        workers: of the server that is started.
        minutes: how long clients come.
        clients: how many at a time.
        every: seconds between two samples of memory.
        patience: seconds that an answer may take, and that searches may take after the last client came.
        seed: of what clients do.
        json: a file for what was seen.
    """

    url: str | None = None
    model: str = "shapes"
    workers: int = 1
    minutes: float = 30.0
    clients: int = 16
    every: float = 5.0
    patience: float = 300.0
    seed: int = 0
    json: Path | None = None

    def __call__(self) -> None:
        """Runs the clients, settles the accounts, prints the tables, writes the file.

        Raises:
            RequestError: an option that is out of its range, or a server that does not start.
            Unaccounted: a search that was lost, or that gave two results.
            RollflowError: an answer that should not be, or growth.
        """
        for name in ("minutes", "clients", "every", "patience", "workers"):
            if not getattr(self, name) > 0:
                raise RequestError(f"{name}={getattr(self, name):g}: it must be above 0")
        check_file(self.json)
        with tempfile.TemporaryDirectory(prefix="rollflow-soak-") as journal:
            own = ["--model", self.model, "--workers", str(self.workers), "--journal", journal]
            with served(self.url, own) as service:
                books, samples = asyncio.run(self._soak(service))
        report = self.report(books, samples)
        _print(report)
        if self.json:
            self.json.write_text(json.dumps(report, indent=1) + "\n")
        check(books, report)

    async def _soak(self, service: Service) -> tuple[Books, list[Sample]]:
        books, samples, clock = Books(), list[Sample](), asyncio.get_running_loop().time
        start = clock()
        async with connected(service.url, self.patience) as client:

            async def come(number: int) -> None:
                customer = Customer(client, books, random.Random(f"{self.seed} {number}"), self.patience)
                while clock() - start < 60 * self.minutes:
                    await customer.visit()

            async def watch() -> None:
                while True:
                    if service.pid is not None:
                        samples.append(sample(service.pid, clock() - start))
                    alive = await client.get("/health")
                    if alive.status_code != 200:
                        books.fault(f"/health: {alive.status_code}")
                    await asyncio.sleep(self.every)

            watching = asyncio.create_task(watch())
            await asyncio.gather(*(come(number) for number in range(self.clients)))
            watching.cancel()
            await asyncio.wait([watching])
            if not watching.cancelled() and (failed := watching.exception()) is not None:
                books.fault(f"/health: {failed}")
            await settle(client, books, self.patience)
        return books, samples

    def report(self, books: Books, samples: Sequence[Sample]) -> dict[str, Any]:
        """What was seen."""
        own = {name: value for name, value in asdict(self).items() if name not in ("url", "json")}
        late = [one for one in samples if one.seconds >= WARM * 60 * self.minutes]
        seconds = [one.seconds for one in late]
        trends = {name: trend(seconds, [getattr(one, name) for one in late], most) for name, most in ALLOWED.items()}
        outcomes: dict[str, dict[str, int]] = {}
        for (scenario, outcome), count in sorted(books.outcomes.items()):
            outcomes.setdefault(scenario, {})[outcome] = count
        kinds = {"lost": books.lost, "answered_twice_differently": books.differing, "faults": books.faults}
        return {
            "environment": environment(),
            **own,
            "sums": books.sums,
            "visits": sum(books.outcomes.values()),
            "outcomes": outcomes,
            "examples": {name: of[:SHOWN] for name, of in kinds.items()},
            "warm_up": WARM,
            "trends": trends,
            "samples": [one._asdict() for one in samples],
        }


async def settle(client: Any, books: Books, patience: float) -> None:
    """Asks for every accepted search once more; by then, each must be over, and what it was before."""
    import httpx

    last, at_once = Customer(client, books, random.Random(0), patience), asyncio.Semaphore(SETTLERS)
    clock = asyncio.get_running_loop().time
    until = clock() + patience

    async def ask(id: str) -> None:
        async with at_once:
            try:
                await last.until_over(id, until)
            except (httpx.HTTPError, OSError, TimeoutError, asyncio.TimeoutError, ValueError, KeyError) as error:
                scenario = books.accounts[id].scenario
                books.lose(f"{id} ({scenario}) in the end: {type(error).__name__}: {error}")

    await asyncio.gather(*(ask(id) for id in books.accounts))
    busy, until = ["?"], clock() + min(SETTLES, patience)
    while busy and clock() < until:
        try:
            busy = still_busy((await client.get("/metrics")).text)
        except httpx.HTTPError as error:
            busy = [f"/metrics: {error}"]
        await asyncio.sleep(0.5 if busy else 0)
    if busy:
        books.fault(f"nobody asks for anything, and yet: {', '.join(busy)}")


def still_busy(metrics: str) -> list[str]:
    """The lines of Prometheus' text that say that something runs or waits."""
    named = (text for text in metrics.splitlines() if text.partition("{")[0].partition(" ")[0] in IDLE)
    return [text for text in named if float(text.rpartition(" ")[2]) != 0]


def check(books: Books, report: dict[str, Any]) -> None:
    """Fails where something was wrong.

    Raises:
        Unaccounted: a search that was lost, or that gave two results.
        RollflowError: an answer that should not be, or growth.
    """
    wrong = [*books.lost, *books.differing]
    if wrong:
        raise Unaccounted(
            f"{len(books.lost)} lost, {len(books.differing)} answered twice with different results, such as: {wrong[0]}"
        )
    if books.faults:
        raise RollflowError(f"{len(books.faults)} answers that should not be, such as: {books.faults[0]}")
    growing = [name for name, found in report["trends"].items() if found is not None and not found["flat"]]
    if growing:
        told = [f"{name} by {report['trends'][name]['growth']:.1%}" for name in growing]
        raise RollflowError(f"growth over the soak: {', '.join(told)}")


def _print(report: dict[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{report['visits']} visits in {report['minutes']:g} minutes")
    for column in ("clients that", "ended"):
        table.add_column(column)
    for scenario, outcomes in report["outcomes"].items():
        table.add_row(scenario, ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    console.print(table)
    console.print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report["sums"].items()))
    for name, found in report["trends"].items():
        if found is None:
            console.print(f"{name}: too few samples for a trend")
        else:
            told = f"{found['median']:.4g}, {found['per_hour']:+.3g} an hour, {found['growth']:+.2%} in all"
            console.print(f"{name}: {told}: {'flat' if found['flat'] else 'it grows'}")
    for name, examples in report["examples"].items():
        for one in examples[:3]:
            console.print(line(f"{name}: {one}", 300), markup=False)
