"""What every method checks and chooses alike."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

from rollflow.draw import Draw, Evaluated, Note
from rollflow.errors import BudgetError
from rollflow.values import flag as flag
from rollflow.values import number as number
from rollflow.values import whole as whole

Search = Generator[list[Draw] | Note, Any, Evaluated]  # it is sent the particles of its draws, and None for a note


def require(method: str, nfe: int, smallest: int, why: str) -> None:
    """Raises `BudgetError` when `nfe` is below the smallest budget that the method can work with."""
    if nfe < smallest:
        message = f"{method} cannot work with nfe={nfe}: the smallest budget is {smallest} ({why})"
        raise BudgetError(message, smallest, why)


def worth(particle: Evaluated) -> float:
    """The reward as methods compare it: one that is no finite number is worst."""
    return -math.inf if particle.reward is None or not math.isfinite(particle.reward) else particle.reward


def best(particles: Sequence[Evaluated]) -> Evaluated:
    """The particle with the highest reward, the first drawn on ties."""
    return max(particles, key=worth)
