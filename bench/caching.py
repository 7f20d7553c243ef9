"""What a cache costs in quality and saves in operations: `rollflow bench caching`; see `rollflow.Request.cache`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from rollflow.bench import geometries, intervals, outputs, prompt_sets
from rollflow.bench.environment import environment
from rollflow.engine import Engine
from rollflow.errors import RequestError, shown
from rollflow.models import caching
from rollflow.profile.operations import flops
from rollflow.request import Request, Result

SIZES = ("flux", "shapes")  # of `rollflow.bench.geometries`, whose operations are counted
# The paper's SDE, under which little of a parent is left in its child, and such of less noise.
PATHS: dict[str, dict[str, Any]] = {
    "VP, g=3t^2": {},
    "linear, g=0.3t^2": {"interpolant": "linear", "grid": "uniform", "steps": 10, "diffusion": 0.3},
    "linear, g=t^2": {"interpolant": "linear", "grid": "uniform", "steps": 10, "diffusion": 1.0},
}


@dataclass(frozen=True)
class Caching:
    """Compares searches with a cache with the same searches without, paired by prompt.

    Each runs at the same budget, and without a cache at the one whose evaluations in full take as many operations of
    the transformer as the search with a cache took, too.

    Attributes:
        model: which model; one that caches.
        sets: sets of prompts.
        methods: search methods that can have a cache.
        paths: of `PATHS`; none is all.
        prompts: how many of each set.
        nfe: budget of each prompt.
        seed: of the first prompt; each has its own.
        json: a file for the figures.
    """

    model: str = "shapes"
    sets: tuple[str, ...] = ("medium",)
    methods: tuple[str, ...] = ("svdd", "rbf")
    paths: tuple[str, ...] = tuple(PATHS)
    prompts: int = 100
    nfe: int = 100
    seed: int = 0
    json: Path | None = None

    def __call__(self) -> None:
        """Counts and runs, prints both tables, writes the file."""
        outputs.check_file(self.json)
        if self.model not in SIZES:
            raise RequestError(
                f"model={shown(self.model)}: choose one whose operations are counted, {', '.join(SIZES)}"
            )
        where, console, counts = environment(), Console(width=120), [*map(operations, SIZES)]
        console.print(_counted(counts))
        share = next(one["share"] for one in counts if one["size"] == self.model)
        engine, rows = Engine.from_pretrained(self.model), list[dict[str, Any]]()
        for name in self.sets:
            for path in self.paths:
                for method in self.methods:
                    row = self._row(engine, prompt_sets.load(name, self.prompts), method, path, share)
                    rows.append({"set": name, "method": method, "path": path, "model": self.model, **row})
                    console.print(f"{method}, {path}, {name}: done", highlight=False)
                    if self.json:  # row by row: on a slow machine a run may be stopped
                        known = {"environment": where, "operations": counts, "rows": rows}
                        self.json.write_text(json.dumps(known, indent=1) + "\n")
        console.print(_compared(rows))

    def _row(self, engine: Engine, prompts: Sequence[str], method: str, path: str, share: float) -> dict[str, Any]:
        def run(nfe: int, cache: bool) -> list[Result]:
            given = {"method": method, "nfe": nfe, "cache": cache, **PATHS[path]}
            return engine.generate([Request(p, seed=self.seed + i, **given) for i, p in enumerate(prompts)])

        cached = run(self.nfe, True)
        evaluations = [result.committed_nfe - (1 - share) * result.cached_nfe for result in cached]
        equal = round(float(np.mean(evaluations)))  # in full, of as many operations
        return {
            "nfe": self.nfe, "prompts": len(prompts), "equal_nfe": equal,
            "cached_nfe": float(np.mean([result.cached_nfe for result in cached])),
            "committed_nfe": float(np.mean([result.committed_nfe for result in cached])),
            "cached": _summary(cached),
            **{name: _against(cached, run(nfe, False)) for name, nfe in (("full", self.nfe), ("equal", equal))},
        }  # fmt: skip


def operations(size: str) -> dict[str, Any]:
    """Floating-point operations of one row's evaluation in full and from a cache, counted on the device meta.

    Args:
        size: one of `rollflow.bench.geometries.GEOMETRIES`.

    Returns:
        "size", "full" and "cached" operations, the latter's "share" of the former, and "bytes" of what is kept of a
        particle in bfloat16.
    """
    of = geometries.geometry(size)
    with torch.device("meta"), torch.no_grad():
        network = geometries.transformer(of)
        x, kept = (torch.empty(1, of.image_tokens, n) for n in (4 * of.latent_channels, of.inner))
        text = torch.empty(1, of.pooled_width), torch.empty(1, of.text_tokens, of.text_width)
        times, positions = (torch.empty(1), *text, torch.empty(1)), torch.empty(of.image_tokens + of.text_tokens, 3)

        def full() -> Any:
            return caching.whole(network, caching.entered(network, x, *times, positions))

        def cached() -> Any:
            return caching.cached(network, caching.entered(network, x, *times, positions), kept)

        counts = [flops(work, x.device) for work in (full, cached)]
    return {
        "size": size, "full": counts[0], "cached": counts[1], "share": counts[1] / counts[0], "bytes": 2 * kept.numel(),
    }  # fmt: skip


def _summary(results: Sequence[Result]) -> dict[str, float]:
    rewards = np.array([result.reward for result in results])
    return {"exact": float((rewards == 0).mean()), "reward": float(rewards.mean())}


def _against(cached: Sequence[Result], others: Sequence[Result]) -> dict[str, Any]:
    """Of searches without a cache their scores, and by how much those with one are better, paired, with 95 % limits."""
    found: dict[str, Any] = {"nfe": others[0].committed_nfe, **_summary(others)}
    rewards = [np.array([result.reward for result in results]) for results in (cached, others)]
    for name, (one, other) in (("exact", [(r == 0).astype(float) for r in rewards]), ("reward", rewards)):
        found[f"{name}_difference"] = [float((one - other).mean()), *intervals.bootstrap(one - other)]
    return found


def _counted(found: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="operations of the transformer, one row of an evaluation")
    for column in ("size", "full, GFLOP", "cached, GFLOP", "share", "kept, MB a particle (bfloat16)"):
        table.add_column(column, justify="left" if column == "size" else "right")
    for one in found:
        counts = (f"{one[name] / 1e9:.4g}" for name in ("full", "cached"))
        table.add_row(one["size"], *counts, f"{100 * one['share']:.1f} %", f"{one['bytes'] / 1e6:.3g}")
    return table


def _compared(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="share exactly right, and the difference that the cache makes with its 95 % limits")
    for column in ("set", "method", "path", "cached", "same NFE", "difference", "same operations", "difference"):
        table.add_column(column)
    for row in rows:
        cells = []
        for name in ("full", "equal"):
            difference, low, high = row[name]["exact_difference"]
            cells += [f"{row[name]['exact']:.2f} ({row[name]['nfe']})", f"{difference:+.2f} [{low:+.2f}, {high:+.2f}]"]
        cached = f"{row['cached']['exact']:.2f} ({row['committed_nfe']:.0f})"
        table.add_row(row["set"], row["method"], row["path"], cached, *cells)
    return table
