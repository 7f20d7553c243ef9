"""Which engine of a fleet a request goes to: the policies that a replay knows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

Policy = Callable[
    [int, Sequence[int]], int
]  # of a request's number and each engine's outstanding NFE: an engine's number
LEAST = "least outstanding NFE"


def least(seed: int) -> Policy:
    """To the engine whose open requests have the least left to spend; of several, to the first."""
    return lambda number, outstanding: min(range(len(outstanding)), key=outstanding.__getitem__)


def in_turn(seed: int) -> Policy:
    """To one engine after another, whatever they have to do."""
    return lambda number, outstanding: number % len(outstanding)


def by_chance(seed: int) -> Policy:
    """To any engine, all as likely."""
    dice = random.Random(f"dispatch {seed}")
    return lambda number, outstanding: dice.randrange(len(outstanding))


POLICIES: Mapping[str, Callable[[int], Policy]] = {LEAST: least, "round robin": in_turn, "random": by_chance}
