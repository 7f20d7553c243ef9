"""What each method is, declared beside it: all that the engine and the command line know of a method.

    @method(branches=True, guided=lambda options: options.gradient > 0, holds=lambda nfe, steps, options: 2)
    def rbf(nfe, steps, initial=None, gradient=0.0, clip=None): ...

The names, types and defaults of a method's options are those of its signature, and what they mean stands in the section
`Args` of its docstring.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from rollflow.errors import RequestError

ENGINES = ("nfe", "steps", "seed")  # parameters that the engine fills in
_ATTRIBUTE = "rollflow_method"
_PARAMETERS: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """One of a method's own options.

    Attributes:
        name: as the method's parameter is called.
        kind: its type, None excluded.
        default: what it is where a request does not say.
        help: the first sentence of its entry in the method's docstring.
    """

    name: str
    kind: Any
    default: Any
    help: str


def _by_its_gradient(options: Any) -> bool:
    return bool(getattr(options, "gradient", False))


def _whole_budget(nfe: int, steps: int, options: Any) -> int:
    return nfe


@dataclass(frozen=True)
class Declaration:
    """What a method declares; the defaults are those of a function that declares nothing. See `method`."""

    branches: bool | None = None
    guided: Callable[[Any], bool] = _by_its_gradient
    trusts: str | None = None
    holds: Callable[[int, int, Any], int] = _whole_budget
    parents: Callable[[int, int, Any], int] | None = None


def method(
    *,
    branches: bool | None = None,
    guided: Callable[[Any], bool] | None = None,
    trusts: str | None = None,
    holds: Callable[[int, int, Any], int] | None = None,
    parents: Callable[[int, int, Any], int] | None = None,
) -> Callable[[Function], Function]:
    """Declares what a method is; a function of your own may carry it too.

    `options` below is an object with an attribute for each of the method's own options, defaults filled in.

    Args:
        branches: whether it draws several children of one particle, which under an ODE would all be the same: such a
            method runs on the paper's VP-SDE by default, and one that does not on the model's own ODE. None, where it
            is not known, also means the SDE, but an ODE is not refused.
        guided: `guided(options)` says whether it follows the gradient of the reward, which then has to have one. By
            default it does if its option `gradient` is not 0.
        trusts: which of its options is the first point of the grid whose rewards it is to trust; the engine fills it in
            with what is known of the model (`rollflow.models.Traits`).
        holds: `holds(nfe, steps, options)` is the most particles that it holds at any time: those that it may still
            draw from or return, and those that it still refers to. While it waits for draws their children count as
            they come, but for those that a draw's `keep` lets go. Where one of several draws of a turn has `until`, or
            some are guided and others not, all their children count. A request waits until the engine has as many
            slots free; with too few it ends in an error. By default `nfe`, which is always enough.
        parents: `parents(nfe, steps, options)` is the most particles, samples of the prior aside, that it draws from
            after they were one of several children of a draw: with `Request.cache` so many evaluations are kept back,
            one for each. Methods that do not say have no cache.

    Raises:
        RequestError: `trusts` names no option of the function.
    """

    def declare(function: Function) -> Function:
        if trusts is not None and trusts not in option_names(function):
            raise RequestError(f"trusts={trusts!r}: {function!r} has no such option")
        declared = Declaration(branches, guided or _by_its_gradient, trusts, holds or _whole_budget, parents)
        setattr(function, _ATTRIBUTE, declared)
        return function

    return declare


def declaration(function: Any) -> Declaration:
    """What a function declared, or what holds for any that declares nothing."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Declaration) else Declaration()


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function; they are looked up at every request, and kept as long as the function."""
    try:
        if function not in _PARAMETERS:
            _PARAMETERS[function] = inspect.signature(function).parameters
        return _PARAMETERS[function]
    except TypeError:  # of a callable that cannot be hashed or referred to weakly
        return inspect.signature(function).parameters


def option_names(function: Callable[..., Any]) -> list[str]:
    """The names of a function's own options, in order."""
    return [name for name in parameters_of(function) if name not in ENGINES]


def options(function: Callable[..., Any]) -> list[Option]:
    """A function's own options: types and defaults of its signature, and what its docstring says."""
    kinds, entries = typing.get_type_hints(function), _entries(inspect.getdoc(function) or "")
    parameters = parameters_of(function)
    return [
        Option(name, _without_none(kinds.get(name, Any)), parameters[name].default, _sentence(entries.get(name, "")))
        for name in option_names(function)
    ]


def filled_in(function: Callable[..., Any], given: Mapping[str, Any]) -> SimpleNamespace:
    """The options of a call as attributes, defaults included."""
    parameters = parameters_of(function)
    return SimpleNamespace(**{**{name: parameters[name].default for name in option_names(function)}, **given})


def _without_none(kind: Any) -> Any:
    kinds = [one for one in typing.get_args(kind) if one is not type(None)]
    return kinds[0] if len(kinds) == 1 and type(None) in typing.get_args(kind) else kind


def _entries(doc: str) -> dict[str, str]:
    """The entries of a docstring's section `Args`, each as one line."""
    lines = doc.splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Args:") + 1 :] if "Args:" in lines else []:
        if line and not line.startswith(" "):
            break
        head, colon, text = line.strip().partition(": ")
        if colon and head.isidentifier() and not line.startswith("     "):
            name, found[head] = head, text
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return found


def _sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".")
