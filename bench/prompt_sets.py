"""Makes the three prompt sets that studies use: `python -m rollflow.bench.prompt_sets --work DIR`.

Each is 100 sentences that the training set does not contain, fixed and committed. What makes a set hard is how many
objects and groups a prompt asks for. There are few ways to ask for few objects in one or two groups, and training has
seen them all: the easy and the medium set ask in wordings of their own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import tyro

from rollflow.errors import RequestError, shown
from rollflow.models import world

SETS = {"easy": (1, 2), "medium": (4, 6), "hard": (7, 9)}  # objects, from and to
GROUPS = {"easy": 2, "medium": 2, "hard": 3}  # at most
NEW_WORDINGS = (
    "a picture with {groups}",
    "an image of {groups}",
    "draw a picture of {groups}",
    "draw an image with {groups}",
    "show a picture of {groups}",
    "show {groups} on a light canvas",
)
SIZE = 100


def load(name: str, count: int = SIZE) -> list[str]:
    """The first `count` prompts of a committed set: "easy", "medium" or "hard"; others are a `RequestError`."""
    if name not in SETS:
        raise RequestError(f"there is no prompt set {shown(name)}: choose {', '.join(SETS)}")
    if not 1 <= count <= SIZE:
        raise RequestError(f"{count} prompts: a set has {SIZE}, and at least 1 is needed")
    return json.loads((resources.files("rollflow.bench") / "prompts" / f"{name}.json").read_text())[:count]


def make(seen: set[str], seed: int) -> dict[str, list[str]]:
    """The sets, without the sentences in `seen`, each sentence once."""
    rng, sets = np.random.default_rng(seed), {}
    for name, (least, most) in SETS.items():
        chosen: dict[str, None] = {}
        while len(chosen) < SIZE:
            total = int(rng.integers(least, most + 1))
            groups = world.random_groups(rng, total, int(rng.integers(1, min(GROUPS[name], total) + 1)))
            wordings = world.WORDINGS if name == "hard" else NEW_WORDINGS
            wording = wordings[int(rng.integers(len(wordings)))]
            prompt = wording.format(groups=world.prompt(groups))
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
