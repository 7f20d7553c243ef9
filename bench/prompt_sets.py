"""Makes the three prompt sets that studies use: `python -m rollflow.bench.prompt_sets --work DIR`.

Each is 100 sentences that the training set does not contain, fixed and committed. What makes a set hard is how many
objects a prompt asks for. There are few ways to ask for one or two objects, and training has seen them all: the easy
set asks in wordings of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import tyro

from rollflow import shapes

SETS = {"easy": (1, 2), "medium": (3, 4), "hard": (7, 9)}  # objects, from and to
NEW_WORDINGS = (
    "a picture with {groups}",
    "an image of {groups}",
    "draw a picture of {groups}",
    "draw an image with {groups}",
    "show a picture of {groups}",
    "show {groups} on a light canvas",
)
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
            groups = shapes.random_groups(rng, total, int(rng.integers(1, min(3, total) + 1)))
            wording = (NEW_WORDINGS if name == "easy" else shapes.WORDINGS)[int(rng.integers(len(shapes.WORDINGS)))]
            prompt = wording.format(groups=shapes.prompt(groups))
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
