"""What the built-in video model can do, with and without guidance and searches: `rollflow bench video`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rollflow.bench import intervals, outputs
from rollflow.bench.environment import environment
from rollflow.engine import Engine
from rollflow.models import moving
from rollflow.request import Request

ODE = {"method": "bon", "interpolant": "linear", "diffusion": 0.0, "grid": "model"}
SDE = {"method": "rbf", "interpolant": "linear", "diffusion": 3.0, "grid": "model"}


@dataclass(frozen=True)
class Video:
    """Mean reward, and the share of clips that are exactly right, of plain samples and of searches.

    Attributes:
        prompts: how many random prompts of the moving world.
        steps: evaluations of a plain sample.
        samples: how many plain samples a search may cost.
        guidance: scale of classifier-free guidance, of the searches too.
        seed: of the first prompt; each has its own.
        json: a file for the rows.
    """

    prompts: int = 100
    steps: int = 10
    samples: int = 8
    guidance: float = 3.0
    seed: int = 0
    json: Path | None = None

    def __call__(self) -> None:
        """Runs all, prints the table, writes the file."""
        outputs.check_file(self.json)
        where, rng = environment(), np.random.default_rng(self.seed + 1_000_003)
        prompts = [moving.random_prompt(rng) for _ in range(self.prompts)]
        plain, search = self.steps, self.steps * self.samples
        contenders: tuple[tuple[str, dict[str, Any]], ...] = (
            ("one sample", {**ODE, "steps": plain, "nfe": plain, "guidance": 1.0}),
            ("one sample", {**ODE, "steps": plain, "nfe": plain, "guidance": self.guidance}),
            (f"best of {self.samples}", {**ODE, "steps": plain, "nfe": search, "guidance": self.guidance}),
            ("rbf", {**SDE, "steps": plain, "nfe": search, "guidance": self.guidance}),
        )
        rows = []
        with Engine.from_pretrained("shapes-video") as engine:
            for label, fields in contenders:
                requests = [
                    Request(prompt, reward="motion", seed=self.seed + i, **fields) for i, prompt in enumerate(prompts)
                ]
                results = engine.generate(requests)
                scores = np.array([result.reward for result in results])
                row = {"label": label, "guidance": fields["guidance"], "nfe": fields["nfe"]}
                row["network_rows"] = float(np.mean([result.network_rows for result in results]))
                row |= {"reward": float(scores.mean()), "reward_95": intervals.bootstrap(scores)}
                row |= {"exact": float((scores == 0).mean()), "exact_95": intervals.wilson(scores == 0)}
                rows.append(row)
        _table(rows, self.prompts)
        if self.json:
            self.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")


def _table(rows: list[dict[str, Any]], prompts: int) -> None:
    table = Table(title=f"shapes-video, {prompts} prompts (95 % intervals in brackets)")
    for column in ("", "guidance", "NFE", "network rows", "mean reward", "exactly right"):
        table.add_column(column)
    for row in rows:
        reward, exact = row["reward_95"], row["exact_95"]
        table.add_row(
            row["label"],
            f"{row['guidance']:g}",
            str(row["nfe"]),
            f"{row['network_rows']:.0f}",
            f"{row['reward']:.2f} [{reward[0]:.2f}, {reward[1]:.2f}]",
            f"{row['exact']:.2f} [{exact[0]:.2f}, {exact[1]:.2f}]",
        )
    Console(width=110).print(table)
