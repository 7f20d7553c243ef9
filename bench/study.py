"""Which search wins, on the built-in model: `python -m rollflow.bench study --quick`.

Every method runs on the same prompts with the same budget; all prompts of a set share forwards. Accuracy is the share
of images that show exactly what the prompt asks for, with Wilson's 95 % interval; the gain over the base sample is
paired by prompt, with a bootstrap interval.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy import stats

from rollflow.bench import prompt_sets
from rollflow.bench.environment import environment
from rollflow.engine import Engine
from rollflow.request import Request, Result

ODE: dict[str, Any] = {"interpolant": "linear", "diffusion": 0.0, "grid": "uniform"}
PATHS: dict[str, dict[str, Any]] = {
    "linear-ODE": ODE,
    "linear-SDE": {"interpolant": "linear"},
    "VP-SDE": {"interpolant": "vp"},
}


@dataclass(frozen=True)
class Study:
    """Compares base, BoN, SVDD and RBF on the three prompt sets.

    Attributes:
        quick: one seed; without it three.
        model: a model that knows the words of the sets.
        nfe: budget of a search.
        prompts: how many prompts of each set.
        sets: which sets.
        finish: deterministic finishing steps of SVDD and RBF, paid out of their budget.
        json: a file for the numbers.
        markdown: a file for the table of accuracies.
    """

    quick: bool = False
    model: str = "shapes"
    nfe: int = 100
    prompts: int = prompt_sets.SIZE
    sets: tuple[str, ...] = tuple(prompt_sets.SETS)
    finish: int = 0
    json: Path | None = None
    markdown: Path | None = None

    def rows(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The contenders: (method, path) to the options of their requests."""
        rows: dict[tuple[str, str], dict[str, Any]] = {
            ("base", "linear-ODE"): {"method": "bon", "nfe": 10, **ODE},
            ("base, 1 step", "linear-ODE"): {"method": "bon", "nfe": 1, "steps": 1, **ODE},
            ("BoN, 3 steps", "linear-ODE"): {"method": "bon", "nfe": self.nfe, "steps": 3, **ODE},
        }
        for path, options in PATHS.items():
            rows["BoN", path] = {"method": "bon", "nfe": self.nfe, **options}
        for method in ("svdd", "rbf"):
            for path in ("linear-SDE", "VP-SDE"):
                rows[method.upper(), path] = {"method": method, "nfe": self.nfe, "finish": self.finish, **PATHS[path]}
        return rows

    def run(self) -> None:
        """Runs everything, prints the table, writes the file."""
        where, sets = environment(), {name: prompt_sets.load(name, self.prompts) for name in self.sets}
        for file in (self.json, self.markdown):
            if file:
                file.touch()  # find out now, not after the work
        engine, console = Engine.from_pretrained(self.model), Console()
        seeds = (0,) if self.quick else (0, 1, 2)
        records: list[dict[str, Any]] = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("study", total=len(self.sets) * len(self.rows()))
            for name, prompts in sets.items():
                base = None
                for (method, path), options in self.rows().items():
                    progress.update(task, description=f"{name}: {method}, {path}")
                    start = time.perf_counter()
                    results = engine.generate(
                        [Request(p, seed=1000 * s + i, **options) for s in seeds for i, p in enumerate(prompts)]
                    )
                    record = {"set": name, "method": method, "path": path, "nfe": options["nfe"]}
                    seconds = time.perf_counter() - start
                    base, row = _summary(results, base, seconds, len(prompts))
                    records.append(record | row)
                    progress.advance(task)
        console.print(table(records, self))
        if self.json:
            report = {"environment": where, "study": _plain(self), "rows": records}
            self.json.write_text(json.dumps(report, indent=1) + "\n")
        if self.markdown:
            self.markdown.write_text(markdown(records))


def _plain(study: Study) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(study).items() if k not in ("json", "markdown")}


def _summary(
    results: list[Result], base: np.ndarray | None, seconds: float, prompts: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Accuracy, gain over base, held-out accuracy and cost of one contender on one set."""
    exact = np.array([r.reward == 0 for r in results], dtype=float)
    held_out = np.array([r.held_out == 0 for r in results], dtype=float)
    base = exact if base is None else base
    committed = sum(r.committed_nfe for r in results)
    row = {
        "accuracy": exact.mean(),
        "accuracy_95": _wilson(exact),
        "gain": (exact - base).mean(),
        "gain_95": _paired((exact - base).reshape(-1, prompts).mean(0)),
        "held_out_accuracy": held_out.mean(),
        "held_out_accuracy_95": _wilson(held_out),
        "reward": float(np.mean([r.reward for r in results])),
        "committed_nfe": committed / len(results),
        "executed_over_committed": sum(r.executed_nfe for r in results) / committed,
        "milliseconds_per_nfe": 1000 * seconds / committed,
    }
    return base, row


def _wilson(hits: np.ndarray) -> list[float]:
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return [interval.low, interval.high]


def _paired(differences: np.ndarray) -> list[float]:
    """95 % bootstrap interval of the mean difference, over prompts."""
    if len(set(differences)) == 1:
        return [float(differences[0])] * 2
    rng = np.random.default_rng(0)
    interval = stats.bootstrap((differences,), np.mean, n_resamples=9999, method="percentile", rng=rng)
    return [interval.confidence_interval.low, interval.confidence_interval.high]


def markdown(records: list[dict[str, Any]]) -> str:
    """The accuracies in percent with their intervals, a row a contender."""
    sets = list(dict.fromkeys(r["set"] for r in records))
    lines = [f"| method | path | {' | '.join(sets)} |", "|---|---|" + "---|" * len(sets)]
    for method, path in dict.fromkeys((r["method"], r["path"]) for r in records):
        mine = {r["set"]: r for r in records if (r["method"], r["path"]) == (method, path)}
        lines.append(f"| {method} | {path} | {' | '.join(_percent(mine[name]) for name in sets)} |")
    return "\n".join(lines) + "\n"


def _percent(record: dict[str, Any]) -> str:
    low, high = (100 * x for x in record["accuracy_95"])
    return f"{100 * record['accuracy']:.0f} [{low:.0f}, {high:.0f}]"


def table(records: list[dict[str, Any]], study: Study) -> Table:
    """The records for the screen: a row a contender, accuracies in percent."""
    made = Table(title=f"exact-count accuracy in % [95 % interval] / held-out, {study.model}, {study.nfe} NFE")
    for column in ("method", "path", *study.sets, "ms/NFE"):
        made.add_column(column, justify="left" if column in ("method", "path") else "right")
    for method, path in study.rows():
        mine = [r for r in records if (r["method"], r["path"]) == (method, path)]
        cells = [f"{_percent(r)} / {100 * r['held_out_accuracy']:.0f}" for r in mine]
        made.add_row(method, path, *cells, f"{np.mean([r['milliseconds_per_nfe'] for r in mine]):.2f}")
    return made
