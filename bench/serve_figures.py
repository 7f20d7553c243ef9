"""What serving costs, as tables and plots: NFE/s and latencies through HTTP, and fleets on paper."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from rollflow.bench.figures import pyplot

Row = dict[str, Any]
PERCENTILES = (50, 95, 99)


def tables(rows: list[Row]) -> list[Table]:
    """NFE/s and processor time at saturation, and latencies of the loads."""
    saturated = Table(title="At saturation, in turns")
    for column in ("workers", "contender", "NFE/s, turn by turn", "median", "ratio", "CPU ms/NFE", "CPU ratio"):
        saturated.add_column(column, justify="left" if column in ("contender", "NFE/s, turn by turn") else "right")
    for workers, name in dict.fromkeys((row["workers"], row["contender"]) for row in rows if "turn" in row):
        mine = [row for row in rows if (row["workers"], row["contender"]) == (workers, name)]
        values, spent = ([row[of] for row in mine] for of in ("nfe_per_second", "cpu_seconds_per_nfe"))
        found = [row for row in rows if "ratio" in row and row["workers"] == workers and name == "http"]
        ratios = [[f"{row[of]:.3f}" for row in found] or [""] for of in ("ratio", "cpu_ratio")]
        turns = ", ".join(f"{value:.0f}" for value in values)
        shown = f"{1000 * statistics.median(spent):.2f}" if None not in spent else ""
        saturated.add_row(
            str(workers or "?"), name, turns, f"{statistics.median(values):.0f}", *ratios[0], shown, *ratios[1]
        )
    table = Table(title="Poisson arrivals: milliseconds from when a request was to come")
    for column in ("workers", "load", "a second", "of", "refused", *(f"p{p}" for p in PERCENTILES), "good", "goodput"):
        table.add_column(column, justify="right")
    for row in (row for row in rows if "load" in row):
        seconds = (row[f"seconds_p{p}"] for p in PERCENTILES)
        table.add_row(
            str(row["workers"] or "?"), f"{row['load']:g}", f"{row['arrivals_per_second']:.2f}", str(row["measured"]),
            str(row["refused"]), *("" if s is None else f"{1000 * s:.0f}" for s in seconds), f"{row['good']:.1%}",
            f"{row['goodput_per_second']:.2f}",
        )  # fmt: skip
    return [saturated, table]


def serving(rows: list[Row], file: Path) -> None:
    """NFE/s of server and engine, turn by turn, and latencies against the load, by the number of workers."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.8))
    known = [*dict.fromkeys(row["workers"] for row in rows)]
    for number, name in enumerate(("engine", "http")):
        for place, workers in enumerate(known):
            mine = [row["nfe_per_second"] for row in rows if (row["contender"], row["workers"]) == (name, workers)]
            if mine:
                at = place + 0.4 * number - 0.2
                label = {"engine": "engine, no HTTP", "http": "through HTTP"}[name] if place == 0 else None
                left.bar(at, statistics.median(mine), 0.36, color=f"C{number}", alpha=0.6, label=label)
                left.plot([at] * len(mine), mine, "k.", ms=4)
    left.set_xticks(range(len(known)), [f"{workers or '?'} worker{'s' * (workers != 1)}" for workers in known])
    left.set(ylabel="NFE/s", title="at saturation, each turn a dot")
    left.set_ylim(top=1.2 * left.get_ylim()[1])  # room for the legend
    left.legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    most = max((row.get("load", 0.0) for row in rows), default=0.0)
    for place, workers in enumerate(known):
        loads = sorted((r for r in rows if "load" in r and r["workers"] == workers), key=lambda row: row["load"])
        for p, line in ((50, "o-"), (95, "s--"), (99, "^:")):
            mine = [row for row in loads if row[f"seconds_p{p}"] is not None]
            if mine:
                places, middle = ([row[name] for row in mine] for name in ("load", f"seconds_p{p}"))
                # An end that the sample is too small to know is open: drawn is what is known.
                pairs = zip(middle, (row[f"seconds_p{p}_95"] for row in mine), strict=True)
                ends = [[m if e is None else e for e in both] for m, both in pairs]
                error = np.abs(np.array(ends).reshape(-1, 2).T - middle)
                label = f"p{p}, {workers or '?'} worker{'s' * (workers != 1)}"
                apart = np.array(places) + 0.01 * most * place  # two workers' beside one's
                right.errorbar(apart, middle, error, fmt=line, ms=4, capsize=3, color=f"C{place}", label=label)
    right.set(title="Poisson arrivals", xlabel="arrivals, share of the capacity", ylabel="seconds")
    right.set(xlim=(0, max(1.0, 1.1 * most)), ylim=(0, None))
    right.grid(alpha=0.3)
    right.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot().close(figure)


def fleets(rows: list[Row], file: Path) -> None:
    """Latencies at the load and efficiency with all requests at once, against the number of simulated GPUs."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 3.8))
    for number, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        mine = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["gpus"])
        for p, line in ((50, "o-"), (95, "s--"), (99, "^:")):
            known = [row for row in mine if row.get(f"seconds_p{p}") is not None]
            at, seconds = ([row[name] for row in known] for name in ("gpus", f"seconds_p{p}"))
            left.plot(at, seconds, line, ms=3, color=f"C{number}", label=f"{policy}, p{p}")
        whole = [row for row in mine if "efficiency" in row]
        places, shares = ([row[name] for row in whole] for name in ("gpus", "efficiency"))
        right.plot(places, shares, "o-", ms=3, color=f"C{number}", label=policy)
    load = next((row["load"] for row in rows if row["load"] is not None), 0)
    left.set(title=f"simulated: arrivals by chance, load {load:g}", ylabel="seconds of a request", yscale="log")
    right.set(title="simulated: all requests at once", ylabel="share of the ideal NFE/s", ylim=(0, 1.05))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot().close(figure)
