"""Fleets on paper: `python -m rollflow.bench fleet` simulates 1 to 512 GPUs behind a dispatcher; no GPU is used.

A run of `shapes` here is recorded, with budgets that differ as much as users do, and replayed with the real scheduler
on simulated GPUs whose batches take what FLUX was measured to take on one (`bench/results/gpu`). What is compared is
how the dispatcher chooses an engine: by the least outstanding NFE, in turn, or by chance. Requests come by chance at a
share of what the fleet can do, or all at once. Between dispatcher and engines nothing takes time, and nothing fails.

Of policies that do not look at the engines, a part of the fleet has what all of it has: of more than `PART` engines,
the requests of the first ones are simulated.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rollflow.bench import fleet_flux, intervals, prompt_sets
from rollflow.bench.environment import environment
from rollflow.bench.outputs import check_file, check_picture
from rollflow.bench.serve_figures import fleets
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.profile.recording import Recording
from rollflow.request import Request
from rollflow.whatif.changes import Change, Predicted
from rollflow.whatif.dispatching import LEAST, POLICIES
from rollflow.whatif.replay import Replay

STATED = (
    "A simulation: no GPU ran for these numbers. Recorded requests were replayed with the real scheduler on simulated "
    "GPUs, whose batches take the seconds that FLUX was measured to take on one."
)
EXPECTED = (
    "By chance, latencies do not depend on the number of GPUs: each engine is a queue of its own. With the least "
    "outstanding NFE they fall with every doubling up to about 16 GPUs and are then those of an engine that is never "
    "behind: p95 at 512 GPUs at most half of what it is by chance. In turn lies in between. All at once, the least "
    "outstanding NFE keeps at least 0.7 of the ideal NFE/s at 512 GPUs, in turn about 0.5, by chance about 0.35, as "
    "the unluckiest engine decides."
)  # written before the first whole run; of trials with 16 and 128 GPUs all at once the makespans had been seen
BUDGETS = ((14, 19), (30, 19), (90, 7), (240, 2))  # NFE, and how many of the recorded requests have it: 47 in all
PART = 8  # engines that stand for all where the policy looks at none
LEAST_REQUESTS, EACH = 960, 16  # of a replay: in all at least, and for each engine
AT_ONCE = 8  # requests for each engine, where all come at once
ALONE = 64  # requests of which an engine's rate is taken
ENDS = 0.15  # the share of requests left out at the beginning, where the fleet fills; and at the end
PERCENTILES = (50, 95, 99)
Row = dict[str, Any]
Arrivals = list[tuple[float, Mapping[str, Any]]]


@dataclass(frozen=True)
class Fleet:
    """Simulates fleets of GPUs behind a dispatcher: NFE/s, latencies and efficiency by their number and the policy.

    Attributes:
        gpus: how many, one fleet after another.
        policies: how the dispatcher chooses an engine.
        load: arrivals, as a share of what the fleet can do.
        method: of the requests that are recorded.
        gpu: the folder of what was measured on a GPU.
        recording: a folder of `rollflow profile` to take the requests of; by default they run here, now.
        seed: of arrivals and choices.
        json: a file for the rows.
        plot: a file for the plot.
    """

    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    policies: tuple[str, ...] = tuple(POLICIES)
    load: float = 0.8
    method: str = "rbf"
    gpu: Path = Path(__file__).parent / "results" / "gpu"
    recording: Path | None = None
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None

    def __call__(self) -> None:
        """Records, simulates every fleet, prints the table, writes the files.

        Raises:
            RequestError: an option that is out of its range, or folders without what they should hold.
        """
        if min(self.gpus, default=0) < 1 or not 0 < self.load < 1:
            raise RequestError(f"gpus={self.gpus}, load={self.load:g}: at least 1 GPU, and a load between 0 and 1")
        check_file(self.json)
        check_picture(self.plot)
        rows, searches = (fleet_flux.rows_of(self.gpu / f"{name}.json") for name in ("buckets", "searches"))
        recording = self._recorded() if self.recording is None else Recording.load(self.recording)
        recorded = Replay(recording)
        check = fleet_flux.checked(recorded, rows, searches)
        found = self.measure(fleet_flux.on_gpu(recorded, rows))
        Console(width=None if sys.stdout.isatty() else 120).print(_table(found))
        if self.json:
            about = {"stated": STATED, "expected": EXPECTED, "measured_on": "NVIDIA H200, FLUX, 1024x1024, bfloat16"}
            report = {"environment": environment(), **about, "check": check, "rows": found}
            self.json.write_text(json.dumps(report, indent=1) + "\n")
        if self.plot:
            fleets(found, self.plot)

    def _recorded(self) -> Recording:
        """A run of `shapes` with budgets that differ."""
        budgets = [nfe for nfe, count in BUDGETS for _ in range(count)]
        random.Random(self.seed).shuffle(budgets)
        prompts = prompt_sets.load("medium")
        with Engine.from_pretrained("shapes") as engine:
            engine.warm_up()
            with engine.profile() as profile:
                asked = [Request(prompts[i], "count", self.method, nfe, seed=i) for i, nfe in enumerate(budgets)]
                engine.generate(asked)
            return profile.recording

    def measure(
        self, replay: Replay, requests: int = LEAST_REQUESTS, each: int = EACH, at_once: int = ALONE
    ) -> list[Row]:
        """Two rows for each fleet and policy: requests that come by chance, and all at once."""
        usual = [spec for _, spec in replay.arrivals(Change())]
        mean = statistics.fmean(int(spec["nfe"]) for spec in usual)
        alone = replay.run(Change(), self._arrivals(usual, at_once, None, 1)).nfe_per_second
        rows = []
        for gpus in self.gpus:
            for policy in self.policies:
                same = {"gpus": gpus, "policy": policy, "engine_nfe_per_second": alone}
                part = gpus if policy == LEAST else min(gpus, PART)
                rate, count = self.load * gpus * alone / mean, max(requests, each * part) * gpus // part
                coming = self._arrivals(usual, count, rate, gpus)
                coming = shared(coming, gpus, part, policy, self.seed)
                change = Change(gpus=part, dispatch=policy, seed=self.seed + 1)
                found = replay.run(change, coming)
                rows.append({**same, "load": self.load, "simulated_gpus": part, **came(found, coming, gpus / part)})
                found = replay.run(
                    Change(gpus=gpus, dispatch=policy, seed=self.seed),
                    self._arrivals(usual, AT_ONCE * gpus, None, gpus),
                )
                rows.append({**same, "load": None, "simulated_gpus": gpus, **together(found, gpus * alone)})
        return rows

    def _arrivals(self, specs: Sequence[Mapping[str, Any]], count: int, rate: float | None, gpus: int) -> Arrivals:
        """Requests drawn from those recorded: a Poisson process, or without a rate at once; alike for all policies."""
        dice, when, found = random.Random(f"{self.seed} {gpus} {rate is None}"), 0.0, Arrivals()
        for _ in range(count):
            when += 0.0 if rate is None else dice.expovariate(rate)
            found.append((when, dice.choice(specs)))
        return found


def shared(coming: Arrivals, gpus: int, part: int, policy: str, seed: int) -> Arrivals:
    """The requests of the first `part` of the engines: all, where that is all of them."""
    if part == gpus:
        return coming
    choose = POLICIES[policy](seed)
    return [one for number, one in enumerate(coming) if choose(number, [0] * gpus) < part]


def came(found: Predicted, coming: Arrivals, times: float) -> Row:
    """Latencies of requests that came by chance, without those at both ends; NFE/s of `times` as many engines."""
    ends = int(ENDS * len(coming))
    values = found.latencies[ends : len(coming) - ends]
    span = coming[len(coming) - ends - 1][0] - coming[ends][0]
    budgets = sum(int(spec["nfe"]) for _, spec in coming[ends + 1 : len(coming) - ends])
    return {
        "requests": len(values),
        "nfe_per_second": times * budgets / span,
        "seconds_mean": statistics.fmean(values),
        **{f"seconds_p{p}": intervals.quantile(values, p / 100) for p in PERCENTILES},
    }


def together(found: Predicted, ideal: float) -> Row:
    """NFE/s of requests that were all there from the start, and the share of what the engines can do."""
    return {
        "requests": len(found.latencies),
        "nfe_per_second": found.nfe_per_second,
        "efficiency": found.nfe_per_second / ideal,
    }


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="Simulated GPUs: seconds by chance at the load, efficiency with all at once")
    columns = ("GPUs", "dispatched", "NFE/s", *(f"p{p}" for p in PERCENTILES), "NFE/s at once", "efficiency")
    for column in columns:
        table.add_column(column, justify="left" if column == "dispatched" else "right")
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        seconds = ["" if (s := one[f"seconds_p{p}"]) is None else f"{s:.1f}" for p in PERCENTILES]
        table.add_row(
            str(one["gpus"]), one["policy"], f"{one['nfe_per_second']:.0f}", *seconds,
            f"{other['nfe_per_second']:.0f}", f"{other['efficiency']:.2f}",
        )  # fmt: skip
    return table
