"""Whether judging particles by the light decoder changes what searches find: `rollflow bench preview`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rollflow.bench import intervals, outputs, prompt_sets
from rollflow.bench.environment import environment
from rollflow.engine import Engine
from rollflow.request import Request, Result


@dataclass(frozen=True)
class Preview:
    """Compares searches judged by the full decoder with the same searches judged by the light one, paired by prompt.

    Attributes:
        model: which model.
        sets: sets of prompts.
        methods: search methods, with their defaults.
        prompts: how many of each set.
        nfe: budget of each prompt.
        seed: of the first prompt; each has its own.
        json: a file for the rows.
    """

    model: str = "shapes"
    sets: tuple[str, ...] = ("medium", "hard")
    methods: tuple[str, ...] = ("rbf", "sprout")
    prompts: int = 100
    nfe: int = 100
    seed: int = 0
    json: Path | None = None

    def __call__(self) -> None:
        """Runs both, prints the table, writes the file."""
        outputs.check_file(self.json)
        where, console = environment(), Console(width=110)
        engines = {name: Engine.from_pretrained(self.model, preview=name == "preview") for name in ("full", "preview")}
        rows: list[dict[str, Any]] = []
        for name in self.sets:
            chosen = prompt_sets.load(name, self.prompts)
            for method in self.methods:
                requests = [Request(p, nfe=self.nfe, method=method, seed=self.seed + i) for i, p in enumerate(chosen)]
                found = {kind: engine.generate(requests) for kind, engine in engines.items()}
                rows.append({"set": name, "method": method, "model": self.model, "nfe": self.nfe, **_row(found)})
        table = Table(title=f"share exactly right, {self.prompts} prompts, {self.nfe} NFE (by the held-out judge)")
        for column in ("set", "method", "full decoder", "preview", "difference, 95 %", "held-out difference, 95 %"):
            table.add_column(column)
        for row in rows:
            table.add_row(
                row["set"],
                row["method"],
                f"{row['full']:.2f} ({row['full_held_out']:.2f})",
                f"{row['preview']:.2f} ({row['preview_held_out']:.2f})",
                *(
                    f"{d:+.2f} [{low:+.2f}, {high:+.2f}]"
                    for d, low, high in (row["difference"], row["held_out_difference"])
                ),
            )
        console.print(table)
        if self.json:
            self.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")


def _row(found: dict[str, list[Result]]) -> dict[str, Any]:
    exact = {kind: np.array([float(r.reward == 0) for r in results]) for kind, results in found.items()}
    held = {kind: np.array([float(r.held_out == 0) for r in results]) for kind, results in found.items()}
    row: dict[str, Any] = {kind: float(values.mean()) for kind, values in exact.items()}
    row |= {f"{kind}_held_out": float(values.mean()) for kind, values in held.items()}
    for name, shares in (("difference", exact), ("held_out_difference", held)):
        difference = shares["preview"] - shares["full"]
        row[name] = [float(difference.mean()), *intervals.bootstrap(difference)]
    return row
