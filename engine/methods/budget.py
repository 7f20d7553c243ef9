"""What every method checks and chooses alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Generator, Sequence
from typing import Any

from rollflow.draw import Draw, Evaluated, Note
from rollflow.errors import BudgetError, RequestError

Search = Generator[list[Draw] | Note, Any, Evaluated]  # it is sent the particles of its draws, and None for a note


def require(method: str, nfe: int, smallest: int, why: str) -> None:
    """Raises `BudgetError` when `nfe` is below the smallest budget that the method can work with."""
    if nfe < smallest:
        message = f"{method} cannot work with nfe={nfe}: the smallest budget is {smallest} ({why})"
        raise BudgetError(message, smallest, why)


def whole(name: str, value: object, least: int) -> int:
    """`value` (an int, or a whole number of NumPy's or torch's) if it is at least `least`, else a `RequestError`."""
    try:
        given = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        given = least - 1
    if given < least:
        raise RequestError(f"{name}={value!r}: it must be a whole number of at least {least}")
    return given


def number(name: str, value: object) -> float:
    """`value` as a finite float, else a `RequestError` that names it."""
    try:
        given = math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        given = math.nan
    if not math.isfinite(given):
        raise RequestError(f"{name}={value!r}: it must be a finite number")
    return given


def worth(particle: Evaluated) -> float:
    """The reward as methods compare it: one that is no finite number is worst."""
    return -math.inf if particle.reward is None or not math.isfinite(particle.reward) else particle.reward


def best(particles: Sequence[Evaluated]) -> Evaluated:
    """The particle with the highest reward, the first drawn on ties."""
    return max(particles, key=worth)
