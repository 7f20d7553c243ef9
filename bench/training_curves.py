"""Draws the log of a training run: `python -m rollflow.bench.training_curves LOG.jsonl OUT.png` (needs matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import tyro

STAGES = ("autoencoder", "flow", "rectify1", "rectify2", "rectify")


def draw(log: Path, out: Path) -> None:
    """Losses of the trained stages (`rectify` is three rounds), and the accuracy of samples along the way."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(2, len(STAGES), figsize=(18, 6), sharex="col", layout="constrained")
    for column, stage in enumerate(STAGES):
        mine = {r["step"]: r for r in records if r["stage"] == stage and "loss" in r}
        axes[0, column].plot(list(mine), [r["loss"] for r in mine.values()])
        axes[0, column].set(title=stage, ylabel="loss", yscale="log")
        for steps in (1, 4, 10):
            key = f"accuracy_{steps}"
            seen = {r["step"]: r[key] for r in records if r["stage"] == stage and key in r}
            if seen:
                axes[1, column].plot(
                    list(seen), list(seen.values()), marker=".", label=f"{steps} Euler step{'s' * (steps > 1)}"
                )
        seen = {r["step"]: r["l1"] for r in records if r["stage"] == stage and "l1" in r}
        if seen:
            axes[1, column].plot(list(seen), list(seen.values()), marker=".", label="L1 of reconstructions")
        axes[1, column].set(xlabel="step", ylabel="L1" if stage == "autoencoder" else "exact-count accuracy")
        axes[1, column].legend()
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
