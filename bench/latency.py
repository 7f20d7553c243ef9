"""How long a request takes while others come and go: `python -m rollflow.bench latency`.

First the capacity is measured, in requests a second, of a closed loop that keeps so many in flight. Then requests come
as a Poisson process at shares of it, whatever became of those before (an open loop). Each latency counts from when the
request was to come. Every request brings a prompt that the engine has not encoded, up to 300 a load.

Percentiles are values of the sample, and missing where it is too small to have them; their intervals hold for
independent requests. Left out are the requests at both ends of each load, which meet an engine that fills or empties.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from rollflow.bench import figures, intervals, prompt_sets
from rollflow.bench.environment import environment
from rollflow.bench.loads import Clock, Passage, Wall, closed_loop, open_loop, poisson
from rollflow.bench.outputs import check_file, check_picture
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.job import Job
from rollflow.request import Request

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENDS = 0.1  # the share of a load's requests that is left out at its beginning, and at its end
PERCENTILES = (50, 95, 99)
LATENCIES: dict[str, Callable[[Passage], float]] = {
    "queued": lambda one: _after(one, one.admitted),
    "to_first_update": lambda one: _after(one, one.updated),
    "to_result": lambda one: _after(one, one.ended),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Latency:
    """Measures time to first update and to result under Poisson arrivals, beside the closed loop.

    Attributes:
        model: which model.
        nfe: budget of each request.
        method: search method.
        loads: arrivals a second, as shares of the capacity; at 1 or more they queue without end.
        requests: how many are measured of each load, beside those at its ends.
        concurrency: how many requests the closed loops keep in flight; the highest rate of them is the capacity.
        capacity: requests a second to take for the capacity, so that two versions meet the same arrivals.
        seconds: how long requests come at most, of each load: if not all come by then, fewer are measured.
        preview: judge by the light decoder.
        dtype: of the networks.
        device: by default CUDA where there is one.
        lanes: of the engine; by default as measured.
        seed: of the arrivals, and of the first request.
        json: a file for the rows.
        plot: a file for the plot.
    """

    model: str = "shapes"
    nfe: int = 100
    method: str = "rbf"
    loads: tuple[float, ...] = (0.3, 0.6, 0.9)
    requests: int = 200
    concurrency: tuple[int, ...] = (1, 16, 64)
    capacity: float | None = None
    seconds: float = 300.0
    preview: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    lanes: int | None = None
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None

    def __call__(self) -> None:
        """Runs the closed and the open loops, prints the table, writes the files."""
        self._check()
        check_file(self.json)  # find out now, not after the work
        check_picture(self.plot)
        engine = Engine.from_pretrained(
            self.model, self.device, DTYPES[self.dtype], preview=self.preview, lanes=self.lanes
        )
        self.report(self.measure(engine))

    def _check(self) -> None:
        if min(self.loads, default=0) <= 0 or min(self.concurrency, default=0) < 1 or self.requests < 1:
            raise RequestError("loads must be above 0, concurrency and requests at least 1, and at least one given")
        if self.seconds <= 0 or (self.capacity is not None and self.capacity <= 0):
            raise RequestError(f"seconds={self.seconds:g}, capacity={self.capacity}: they must be above 0")

    def measure(self, engine: Engine, reward: Any = "count", clock: Clock | None = None) -> list[Row]:
        """A row for each closed loop and each load."""
        clock = clock or Wall()
        prompts = [prompt for name in prompt_sets.SETS for prompt in prompt_sets.load(name)]
        requests = [
            Request(prompt, reward, self.method, self.nfe, seed=self.seed + i) for i, prompt in enumerate(prompts)
        ]

        def submit(i: int) -> Job:
            return engine.submit(requests[i % len(requests)])

        engine.warm_up()
        rows = []
        for concurrency in self.concurrency:
            engine.forget_prompts()
            count = self.requests + 2 * concurrency
            passages = closed_loop(submit, count, concurrency, self.seconds, clock)
            rows.append(self._row(passages, concurrency, contender="closed loop", concurrency=concurrency))
        capacity = self.capacity or max(row["requests_per_second"] for row in rows)
        each = math.ceil(self.requests * ENDS / (1 - 2 * ENDS))
        for number, load in enumerate(self.loads):
            engine.forget_prompts()
            arrivals = poisson(load * capacity, self.requests + 2 * each, [self.seed, number])
            coming = arrivals[arrivals <= self.seconds]
            ends = max(1, each * len(coming) // len(arrivals))
            passages = open_loop(submit, coming, clock)
            rows.append(self._row(passages, ends, contender="open loop", load=load, capacity=capacity))
        return rows

    def _row(self, passages: list[Passage], ends: int, contender: str, **known: Any) -> Row:
        """What a load's requests met, without those at its ends."""
        measured = passages[ends : len(passages) - ends]
        if not measured:
            raise RequestError(
                f"seconds={self.seconds:g}: only {len(passages)} requests came by then, too few to measure; raise it"
            )
        row: Row = {
            "contender": contender + (", preview" if self.preview else ""),
            **known,
            "model": self.model,
            "method": self.method,
            "nfe": self.nfe,
            "dtype": self.dtype,
            "measured": len(measured),
            "arrivals_per_second": _rate([one.due for one in passages], ends),
            "late_seconds": max(_after(one, one.submitted) for one in measured),
        }
        if "concurrency" in known:
            rate = _rate([_time(one.ended) for one in passages], ends)
            row |= {"requests_per_second": rate, "nfe_per_second": rate * self.nfe}
        for name, latency in LATENCIES.items():
            values = [latency(one) for one in measured]
            row[f"seconds_{name}_mean"] = statistics.fmean(values)
            for p in PERCENTILES:
                row[f"seconds_{name}_p{p}"] = intervals.quantile(values, p / 100)
                row[f"seconds_{name}_p{p}_95"] = intervals.quantile_interval(values, p / 100)
        return row

    def report(self, rows: list[Row]) -> None:
        """Prints the table, writes the files."""
        Console(width=None if sys.stdout.isatty() else 120).print(_table(rows, f"{self.method}, {self.nfe} NFE"))
        if self.json:
            report = {"environment": environment(), "rows": rows}
            self.json.write_text(json.dumps(report, indent=1) + "\n")
        if self.plot:
            figures.latency(rows, self.plot)


def _time(moment: float | None) -> float:
    """A moment of a request that is over."""
    assert moment is not None
    return moment


def _after(one: Passage, moment: float | None) -> float:
    """Seconds since the request was to come."""
    return _time(moment) - one.due


def _rate(moments: list[float], ends: int) -> float:
    """Events a second, from the last of the `ends` at the beginning to the last that is not among those at the end."""
    ordered = sorted(moments)
    first, last = ends - 1, len(ordered) - ends - 1
    return (last - first) / (ordered[last] - ordered[first])


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=f"{title}: milliseconds from when a request was to come")
    for column in ("load", "a second", "of", "queued p50"):
        table.add_column(column, justify="left" if column == "load" else "right", no_wrap=column == "load")
    for name in ("update", "result"):
        for p in PERCENTILES:
            table.add_column(f"{name} p{p}", justify="right")
    for row in rows:
        name = f"{row['concurrency']} in flight" if "concurrency" in row else f"{row['load']:g} of capacity"
        cells = [row["seconds_queued_p50"]]
        cells += [row[f"seconds_to_{what}_p{p}"] for what in ("first_update", "result") for p in PERCENTILES]
        shown = ("" if seconds is None else f"{1000 * seconds:.0f}" for seconds in cells)
        table.add_row(name, f"{row['arrivals_per_second']:.2f}", str(row["measured"]), *shown)
    return table
