"""Search methods: each a generator that yields draws and receives evaluated particles.

Driving one takes no model: send it lists of objects with a `reward` and a `step`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rollflow.errors import RequestError
from rollflow.methods.beam import beam
from rollflow.methods.bon import bon
from rollflow.methods.budget import Search
from rollflow.methods.code import code
from rollflow.methods.psp import psp
from rollflow.methods.rbf import rbf
from rollflow.methods.smc import fk, smc
from rollflow.methods.svdd import svdd

_METHODS: dict[str, Callable[..., Search]] = {f.__name__: f for f in (beam, bon, code, fk, psp, rbf, smc, svdd)}
UNBRANCHED = ("bon", "psp")  # no particle has two children, so that an ODE will do

__all__ = [
    "UNBRANCHED", "Search", "beam", "bon", "code", "fk", "make", "names", "options_of", "psp", "rbf", "smc", "svdd",
]  # fmt: skip


def names() -> list[str]:
    """The methods that `make` knows."""
    return sorted(_METHODS)


def options_of(name: str) -> list[str]:
    """The names of a method's own options; none for an unknown method."""
    parameters = inspect.signature(_METHODS[name]).parameters if name in _METHODS else ()
    return [p for p in parameters if p not in ("nfe", "steps", "finish", "seed")]


def make(name: str, nfe: int, steps: int, finish: int = 0, seed: int = 0, **options: Any) -> Search:
    """Builds a search whose draws and finish together spend at most `nfe` function evaluations.

    Args:
        name: one of `names()`.
        nfe: the whole budget, the finish included.
        steps: how many points of the time grid are evaluated.
        finish: deterministic steps that the engine runs from the chosen particle.
        seed: of a method's own random choices (resampling).
        options: the method's own, see `options_of`.

    Raises:
        RequestError: an unknown method or option, or a budget too small for the method.
    """
    if name not in _METHODS:
        raise RequestError(f"unknown method {name!r}: choose one of {', '.join(names())}")
    method, allowed = _METHODS[name], options_of(name)
    for option in options:
        if option not in allowed:
            known = f"its options are {', '.join(allowed)}" if allowed else "it has none"
            raise RequestError(f"the method {name} has no option {option!r}: {known}")
    if "seed" in inspect.signature(method).parameters:
        options["seed"] = seed
    return method(nfe, steps, finish=finish, **options)
