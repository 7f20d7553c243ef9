"""`rollflow rewards`: what images and clips can be judged by, and what that takes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from rollflow.cli.options import by_default
from rollflow.errors import RequestError

if TYPE_CHECKING:
    from rollflow.request import Request

Name = Annotated[str | None, by_default("all", metavar="NAME")]


@dataclass(frozen=True)
class Rewards:
    """List the rewards: what each measures, and the weights it takes, with revision, licence and size. Or explain one.

    A reward is named as in --reward pickscore, with options as in --reward "vqa:model=FOLDER", and combined as in
    --reward "0.7*vqa + 0.3*aesthetic". `rollflow fetch NAME --to DIR` gets its weights.
    """

    name: Positional[Name] = None
    """A reward, which is to be explained with its options."""

    def __call__(self) -> None:
        """Runs the command."""
        from rollflow import rewards

        if self.name is not None:
            print(explained(self.name))
            return
        made = {name: rewards.make(name) for name in rewards.names()}
        follows = {name: "yes" if rewards.differentiable(one) else "" for name, one in made.items()}
        print_table(
            "rewards",
            ("reward", "what it measures", "gradient", "takes", "here"),
            [
                (name, rewards.measures(one), follows[name], ", ".join(packages(one)), here(one))
                for name, one in made.items()
            ],
            "gradient: methods that follow it can use the reward; takes: packages that pip install 'rollflow[rewards]' "
            "brings; here: these, and its usual weights in a folder, below $ROLLFLOW_MODELS or in the hub's cache",
        )
        print_table(
            "their usual weights",
            ("reward", "hub id", "revision", "licence", "GB", "here"),
            [(name, *row) for name, one in made.items() for row in weights_of(one)],
            "revision: the commit that was seen to work, else the latest; licence: as the authors name it; GB: of the "
            "files that are fetched; -: not known",
        )


def explained(name: str) -> str:
    """What a reward does, and its options with what they are by default.

    Raises:
        RequestError: there is none of this name.
    """
    from rollflow.rewards import catalog

    kind = catalog.kind_of(name)
    text = inspect.getdoc(kind) or ""
    usual = {
        key: parameter.default
        for key, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and key != "self"
    }
    options = [f"  {name}:{key}={'none' if value is None else value}" for key, value in usual.items()]
    listed = "\n".join(["", "Options, with what they are by default:", *options]) if options else "\nIt has no options."
    return f"{name}: {text}\n{listed}"


def packages(reward: Any) -> tuple[str, ...]:
    """What a reward imports, beyond what rollflow itself takes."""
    return getattr(reward, "packages", ())


def here(reward: Any) -> str:
    """Whether a reward with its usual options can be used now, and what it lacks."""
    missing = [package for package in packages(reward) if find_spec(package) is None]
    if missing:
        return f"no {', '.join(missing)}"
    return "yes" if all(row[-1] == "yes" for row in weights_of(reward)) else "no weights"


def weights_of(reward: Any) -> list[tuple[str, ...]]:
    """Hub id, revision, licence, size and whether it is here, of each model that a reward takes."""
    from rollflow.rewards import known, weights

    table = {one.model: one for one in known.WEIGHTS}
    rows = list[tuple[str, ...]]()
    for one in reward.wanted() if hasattr(reward, "wanted") else ():
        entry = table.get(one.model)
        told = ("-", "-") if entry is None else (entry.licence, f"{entry.gigabytes:.3g}")
        there = "yes" if weights.here(*one) is not None else "no"
        rows.append((one.model, one.revision[:12] if one.revision else "latest", *told, there))
    return rows


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], caption: str) -> None:
    """Prints texts as they are."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rollflow.cli.reports import WIDTH

    table = Table(box=SIMPLE_HEAD, title=title, caption=Text(caption))
    for column in columns:
        justify: Any = "right" if column == "GB" else "left"
        table.add_column(column, overflow="fold", justify=justify, no_wrap=column == "id")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH).print(table)


def check_weights(requests: Sequence[Request]) -> None:
    """Looks for the weights of all rewards, before a model is loaded.

    Raises:
        RequestError: some are neither here nor on the hub; it names all.
    """
    from rollflow import rewards
    from rollflow.rewards import weights

    judges = [judge for one in requests for judge in (one.reward, one.held_out) if judge is not None]
    terms = {id(term): term for judge in judges for term in rewards.terms_of(rewards.make(judge))}
    heavy = {term.name: term for term in terms.values() if hasattr(term, "wanted")}
    errors = []
    for term in heavy.values():
        try:
            rewards.check(term, requests[0].prompt)
        except RequestError as error:
            errors.append(error)
    if len(errors) > 1 and (every := weights.all_missing(heavy)) is not None:
        raise every
    if errors:
        raise errors[0]
