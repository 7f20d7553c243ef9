"""Search methods: each a generator that yields draws and receives evaluated particles.

Driving one takes no model: send it lists of objects with a `reward` and a `step`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rollflow.errors import RequestError, shown, titled
from rollflow.methods.beam import beam
from rollflow.methods.bon import bon
from rollflow.methods.budget import Search
from rollflow.methods.code import code
from rollflow.methods.das import das
from rollflow.methods.dps import dps
from rollflow.methods.dts import dts
from rollflow.methods.evosearch import evosearch
from rollflow.methods.psp import psp
from rollflow.methods.rbf import rbf
from rollflow.methods.ses import ses
from rollflow.methods.smc import fk, smc
from rollflow.methods.sop import sop
from rollflow.methods.sprout import sprout
from rollflow.methods.svdd import svdd
from rollflow.methods.threshold import threshold
from rollflow.methods.zo import zo

_BRANCHING = (beam, code, das, dts, evosearch, fk, rbf, smc, svdd, threshold)  # children of one particle, by the SDE
_UNBRANCHED = (bon, dps, psp, ses, sop, sprout, zo)  # for these an ODE will do
_METHODS: dict[str, Callable[..., Search]] = {f.__name__: f for f in (*_BRANCHING, *_UNBRANCHED)}
_NOISE: dict[str, Any] = {"interpolant": "vp", "diffusion": 3.0, "grid": "paper", "steps": 10}  # as in the paper
_STRAIGHT: dict[str, Any] = {"interpolant": "linear", "diffusion": 0.0, "grid": "uniform"}  # the model's own ODE

__all__ = [
    "Search", "branches", "defaults", "guided", "make", "names", "options_of", "prunes", "title", *sorted(_METHODS),
]  # fmt: skip


def names() -> list[str]:
    """The methods that `make` knows."""
    return sorted(_METHODS)


def title(method: str | Callable[..., Search]) -> str:
    """What a method is called."""
    return method if isinstance(method, str) else titled(method)


def _function(method: str | Callable[..., Search]) -> Callable[..., Search] | None:
    return _METHODS.get(method) if isinstance(method, str) else method


def options_of(method: str | Callable[..., Search]) -> list[str]:
    """The names of a method's own options; none for an unknown method."""
    known = _function(method)
    parameters = inspect.signature(known).parameters if known else ()
    return [p for p in parameters if p not in ("nfe", "steps", "finish", "seed")]


def branches(method: str | Callable[..., Search]) -> bool:
    """Whether the method draws several children of one particle, which under an ODE would all be the same."""
    return _function(method) in _BRANCHING


def prunes(method: str | Callable[..., Search]) -> bool:
    """Whether the method has the option `first`, the first point of the grid whose rewards are to be trusted."""
    return _function(method) in (psp, sprout)


def guided(method: str | Callable[..., Search], options: Mapping[str, Any]) -> bool:
    """Whether the method, with these options, follows the gradient of the reward."""
    return _function(method) is dps or bool(options.get("gradient"))


def defaults(method: str | Callable[..., Search]) -> dict[str, Any]:
    """How a request runs where it does not say: by the paper's VP-SDE for methods that branch and for your own, by the
    model's own ODE, for as many steps as suit the model, for those that do not.
    """
    return _STRAIGHT if _function(method) in _UNBRANCHED else _NOISE


def make(name: Any, nfe: int, steps: int, finish: int = 0, seed: int = 0, **options: Any) -> Search:
    """Builds a search whose draws and finish together spend exactly `nfe` function evaluations.

    Args:
        name: one of `names()`, or a function `f(nfe, steps, **options)` that returns such a generator; a function gets
            `finish` and `seed` too if it has parameters of these names.
        nfe: the whole budget, the finish included.
        steps: how many points of the time grid are evaluated.
        finish: evaluations that the engine keeps for finishing the particles that compete in the end.
        seed: of a method's own random choices (resampling).
        options: the method's own, see `options_of`.

    Raises:
        RequestError: an unknown method or option, or a budget too small for the method.
    """
    if isinstance(name, str) and name not in _METHODS:
        raise RequestError(f"unknown method {shown(name)}: choose one of {', '.join(names())}")
    if not isinstance(name, str) and not callable(name):
        raise RequestError(f"method={shown(name)}: it must be a name of rollflow.methods.names() or a function")
    build, allowed = _METHODS[name] if isinstance(name, str) else name, options_of(name)
    for option in options:
        if option not in allowed:
            known = f"its options are {', '.join(allowed)}" if allowed else "it has none"
            raise RequestError(f"the method {title(name)} has no option {shown(option)}: {known}")
    parameters = inspect.signature(build).parameters
    given = {key: value for key, value in (("finish", finish), ("seed", seed)) if key in parameters}
    return build(nfe if "finish" in given else nfe - finish, steps, **given, **options)


def holds(method, nfe, steps, finish=0, **options):
    return nfe
