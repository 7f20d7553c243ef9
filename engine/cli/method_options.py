"""The methods' own options on the command line, made from the catalogue: a new method needs no line here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro

from rollflow import methods
from rollflow.methods import Option

Use = tuple[str, Option]  # a method's name and one of its options


def method_options() -> type:
    """A frozen dataclass with a field for each option that any built-in method has; None leaves it to the method."""
    uses: dict[str, list[Use]] = {}
    for name in methods.names():
        for option in methods.options(name):
            uses.setdefault(option.name, []).append((name, option))
    made = [(name, _annotation(of), field(default=None)) for name, of in sorted(uses.items())]
    return make_dataclass("MethodOptions", made, frozen=True, namespace={"__doc__": "The methods' own options."})


def _annotation(uses: Sequence[Use]) -> Any:
    kinds = {option.kind: None for _, option in uses}
    kind = reduce(or_, kinds, type(None))
    told = tyro.conf.arg(help=_help(uses), help_behavior_hint=_default(uses))
    return Annotated[kind, told]


def _help(uses: Sequence[Use]) -> str:
    """Which methods have an option, and what it is to them."""
    meanings: dict[str, list[str]] = {}
    for name, option in uses:
        meanings.setdefault(option.help, []).append(name)
    return "; ".join(f"{', '.join(names)}: {meaning}" for meaning, names in meanings.items()) + "."


def _default(uses: Sequence[Use]) -> str:
    """What it is where it is not given."""
    defaults: dict[str, list[str]] = {}
    for name, option in uses:
        usual = "the method's own choice" if option.default is None else str(option.default)
        usual = "what is known of the model" if methods.trusts(name) == option.name else usual
        defaults.setdefault(usual, []).append(name)
    if len(defaults) == 1:
        return f"(default: {next(iter(defaults))})"
    return f"(default: {', '.join(f'{usual} for ' + ' and '.join(names) for usual, names in defaults.items())})"
