"""Given values as plain Python ones: a whole number, a number, a switch, or an error that says what is wrong.

NumPy's and torch's scalars are what they stand for. `True` is no number, `b"3"` and "3" are none, and 3.0 is no whole
number.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from rollflow.errors import RequestError, shown

_SCALARS = "biuf"  # kinds of NumPy's that are numbers: bool, int, unsigned, float


def plain(value: Any) -> Any:
    """A scalar, NumPy's or torch's included, as the bool, int or float of Python that it is; anything else as it is."""
    kind = type(value)
    if kind in (bool, int, float, str):
        return value
    try:
        if isinstance(value, int):
            return int.__index__(value)
        if isinstance(value, float):
            return float.__float__(value)
        if getattr(value, "ndim", None) == 0 and getattr(value.dtype, "kind", "f") in _SCALARS:
            found = value.item()
            return found if type(found) in (bool, int, float) else value
    except Exception:  # of an object that only looks like a scalar
        return value
    return value


def whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as a plain int, if it is a whole number of at least `least`, and at most `most`.

    Raises:
        RequestError: it is none.
    """
    given = plain(value)
    if type(given) is not int or given < least or (most is not None and given > most):
        too_large = type(given) is int and given >= least
        allowed = f"of at most {most}" if too_large else f"of at least {least}"
        raise RequestError(f"{name}={shown(value)}: it must be a whole number {allowed}")
    return given


def number(name: str, value: object, most: float = math.inf) -> float:
    """`value` as a plain float, if it is a finite number, and no larger than `most` in size.

    Raises:
        RequestError: it is none.
    """
    given = _real(value)
    if not math.isfinite(given):
        raise RequestError(f"{name}={shown(value)}: it must be a finite number")
    if abs(given) > most:
        raise RequestError(f"{name}={shown(value)}: it must be a finite number, from {-most:g} to {most:g}")
    return given


def flag(name: str, value: object) -> bool:
    """`value`, if it is True or False (NumPy's and torch's included).

    Raises:
        RequestError: it is neither.
    """
    given = plain(value)
    if type(given) is not bool:
        raise RequestError(f"{name}={shown(value)}: it must be True or False")
    return given


def real(value: object) -> float | None:
    """`value` as a plain float, which may be infinite or NaN; None if it is no number."""
    given = plain(value)
    if type(given) is Fraction:
        given = given.numerator / given.denominator
    if type(given) not in (int, float):
        return None
    try:
        return float(given)
    except OverflowError:  # an int that no float can hold
        return math.inf if given > 0 else -math.inf


def _real(value: object) -> float:
    given = real(value)
    return math.nan if given is None else given
