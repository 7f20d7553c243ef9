"""Draws the log of a training run: `python -m rollflow.bench.training_curves LOG.jsonl OUT.png` (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import tyro

MEASURES = {
    "accuracy_1": "exact counts, 1 Euler step",
    "accuracy_4": "exact counts, 4 Euler steps",
    "accuracy_10": "exact counts, 10 Euler steps",
    "exact_1": "exactly right, guidance 1",
    "exact_3": "exactly right, guidance 3",
    "l1": "L1 of reconstructions",
}


def draw(log: Path, out: Path) -> None:
    """Losses of the trained stages, and below them what was measured along the way."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    stages = list(dict.fromkeys(r["stage"] for r in records if "loss" in r))
    figure, axes = plt.subplots(
        2, len(stages), figsize=(3.6 * len(stages), 6), sharex="col", layout="constrained", squeeze=False
    )
    for column, stage in enumerate(stages):
        mine = {r["step"]: r for r in records if r["stage"] == stage and "loss" in r}
        axes[0, column].plot(list(mine), [r["loss"] for r in mine.values()])
        axes[0, column].set(title=stage, ylabel="loss", yscale="log")
        for key, label in MEASURES.items():
            seen = {r["step"]: r[key] for r in records if r["stage"] == stage and key in r}
            if seen:
                axes[1, column].plot(list(seen), list(seen.values()), marker=".", label=label)
        axes[1, column].set(xlabel="step", ylabel="L1" if stage == "autoencoder" else "share of samples")
        axes[1, column].legend(fontsize="x-small")
    figure.savefig(out, dpi=100)


def main(log: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> None:
    """Draws a training log.

    Args:
        log: the log.jsonl of a training run.
        out: the picture.
    """
    draw(log, out)


if __name__ == "__main__":
    tyro.cli(main)
