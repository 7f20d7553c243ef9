"""What HTTP costs, and how long requests take through it: `python -m rollflow.bench serve`.

At saturation the same searches run in turns, by a server and by an engine in this process, each in a closed loop: the
ratio of their NFE/s is what is left by HTTP. Then requests come as a Poisson process at shares of what the server can
do (an open loop); latencies count from when a request was to come. Goodput is what is served within a limit. What a
load's first and last requests meet is left out. Client and server share the machine, so that the client's work counts
against the server. A request of which nobody knows what became fails the command.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rollflow.bench import intervals, prompt_sets
from rollflow.bench.environment import environment
from rollflow.bench.http_loads import Sent, check_accounts, closed_loop, connected, open_loop, rate, sender
from rollflow.bench.loads import Wall, poisson
from rollflow.bench.loads import closed_loop as engine_loop
from rollflow.bench.outputs import check_file, check_picture
from rollflow.bench.process_memory import processor_seconds
from rollflow.bench.serve_figures import PERCENTILES, serving, tables
from rollflow.bench.service import Service, served
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.request import Request

EXPECTED = (
    "One worker: at least 0.95 of the engine's NFE/s at saturation, as a request of 100 evaluations costs the server a "
    "few milliseconds of a quarter of a second. Two workers on two cores: less than one engine, because each of them "
    "packs half of the requests into smaller batches."
)  # written before the first run
TARGET = 0.95  # of the engine's NFE/s, with one worker
ENDS = 0.1  # the share of a load's requests that is left out at its beginning, and at its end
WARM = 100  # requests, with every prompt once, before anything is measured
WARM_NFE = 20
Row = dict[str, Any]


class Turn(NamedTuple):
    """One contender at saturation, once.

    Attributes:
        requests_per_second: between the ends.
        cpu: seconds of a core for each evaluation, of engine or server; not a number of a server that others started.
        client_cpu: of the client besides.
    """

    requests_per_second: float
    cpu: float
    client_cpu: float


@dataclass(frozen=True)
class Serve:
    """Measures a server through HTTP against an engine without it, and its latencies under Poisson arrivals.

    Attributes:
        url: of a server that runs; by default one is started, and compared with an engine.
        model: of the server that is started.
        method: of every search.
        nfe: budget of every search.
        reward: by its name.
        workers: of the servers that are started, one after another.
        concurrency: requests in flight at saturation.
        rounds: turns of server and engine at saturation; the median of their ratios counts.
        loads: arrivals a second, as shares of what the server does at saturation.
        requests: how many are measured of each turn and of each load, beside those at the ends.
        seconds: how long requests come at most, of each turn and load.
        limit: seconds within which an answer is good.
        patience: seconds after which the client gives a request up, which then counts as lost.
        seed: of the arrivals, and of the first request.
        json: a file for the rows.
        plot: a file for the plot.
    """

    url: str | None = None
    model: str = "shapes"
    method: str = "rbf"
    nfe: int = 100
    reward: str = "count"
    workers: tuple[int, ...] = (1, 2)
    concurrency: int = 64
    rounds: int = 3
    loads: tuple[float, ...] = (0.3, 0.6, 0.9)
    requests: int = 200
    seconds: float = 300.0
    limit: float = 2.0
    patience: float = 300.0
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None

    def __call__(self) -> None:
        """Runs all turns and loads, prints the table, writes the files.

        Raises:
            RequestError: an option that is out of its range, or a server that does not start.
            Unaccounted: a request of which nobody knows what became.
        """
        self._check()
        check_file(self.json)  # find out now, not after the work
        check_picture(self.plot)
        self.report(self.measure())

    def _check(self) -> None:
        least = {"workers": min(self.workers, default=0), "concurrency": self.concurrency, "rounds": self.rounds}
        least |= {"requests": self.requests, "nfe": self.nfe}
        if wrong := [f"{name}={value}" for name, value in least.items() if value < 1]:
            raise RequestError(f"{', '.join(wrong)}: they must be at least 1")
        times = {"seconds": self.seconds, "limit": self.limit, "patience": self.patience}
        times |= {"loads": min(self.loads, default=1.0)}
        if wrong := [f"{name}={value:g}" for name, value in times.items() if not value > 0]:
            raise RequestError(f"{', '.join(wrong)}: they must be above 0")
        if self.nfe < WARM_NFE:
            raise RequestError(f"nfe={self.nfe}: it must be at least {WARM_NFE}, which a search of the warm-up spends")

    def measure(self) -> list[Row]:
        """A row for each turn at saturation, each comparison and each load."""
        if self.url is not None:
            return self._served(None, None)
        rows = []
        with Engine.from_pretrained(self.model) as engine:
            engine.warm_up()
            for i in range(0, WARM, self.concurrency):
                engine.generate([self._request(j, WARM_NFE) for j in range(i, min(WARM, i + self.concurrency))])
            for workers in self.workers:
                rows += self._served(engine, workers)
        return rows

    def _served(self, engine: Engine | None, workers: int | None) -> list[Row]:
        """Everything with one server."""
        own = ["--model", self.model, "--workers", str(workers), "--max-queued", str(max(1000, 4 * self.concurrency))]
        if engine is not None and workers == 1:  # measured twice, these may differ, which is not HTTP's doing
            (sizes,) = engine.stats().buckets.values()
            own += ["--lanes", str(engine.lanes.count), "--buckets", *map(str, sizes)]
        rows, turns = list[Row](), list[dict[str, Turn]]()
        with served(self.url, own) as service:
            asyncio.run(self._through(service.url, WARM, WARM_NFE))
            for turn in range(self.rounds):
                done: dict[str, Turn] = {}
                for name in ("http", "engine")[:: 1 if turn % 2 else -1]:  # who is first changes
                    if name == "http":
                        done[name] = self._loaded(service, turn)
                    elif engine is not None:
                        done[name] = self._alone(engine, turn)
                rows += [self._turn(name, workers, turn, one) for name, one in done.items()]
                turns.append(done)
            if engine is not None:
                rows.append(self._row("http over engine", workers, **compared(turns)))
            capacity = statistics.median(done["http"].requests_per_second for done in turns)
            for number, load in enumerate(self.loads):
                rows.append(self._open(service.url, workers, number, load, capacity))
        return rows

    def _loaded(self, service: Service, turn: int) -> Turn:
        """A server at saturation."""
        count = self.requests + 2 * self.concurrency
        before, own = _spent(service.pid), time.process_time()
        found = asyncio.run(self._through(service.url, count, self.nfe, turn * count))
        check_accounts(found, f"saturation, turn {turn + 1}")
        ended = [one.ended for one in found if one.answer.fate == "served"]
        client, server = time.process_time() - own, _spent(service.pid) - before
        return Turn(self._saturated(ended), server / (self.nfe * len(ended)), client / (self.nfe * len(ended)))

    def _alone(self, engine: Engine, turn: int) -> Turn:
        """The engine without HTTP."""
        count, own = self.requests + 2 * self.concurrency, time.process_time()
        asked = [self._request(turn * count + i, self.nfe) for i in range(count)]
        passages = engine_loop(lambda i: engine.submit(asked[i]), count, self.concurrency, self.seconds, Wall())
        ended = [one.ended for one in passages if one.ended is not None]
        return Turn(self._saturated(ended), (time.process_time() - own) / (self.nfe * len(ended)), 0.0)

    def _turn(self, name: str, workers: int | None, turn: int, one: Turn) -> Row:
        rate = {"requests_per_second": one.requests_per_second, "nfe_per_second": one.requests_per_second * self.nfe}
        spent = {
            "cpu_seconds_per_nfe": None if math.isnan(one.cpu) else one.cpu,
            "client_cpu_seconds_per_nfe": one.client_cpu,
        }
        return self._row(name, workers, turn=turn, concurrency=self.concurrency, **rate, **spent)

    def _saturated(self, ended: list[float]) -> float:
        """Requests a second in between the ends."""
        return rate(ended, min(self.concurrency, len(ended) // 3))

    async def _through(self, url: str, count: int, nfe: int, first: int = 0) -> list[Sent]:
        """A closed loop."""
        async with connected(url, self.patience) as client:
            send = sender(client, [self._body(first + i, nfe) for i in range(count)])
            return await closed_loop(send, count, self.concurrency, self.seconds)

    def _open(self, url: str, workers: int | None, number: int, load: float, capacity: float) -> Row:
        """What the requests of an open loop met, without those at its ends."""
        each = math.ceil(self.requests * ENDS / (1 - 2 * ENDS))
        arrivals = poisson(load * capacity, self.requests + 2 * each, [self.seed, number])
        coming = arrivals[arrivals <= self.seconds]

        async def come() -> list[Sent]:
            async with connected(url, self.patience) as client:
                return await open_loop(sender(client, [self._body(i, self.nfe) for i in range(len(coming))]), coming)

        found = asyncio.run(come())
        check_accounts(found, f"load {load:g}")
        row = self._row("http, open loop", workers, load=load, capacity=capacity)
        return row | latencies(found, max(1, each * len(coming) // len(arrivals)), self.limit)

    def _request(self, i: int, nfe: int) -> Request:
        prompts = prompt_sets.load("medium")
        return Request(prompts[i % len(prompts)], self.reward, self.method, nfe, seed=self.seed + i)

    def _body(self, i: int, nfe: int) -> dict[str, Any]:
        """The same search as a request to the server."""
        asked = self._request(i, nfe)
        own = {name: getattr(asked, name) for name in ("prompt", "reward", "method", "nfe", "seed")}
        return {**own, "response_format": "b64_json"}

    def _row(self, contender: str, workers: int | None, **known: Any) -> Row:
        same = {"model": self.model, "method": self.method, "reward": self.reward, "nfe": self.nfe}
        return {"contender": contender, "workers": workers, **same, **known}

    def report(self, rows: list[Row]) -> None:
        """Prints the tables, writes the files."""
        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in tables(rows):
            console.print(table)
        if self.json:
            report = {"environment": environment(), "expected": EXPECTED, "rows": rows}
            self.json.write_text(json.dumps(report, indent=1) + "\n")
        if self.plot:
            serving(rows, self.plot)


def compared(turns: Sequence[Mapping[str, Turn]]) -> Row:
    """What is left of the engine's NFE/s, and of its NFE a second of a core: what else runs on the machine slows both
    in a turn of its own, but makes neither compute more.
    """
    ratios = [one["http"].requests_per_second / one["engine"].requests_per_second for one in turns]
    of_cpu = statistics.median(one["engine"].cpu for one in turns) / statistics.median(one["http"].cpu for one in turns)
    ratio = statistics.median(ratios)
    return {"ratio": ratio, "ratios": ratios, "target": TARGET, "met": ratio >= TARGET, "cpu_ratio": of_cpu}


def _spent(pid: int | None) -> float:
    return math.nan if pid is None else processor_seconds(pid)


def latencies(requests: list[Sent], ends: int, limit: float) -> Row:
    """Percentiles of the latencies and the goodput of an open loop, without `ends` requests at both ends.

    Raises:
        RequestError: too few requests came.
    """
    measured = requests[ends : len(requests) - ends]
    if len(measured) < 2:
        raise RequestError(f"{len(requests)} requests came, too few to measure: raise requests or seconds")
    values = [one.latency for one in measured if one.answer.fate == "served"]
    good, span = sum(value <= limit for value in values), measured[-1].due - requests[ends - 1].due
    row: Row = {
        "measured": len(measured),
        "served": len(values),
        "refused": len(measured) - len(values),
        "arrivals_per_second": len(measured) / span,
        "late_seconds": max(one.sent - one.due for one in measured),
        "limit_seconds": limit,
        "good": good / len(measured),
        "goodput_per_second": good / span,
        "seconds_mean": statistics.fmean(values) if values else None,
    }
    for p in PERCENTILES:
        row[f"seconds_p{p}"] = intervals.quantile(values, p / 100)
        row[f"seconds_p{p}_95"] = intervals.quantile_interval(values, p / 100) if values else (None, None)
    return row
