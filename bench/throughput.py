"""What packing brings: `python -m rollflow.bench throughput`.

The same requests through the same engine, together and one after another, in turns, several times; the figure is the
ratio of the medians of wall time an NFE.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rollflow.bench import prompt_sets
from rollflow.bench.environment import environment
from rollflow.engine import Engine
from rollflow.request import Request, Result


@dataclass(frozen=True)
class Throughput:
    """Compares packed requests with the same requests one after another.

    Attributes:
        model: which model.
        prompts: how many requests.
        nfe: budget of each.
        method: search method of each.
        repetitions: how often each contender runs; the median counts.
        json: a file for the numbers.
    """

    model: str = "shapes"
    prompts: int = 16
    nfe: int = 100
    method: str = "rbf"
    repetitions: int = 3
    json: Path | None = None

    def __call__(self) -> None:
        """Runs both contenders in turns, prints the table, writes the file."""
        where, prompts = environment(), prompt_sets.load("medium", self.prompts)
        if self.json:
            self.json.touch()  # find out now, not after the work
        engine, console = Engine.from_pretrained(self.model), Console()
        requests = [Request(p, nfe=self.nfe, method=self.method, seed=i) for i, p in enumerate(prompts)]
        contenders: dict[str, Callable[[], list[Result]]] = {
            "packed": lambda: engine.generate(requests),
            "one by one": lambda: [engine.generate(request) for request in requests],
        }
        for run in contenders.values():
            run()  # warm-up
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        spans: dict[str, dict[str, float]] = {}
        results: dict[str, list[Result]] = {}
        for _ in range(self.repetitions):
            for name, run in contenders.items():
                engine.ledger.clear()
                start = time.perf_counter()
                results[name] = run()
                seconds[name].append(time.perf_counter() - start)
                spans[name] = dict(engine.ledger.seconds)
        rows = [self._row(name, results[name], seconds[name], spans[name]) for name in contenders]
        ratio = rows[0]["milliseconds_per_nfe"] / rows[1]["milliseconds_per_nfe"]
        console.print(_table(rows))
        console.print(f"packed costs {ratio:.3f} of the wall time an NFE of one by one")
        if self.json:
            report = {"environment": where, "rows": rows, "packed_over_one_by_one": ratio}
            self.json.write_text(json.dumps(report, indent=1) + "\n")

    def _row(self, name: str, results: list[Result], seconds: list[float], spans: dict[str, float]) -> dict:
        committed, executed = sum(r.committed_nfe for r in results), sum(r.executed_nfe for r in results)
        median = statistics.median(seconds)
        return {
            "contender": name,
            "prompts": self.prompts,
            "method": self.method,
            "committed_nfe": committed,
            "executed_over_committed": executed / committed,
            "seconds": seconds,
            "nfe_per_second": committed / median,
            "images_per_second": self.prompts / median,
            "milliseconds_per_nfe": 1000 * median / committed,
            "span_seconds_of_last": {**spans, "other": seconds[-1] - sum(spans.values())},
        }


def _table(rows: list[dict]) -> Table:
    table = Table(title="wall time of the same requests")
    for column in ("contender", "NFE/s", "images/s", "ms/NFE", "executed/committed", "where the time went"):
        table.add_column(column, justify="right" if column[0] in "Nime" else "left")
    for row in rows:
        total = sum(row["span_seconds_of_last"].values())
        spans = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in row["span_seconds_of_last"].items())
        table.add_row(
            row["contender"],
            f"{row['nfe_per_second']:.0f}",
            f"{row['images_per_second']:.2f}",
            f"{row['milliseconds_per_nfe']:.2f}",
            f"{row['executed_over_committed']:.2f}",
            spans,
        )
    return table
