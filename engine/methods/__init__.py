"""Search methods: each a generator that yields draws and receives evaluated particles.

Driving one takes no model: send it lists of objects with a `reward` and a `step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rollflow.errors import BudgetError, RequestError, shown, titled
from rollflow.methods import catalog
from rollflow.methods.beam import beam
from rollflow.methods.bon import bon
from rollflow.methods.budget import Search, whole
from rollflow.methods.catalog import Option, method
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

_METHODS: dict[str, Callable[..., Search]] = {
    built_in.__name__: built_in
    for built_in in (
        beam, bon, code, das, dps, dts, evosearch, fk, psp, rbf, ses, smc, sop, sprout, svdd, threshold, zo,
    )
}  # fmt: skip
_NOISE: dict[str, Any] = {"interpolant": "vp", "diffusion": 3.0, "grid": "paper", "steps": 10}  # as in the paper
_STRAIGHT: dict[str, Any] = {"interpolant": "linear", "diffusion": 0.0, "grid": "uniform"}  # the model's own ODE

__all__ = [
    "Option", "Search", "branches", "caching", "defaults", "guided", "holds", "make", "method", "names", "options",
    "options_of", "parents", "title", "trusts", *sorted(_METHODS),
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
    return catalog.option_names(known) if known else []


def options(method: str | Callable[..., Search]) -> list[Option]:
    """A method's own options, with their types, defaults and meaning; none for an unknown method."""
    known = _function(method)
    return catalog.options(known) if known else []


def branches(method: str | Callable[..., Search]) -> bool:
    """Whether the method says that it draws several children of one particle, which under an ODE would be the same."""
    return bool(catalog.declaration(_function(method)).branches)


def trusts(method: str | Callable[..., Search]) -> str | None:
    """Which of the method's options is the first point of the grid whose rewards are to be trusted, if any is."""
    return catalog.declaration(_function(method)).trusts


def guided(method: str | Callable[..., Search], options: Mapping[str, Any]) -> bool:
    """Whether the method, with these options, follows the gradient of the reward."""
    known = _function(method)
    return known is not None and bool(catalog.declaration(known).guided(catalog.filled_in(known, options)))


def holds(method: str | Callable[..., Search], nfe: int, steps: int, finish: int = 0, **options: Any) -> int:
    """The most particles that the method holds at any time, as it declares; see `rollflow.methods.method`.

    The arguments are those of `make`, which has to accept them.

    Raises:
        RequestError: what the method declares is no whole number of at least 1.
    """
    known = _function(method)
    assert known is not None
    most = catalog.declaration(known).holds(max(1, nfe - finish), steps, catalog.filled_in(known, options))
    return whole(f"what the method {title(method)} declares that it holds", most, 1)


def caching() -> list[str]:
    """The methods that can have a cache."""
    return [name for name in names() if catalog.declaration(_METHODS[name]).parents is not None]


def parents(method: str | Callable[..., Search], nfe: int, steps: int, finish: int = 0, **options: Any) -> int | None:
    """The most particles that a method draws from after they competed; None where it does not say. See `method`.

    Raises:
        RequestError: what it declares is no whole number of at least 0.
    """
    known = _function(method)
    assert known is not None
    count = catalog.declaration(known).parents
    if count is None:
        return None
    most = count(max(1, nfe - finish), steps, catalog.filled_in(known, options))
    return whole(f"what the method {title(method)} declares that it draws from", most, 0)


def defaults(method: str | Callable[..., Search]) -> dict[str, Any]:
    """How a request runs where it does not say: on the paper's VP-SDE for methods that branch, and for your own if they
    declare nothing; on the model's own ODE, for as many steps as suit the model, for those that do not branch.
    """
    return _STRAIGHT if catalog.declaration(_function(method)).branches is False else _NOISE


def make(name: Any, nfe: int, steps: int, finish: int = 0, seed: int = 0, again: int = 0, **options: Any) -> Search:
    """Builds a search whose draws and finish together spend exactly `nfe` function evaluations.

    Args:
        name: one of `names()`, or a function `f(nfe, steps, **options)` that returns such a generator; it gets `seed`
            too if it has a parameter of that name. It may declare what it is, see `rollflow.methods.method`.
        nfe: the whole budget, the finish included; the method is given what is left without it.
        steps: how many points of the time grid are evaluated.
        finish: evaluations that the engine keeps for finishing the particles that compete in the end.
        seed: of a method's own random choices (resampling).
        again: evaluations that the engine keeps for particles that are evaluated again, in full; see `parents`.
        options: the method's own, see `options_of`.

    Raises:
        BudgetError: a budget too small for the method; its attribute `smallest` is the smallest whole budget.
        RequestError: an unknown method or option.
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
    whole("nfe", nfe, 1), whole("finish", finish, 0), whole("again", again, 0)
    kept = finish + again
    given = {"seed": seed} if "seed" in catalog.parameters_of(build) else {}
    try:
        search = build(max(1, nfe - kept), steps, **given, **options)
        smallest, why = 1, "one evaluation"
    except BudgetError as error:
        smallest, why = error.smallest, error.why
    else:
        if nfe > kept:
            return search
    smallest += kept
    why += f", and a finish of {finish}" if finish else ""
    why += f", and {again} evaluated anew" if again else ""
    message = f"the method {title(name)} cannot work with nfe={nfe}: the smallest budget is {smallest} ({why})"
    raise BudgetError(message, smallest, why)
