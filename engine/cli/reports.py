"""Prints what `probe`, `plan` and `models` found, as tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rollflow.cli.learned import Described
from rollflow.models import BUILT_IN, traits
from rollflow.models.known import KNOWN
from rollflow.models.tested import HOW, TESTED

WIDTH = 120  # where standard output is no terminal
SHOWN = 8  # numbers of a list
SOURCES = "of diffusers and of their cards, see rollflow.models.known; none of them was run here"
TERMS = (
    "guidance: u + s (c - u) where it takes s > 1, c + s (c - u) where s > 0, of c with the prompt and u without; "
    "norms: each vector keeps its length in c; embedded: an argument of the network\n"
    "texts: fixed, all reach the network at one length; padded, to the longest of a batch, and masked; "
    "grouped, each length in calls of its own; listed, as they are"
)
OPERATIONS = "counted: matrix products, convolutions, attention"
KINDS = {
    "state": "the state",
    "time": "the time",
    "scale": "the guidance scale",
    "rows": "of each row",
    "shared": "the same for all rows",
}


def print_probe(found: Described) -> None:
    """What was learned of a pipeline, argument by argument, or how far it got."""
    console = _console()
    networks = f", its network a {' and a '.join(found['networks'])}" if "networks" in found else ""
    console.print(f"{found['pipeline']} with a {found['scheduler']}{networks}", highlight=False)
    if "arguments" in found:
        console.print(_arguments(found["arguments"]))
    facts = _facts(found)
    if facts:
        console.print(_pairs("", "what was learned", facts))
    if found["refused"]:
        console.print(f"refused; {found['reached']}:\n{found['refused']}", highlight=False, markup=False)


def _arguments(arguments: Sequence[Described]) -> Table:
    table = Table(box=SIMPLE_HEAD, caption="of a text's own arguments the shape of one row; t is the scheduler's time")
    for name in ("argument", "what it is", "rows", "with the text", "value"):
        table.add_column(name, overflow="fold")
    for one in arguments:
        kind, value = KINDS[one["kind"]], one["value"]
        if "slope" in one:
            kind += f": {_affine(one['slope'], one['offset'], 't' if one['kind'] == 'time' else 's')}"
        if "first" in one:
            kind += f", at {one['first']} along dimension {one['dimension']}, among constants"
        if "masks" in one:
            kind += f": where {one['masks']} is text and no padding; None in the pipeline's calls of one text"
        rows = "-" if one["rows"] is None else "a list" if one["rows"] == "list" else f"dimension {one['rows']}"
        table.add_row(one["name"], kind, rows, "varies" if one["varies"] else "", value)
    return table


def _affine(slope: float, offset: float, name: str) -> str:
    """As a reader would write it: `1 - t / 1000`."""
    if slope == 0:
        return f"{offset:g}"
    size = abs(slope)
    inverse = round(1 / size, 6)
    term = (
        name if size == 1 else f"{name} / {inverse:g}" if size < 1 and inverse == round(inverse) else f"{size:g} {name}"
    )
    if not offset:
        return term if slope > 0 else f"-{term}"
    return f"{offset:g} {'+' if slope > 0 else '-'} {term}"


def _facts(found: Described) -> list[tuple[str, str]]:
    """Everything but the arguments, as names and sentences."""
    facts: list[tuple[str, str]] = []
    if "size" in found:
        size = found["size"]
        clip = "" if size["frames"] is None else f", {size['frames']} frames"
        facts.append(("size", f"{size['height']}x{size['width']}{clip}"))
    if "evaluation" in found:
        one = found["evaluation"]
        each = f"{one['calls']} call{'s' * (one['calls'] > 1)} of the network, of {one['rows']} row"
        guided = ", with guidance" if "formula" in found.get("guidance", {}) else ""
        facts.append(("an evaluation", f"{each}{'s' * (one['rows'] > 1)}{guided}"))
        sign = "the velocity" if one["sign"] > 0 else "minus the velocity: the pipeline negates it"
        facts.append(("output", f"{one['output']}; {sign}"))
    if "guidance" in found:
        facts += _guidance(found["guidance"])
    if "text" in found:
        facts.append(("texts of other lengths", _text(found["text"])))
    if "latents" in found:
        facts += _latents(found["latents"])
    if found.get("second_network_below") is not None:
        facts.append(("second network", f"at times below t = {found['second_network_below']:g}"))
    if "times" in found:
        times = [f"{time:.4f}" for time in found["times"]]
        facts.append((f"its own {len(times)} linear times", _listed(times)))
    for name, error in found.get("errors", {}).items():
        pixels = name == "pixels"
        unit = "differ by at most, of 1" if pixels else "relative to the pipeline's own, at other times and prompts"
        facts.append((f"check: {name if pixels else f'velocity, {name}'}", f"{error:.1e} ({unit})"))
    return facts


def _guidance(one: Described) -> list[tuple[str, str]]:
    kind = one["kind"] if one["kind"] == "none" else f"{one['kind']}, by default at scale {one['default']:g}"
    if "formula" not in one:
        return [("guidance", kind)]
    above = one["two_rows_above"]
    where = "at every scale but that which changes nothing" if above is None else f"at scales above {above:g}"
    return [
        ("guidance", kind),
        ("", f"{one['formula']}; c with the prompt, u without it"),
        ("", f"two rows of the network an evaluation {where}, in the pipeline's own loop in {one['in']}"),
    ]


def _text(one: Described) -> str:
    names = ", ".join(one["arguments"])
    return {
        "fixed": "none: every text has the same length",
        "listed": f"each as long as it is, in a list ({names})",
        "padded": f"padded to the longest of a batch, and masked ({names})",
        "grouped": f"batches of their own, for nothing masks a padding ({names})",
    }[one["lengths"]]


def _latents(one: Described) -> list[tuple[str, str]]:
    order = "in the same order" if one["order"] == "same" else "moved to other places"
    return [
        ("state", f"{one['state']}; decoded is {one['decoded']}, its elements {order}"),
        ("", f"decoded = offset + scale state, scale {_number(one['scale'])}"),
        ("", f"offset {_number(one['offset'])}"),
    ]


def _number(value: float | list[float] | str) -> str:
    if isinstance(value, list):
        return f"by channel: {_listed([f'{one:.4g}' for one in value])}"
    return value if isinstance(value, str) else f"{value:.6g}"


def _listed(values: Sequence[str]) -> str:
    if len(values) <= SHOWN:
        return " ".join(values)
    return " ".join([*values[: SHOWN - 2], "...", *values[-2:]])


def print_plan(found: Described) -> None:
    """What a model takes of a device, and how each figure is known."""
    console, share = _console(), f"{100 * found['share']:.0f} %"
    size = f", {found['size']}" if "size" in found else ""
    table = Table(box=SIMPLE_HEAD, title=f"{found['pipeline']} on {found['device']} in {found['dtype']}{size}")
    for name in ("", "", "how it is known"):
        table.add_column(name, justify="right" if len(table.columns) == 1 else "left", overflow="fold")
    for name, size in found["parts"].items():
        table.add_row(name, memory(size), "counted: parameters and buffers")
    table.add_row("all parts", memory(found["resident"]), "their sum")
    table.add_row("free before", memory(found["free"]), f"asked of the system; {share} of it is counted on")
    if "slot" in found:
        _add_batches(table, found)
    console.print(table)
    if not found["fits"]:
        console.print(f"it does not fit into {share} of what is free", highlight=False)


def _add_batches(table: Table, found: Described) -> None:
    state = "x".join(map(str, found["state"]))
    table.add_row("a particle", memory(found["slot"]), f"counted: state and velocity of {state}, in float32")
    table.add_row(f"pool of {found['slots']}", memory(found["pool"]), "counted: what an engine reserves for this size")
    for part, name in (("forward", "evaluation"), ("decode", "decode")):
        cost = found[part]
        table.add_row(
            f"{name}: a row", memory(cost["row"]), "measured: what a second row adds to the tensors alive at once"
        )
        table.add_row(f"{name}: operations", f"{cost['flops'] / 1e9:.4g} GFLOP", OPERATIONS)
        table.add_row(f"{name}: one row", f"{1000 * cost['seconds']:.4g} ms", "measured, once warm")
    for name, cost in found["rewards"].items():
        table.add_row(f"{name}: networks", memory(cost["resident"]), "counted: those on this device")
        table.add_row(f"{name}: a call", memory(cost["call"]), f"measured: of {cost['batch']} images, its largest")
        table.add_row(f"{name}: one image", f"{1000 * cost['seconds']:.4g} ms", "measured, once warm")
    largest = found["largest"]
    lanes = f"{found['lanes']} batch{'es' * (found['lanes'] > 1)} at a time"
    if largest is not None:
        need = memory(found["batches"][largest])
        limit = {
            "engine": "bound by the engine, whose batches are no larger by default; memory has room for it",
            "memory": "bound by memory: the next larger batch does not fit",
        }[found["limit"]]
        rule = f"{limit} (estimated: {need} each, {lanes}, with all the above within what is counted on)"
        table.add_row("largest batch", f"{largest} rows", rule)
    table.add_row(
        "matrix product", f"{found['flops_per_second'] / 1e9:.4g} GFLOP/s", "measured: a large one, in this dtype"
    )
    bound = "a lower bound from FLOPs, no forecast: operations over that rate"
    table.add_row("an NFE, at least", f"{1000 * found['least_seconds_an_nfe']:.4g} ms", bound)
    table.add_row("... with its decode", f"{1000 * found['least_seconds_a_judged_nfe']:.4g} ms", bound)
    rows = found["network_rows"]
    table.caption = f"at guidance {found['guidance']:g}: {rows} row{'s' * (rows > 1)} of the network an evaluation"


def print_models() -> None:
    """The built-in models, and the families that are tested."""
    console = _console()
    table = Table(box=SIMPLE_HEAD, title="built in")
    for column in ("model", "steps", "rewards are trusted from"):
        table.add_column(column)
    for name in BUILT_IN:
        known = traits(name)
        table.add_row(name, str(known.steps), f"linear time {known.trusted_from:g}")
    console.print(table)
    table = Table(box=SIMPLE_HEAD, title="families of diffusers", caption=f"{HOW}\n{TERMS}")
    for column in ("pipeline", "makes", "guidance", "texts of other lengths", ""):
        table.add_column(column, overflow="fold")
    for one in TESTED:
        table.add_row(one.name, one.kind, one.guidance, one.texts, one.note)
    console.print(table)
    table = Table(box=SIMPLE_HEAD, title="checkpoints whose usual steps are known", caption=SOURCES)
    for column in ("hub id", "pipeline", "steps", "guidance", "shift"):
        table.add_column(column, overflow="fold")
    for name, checkpoint in KNOWN.items():
        usual = checkpoint.traits
        optional = ("-" if one is None else f"{one:g}" for one in (usual.guidance, usual.shift))
        table.add_row(name, checkpoint.pipeline, str(usual.steps), *optional)
    console.print(table)


def memory(size: int) -> str:
    """Bytes, in the unit that suits them."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.4g} {unit}"
    return f"{size} B"


def _pairs(name: str, value: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(name, no_wrap=True)
    table.add_column(value, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _console() -> Console:
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH)
