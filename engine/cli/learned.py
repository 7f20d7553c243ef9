"""What was learned of a pipeline, as plain values: for a table, and for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rollflow.models import Geometry
from rollflow.models.pipeline.arguments import LIST, leaf
from rollflow.models.pipeline.tree import Path, named
from rollflow.models.rule import Rule

Described = dict[str, Any]
FORMULAS = {"without": "v = u + s (c - u)", "with": "v = c + s (c - u)"}
NORMS = {
    "none": "",
    "token": ", each vector along the last dimension brought to the length that c has there",
    "token at most": ", each vector along the last dimension shortened to the length that c has there, if it is longer",
}


def calls(learned: Any, known: Mapping[Path, Any] | None = None, masks: Mapping[Path, Path] | None = None) -> Described:
    """How the network is called: its arguments, and what becomes of its outputs.

    Args:
        learned: a `rollflow.models.pipeline.learn.Learned`.
        known: the arguments of a text's own row, whose shapes are told.
        masks: the arguments that the pipeline leaves out of a text alone, and the texts' arguments that they mask.
    """
    return {
        "arguments": [_argument(one, learned.like, known or {}, masks or {}) for one in learned.arguments],
        "evaluation": {
            "calls": learned.calls,
            "rows": 1 + max(learned.conditional.block, learned.unconditional.block if learned.unconditional else 0),
            "output": {"same": "a state", "folded": "a state in another shape"}.get(learned.view, learned.view),
            "sign": learned.sign,
        },
        "state": [*learned.shape],
    }


def guidance(learned: Any, default: float) -> Described:
    """How guidance combines the network's outputs, with the scale that requests have that name none."""
    rule: Rule = learned.rule
    kinds = []
    if learned.unconditional is not None:
        kinds.append("classifier-free")
    if any(argument.kind == "scale" for argument in learned.arguments):
        kinds.append("embedded")
    found: Described = {"kind": " and ".join(kinds) or "none", "default": default}
    if learned.unconditional is None:
        return found
    above = None if rule.above == -math.inf else rule.above
    return {
        **found,
        "formula": f"{FORMULAS[rule.base]}{NORMS[rule.norm]}",
        "two_rows_above": above,
        "in": "one call" if learned.conditional.call == learned.unconditional.call else "two calls",
    }


def text(replay: Any) -> Described:
    """What happens to texts of different lengths in one batch."""
    ragged = [named(path) for path in (*replay.ragged, *replay.masks)]
    arguments = replay.learned.arguments
    listed = [named(one.path) for one in arguments if one.kind == "rows" and one.varies and one.dim == LIST]
    if listed:
        return {"lengths": "listed", "arguments": listed}
    if not ragged:
        return {"lengths": "fixed", "arguments": []}
    return {"lengths": "grouped" if replay.grouped else "padded", "arguments": ragged}


def latents(decoding: Any, state: Sequence[int]) -> Described:
    """How a state becomes what is decoded: `z = offset + scale x[source]`."""
    return {
        "state": [*state],
        "decoded": [*decoding.shape],
        "order": "same" if decoding.source is None else "moved",
        "scale": _by_channel(decoding.scale, decoding.shape),
        "offset": _by_channel(decoding.offset, decoding.shape),
    }


def size(geometry: Geometry) -> Described:
    """Height and width in pixels, and frames."""
    return {"height": geometry.height, "width": geometry.width, "frames": geometry.frames}


def _argument(one: Any, like: Any, known: Mapping[Path, Any], masks: Mapping[Path, Path]) -> Described:
    found: Described = {"name": named(one.path), "kind": one.kind, "rows": _rows(one.dim), "varies": one.varies}
    if one.path in masks:  # the pipeline's own call, of one text, has none; those of batches have a row for each text
        found |= {"kind": "rows", "rows": 0, "varies": True, "masks": named(masks[one.path])}
    if one.kind in ("time", "scale"):
        found |= {"slope": one.slope, "offset": one.offset}
    if one.kind == "state" and one.place is not None:
        found |= {"dimension": one.place[0], "first": one.place[1]}
    value = known.get(one.path)
    return {**found, "value": _value(leaf(like, one.path) if value is None else value), "own": value is not None}


def _rows(dim: int | None) -> str | int | None:
    return "list" if dim == LIST else dim


def _value(value: Any) -> str:
    """A tensor's dtype and shape; of anything else what it is."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {[*value.shape]}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return str(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def _by_channel(values: Tensor, shape: Sequence[int]) -> float | list[float] | str:
    """One number for all, one for each channel (the first dimension), or the range where elements differ otherwise."""
    flat = values.detach().float().cpu().reshape(-1)
    if len(flat) == 1 or bool((flat == flat[0]).all()):
        return round(float(flat[0]), 6)
    rows = flat.view(shape[0], -1)
    if bool(((rows - rows[:, :1]).abs() < 1e-5).all()):
        return [round(float(one), 6) for one in rows[:, 0]]
    return f"{float(flat.min()):.6g} to {float(flat.max()):.6g}, element by element"
