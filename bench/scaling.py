"""What an evaluation costs as requests grow in number: `python -m rollflow.bench scaling`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rollflow.bench import outputs, prompt_sets
from rollflow.bench.environment import environment
from rollflow.bench.measure import in_turns
from rollflow.engine import Engine
from rollflow.request import Request, Result


@dataclass(frozen=True)
class Scaling:
    """Wall time an evaluation and peak memory, from one prompt to hundreds at a time.

    Attributes:
        model: which model.
        prompts: how many prompts at a time.
        nfe: budget of each prompt.
        method: search method.
        preview: judge by the light decoder.
        device: by default CUDA where there is one.
        repetitions: how often each number runs, in turns; the median counts.
        json: a file for the rows.
    """

    model: str = "shapes"
    prompts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    nfe: int = 50
    method: str = "rbf"
    preview: bool = False
    device: str | None = None
    repetitions: int = 3
    json: Path | None = None

    def __call__(self) -> None:
        """Runs all numbers of prompts in turns, prints the table, writes the file."""
        outputs.check_file(self.json)
        where, console = environment(), Console()
        engine = Engine.from_pretrained(self.model, self.device, preview=self.preview)
        engine.warm_up()
        medium = prompt_sets.load("medium", 100)
        runs: dict[str, Callable[[], list[Result]]] = {}
        for count in self.prompts:
            requests = [
                Request(medium[i % len(medium)], nfe=self.nfe, method=self.method, seed=i) for i in range(count)
            ]
            runs[str(count)] = partial(_run, engine, requests)
        seconds, results, memory = in_turns(runs, self.repetitions)
        rows: list[dict[str, Any]] = []
        for name, times in seconds.items():
            committed = sum(result.committed_nfe for result in results[name])
            rows.append(
                {
                    "contender": "engine, preview" if self.preview else "engine",
                    "model": self.model,
                    "method": self.method,
                    "nfe": self.nfe,
                    "prompts": int(name),
                    "seconds": times,
                    "nfe_per_second": committed / statistics.median(times),
                    "milliseconds_per_nfe": 1000 * statistics.median(times) / committed,
                    "executed_over_committed": sum(r.executed_nfe for r in results[name]) / committed,
                    "peak_memory_bytes": memory[name],
                }
            )
        table = Table(title=f"{self.method}, {self.nfe} NFE a prompt, {torch.get_num_threads()} threads")
        for column in ("prompts", "NFE/s", "ms/NFE", "run/committed", "peak MiB"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                str(row["prompts"]),
                f"{row['nfe_per_second']:.0f}",
                f"{row['milliseconds_per_nfe']:.2f}",
                f"{row['executed_over_committed']:.2f}",
                f"{row['peak_memory_bytes'] / 2**20:.0f}",
            )
        console.print(table)
        if self.json:
            self.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")


def _run(engine: Engine, requests: list[Request]) -> list[Result]:
    return engine.generate(requests)
