"""Makes the three prompt sets that studies use: `python -m rollflow.bench.prompt_sets --work DIR`.

Each is 100 sentences that the training set does not contain, fixed and committed. What makes a set hard is how many
objects a prompt asks for; the ranges below are set so that the built-in model's ten-step accuracy falls into 60-90 %,
20-50 % and 1-12 %.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import tyro

from rollflow import shapes

SETS = {"easy": (3, 3), "medium": (4, 6), "hard": (7, 9)}  # objects, from and to
SIZE = 100


def load(name: str) -> list[str]:
    """The prompts of a committed set: "easy", "medium" or "hard"."""
    return json.loads((resources.files("rollflow.bench") / "prompts" / f"{name}.json").read_text())


def make(seen: set[str], seed: int) -> dict[str, list[str]]:
    """The sets, without the sentences in `seen`, each sentence once."""
    rng, sets = np.random.default_rng(seed), {}
    for name, (least, most) in SETS.items():
        chosen: dict[str, None] = {}
        while len(chosen) < SIZE:
            total = int(rng.integers(least, most + 1))
            groups = shapes.random_groups(rng, total, int(rng.integers(1, 4)))
            prompt = shapes.prompt(groups, int(rng.integers(len(shapes.WORDINGS))))
            if prompt not in seen:
                chosen[prompt] = None
        sets[name] = list(chosen)
    return sets


@dataclass(frozen=True)
class Options:
    """Where the training run's data is, and where the sets go."""

    work: Path = Path("build/shapes")
    out: Path = Path(__file__).parent / "prompts"
    seed: int = 2025


def main() -> None:
    """Writes the three files."""
    options = tyro.cli(Options, description=__doc__)
    seen = set(json.loads((options.work / "prompts.json").read_text()))
    for name, prompts in make(seen, options.seed).items():
        (options.out / f"{name}.json").write_text(json.dumps(prompts, indent=1) + "\n")


if __name__ == "__main__":
    main()
