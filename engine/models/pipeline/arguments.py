"""What each argument of a pipeline's network is: runs that differ in one thing alone are compared, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from rollflow.errors import ModelError
from rollflow.models.pipeline.drive import SCALES
from rollflow.models.pipeline.recording import Evaluation
from rollflow.models.pipeline.tree import Path, named, same

Kind = Literal["state", "time", "scale", "rows", "shared"]
LIST = -1  # in place of a dimension: a list with an entry a row


@dataclass(frozen=True)
class Argument:
    """What an argument of the transformer is.

    Attributes:
        path: where it is among the arguments.
        kind: the state; a time; a guidance scale; something of each row; or the same for all rows.
        dim: along which dimension rows lie, or `LIST`; None for what has no rows.
        place: of a state: the dimension and the offset at which it lies among constants, or None.
        slope, offset: of times and scales: the argument is `slope value + offset`.
        varies: whether it depends on the prompt.
    """

    path: Path
    kind: Kind
    dim: int | None = None
    place: tuple[int, int] | None = None
    slope: float = 0.0
    offset: float = 0.0
    varies: bool = False


def arguments_of(
    i: int, alone: Sequence[Evaluation], together: Sequence[Evaluation], scaled: Sequence[Evaluation],
    reworded: Sequence[Evaluation],
) -> Iterator[Argument]:  # fmt: skip
    """What each argument of call `i` of an evaluation is.

    Args:
        i: the call.
        alone: evaluations 1 to 3 are at one time with two states, and then at another time with the second.
        together: the same with two rows of the same prompt.
        scaled: the same with another guidance scale.
        reworded: the same with another prompt.

    Raises:
        ModelError: an argument is none of those that `Kind` lists.
    """
    here, there, later = (alone[k].calls[i].arguments for k in (1, 2, 3))
    for path, value, double in _pairs(here, together[1].calls[i].arguments):
        moved = not same(value, leaf(there, path))
        timed = not same(leaf(there, path), leaf(later, path))
        argument = Argument(path, "shared", _dimension(path, value, double))
        if moved and timed:
            raise ModelError(f"the argument {named(path)} of the network depends on state and time at once")
        if moved:
            place = _place(path, row_of(value, argument.dim, 0), alone[1].sample[0])
            yield replace(argument, kind="state", place=place)
        elif timed:
            pairs = [(alone[k].time, leaf(alone[k].calls[i].arguments, path)) for k in (2, 3)]
            slope, offset = _affine(path, pairs)
            yield replace(argument, kind="time", slope=slope, offset=offset)
        elif not same(value, leaf(scaled[1].calls[i].arguments, path)):
            pairs = list(zip(SCALES, (value, leaf(scaled[1].calls[i].arguments, path)), strict=True))
            slope, offset = _affine(path, pairs)
            yield replace(argument, kind="scale", slope=slope, offset=offset)
        else:
            varies = not same(value, leaf(reworded[1].calls[i].arguments, path))
            yield replace(argument, kind="shared" if argument.dim is None else "rows", varies=varies)


def _pairs(one: Any, two: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """Leaves of the arguments for one row and for two; a list that is twice as long is a leaf, with an entry a row."""
    if type(one) is dict and type(two) is dict and one.keys() == two.keys():
        for key in one:
            yield from _pairs(one[key], two[key], (*path, key))
    elif type(one) in (list, tuple) and type(one) is type(two):
        if len(one) and len(two) == 2 * len(one):
            yield path, one, two
        elif len(one) == len(two):
            for i, (a, b) in enumerate(zip(one, two, strict=True)):
                yield from _pairs(a, b, (*path, i))
        else:
            raise ModelError(f"the argument {named(path)} of the network has {len(two)} entries for two rows")
    else:
        yield path, one, two


def _dimension(path: Path, one: Any, two: Any) -> int | None:
    """Along which dimension rows lie."""
    if type(one) in (list, tuple):
        return LIST
    if not isinstance(one, Tensor):
        if not same(one, two):
            raise ModelError(f"the argument {named(path)} of the network changes with the number of rows")
        return None
    if one.ndim == two.ndim:
        grown = [dim for dim, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
        if not grown and same(one, two):
            return None
        if len(grown) == 1 and two.shape[grown[0]] == 2 * one.shape[grown[0]]:
            return grown[0]
    raise ModelError(
        f"the argument {named(path)} of the network has shape {list(one.shape)} for one row and {list(two.shape)} for "
        "two, or other values"
    )


def row_of(value: Any, dim: int | None, j: int) -> Any:
    """Row `j` of an argument; of a tensor without the dimension."""
    if dim is None:
        return value
    return value[j] if dim == LIST else value.select(dim, j)


def count(value: Any, dim: int | None) -> int:
    """How many rows an argument has."""
    return 1 if dim is None else len(value) if dim == LIST else value.shape[dim]


def leaf(arguments: Any, path: Path) -> Any:
    """What lies at a path of nested arguments; raises `ModelError` where nothing does."""
    try:
        for part in path:
            arguments = arguments[part]
    except (KeyError, IndexError, TypeError) as error:
        raise ModelError(f"the argument {named(path)} of the network is not there in every call") from error
    return arguments


def _place(path: Path, given: Tensor, state: Tensor) -> tuple[int, int] | None:
    """Where a state lies in an argument: the dimension and the offset among constants; None where it is all of it."""
    state = state.to(given.dtype)
    if given.numel() == state.numel() and torch.equal(given.reshape(-1), state.reshape(-1)):
        return None
    if given.ndim == state.ndim:
        longer = [dim for dim in range(given.ndim) if given.shape[dim] > state.shape[dim]]
        if len(longer) == 1 and given.numel() // given.shape[longer[0]] == state.numel() // state.shape[longer[0]]:
            (dim,) = longer
            for offset in range(given.shape[dim] - state.shape[dim] + 1):
                if torch.equal(given.narrow(dim, offset, state.shape[dim]), state):
                    return dim, offset
    raise ModelError(
        f"the argument {named(path)} of the network, of shape {list(given.shape)}, is made of the state, of shape "
        f"{list(state.shape)}, in a way that is not known"
    )


def _affine(path: Path, pairs: Sequence[tuple[float, Any]]) -> tuple[float, float]:
    """Slope and offset of an argument that follows a number."""
    numbers = []
    for at, value in pairs:
        given = torch.as_tensor(value, dtype=torch.float64)
        if given.numel() == 0 or not torch.all(given == given.reshape(-1)[0]):
            raise ModelError(f"the argument {named(path)} of the network depends on a number, and differs along itself")
        numbers.append((at, float(given.reshape(-1)[0])))
    ((x, y),) = pairwise(numbers)
    slope = (y[1] - x[1]) / (y[0] - x[0])
    for nice in (1.0, 0.001, -0.001, 1000.0, -1.0):  # what was meant, where rounding hides it
        if abs(slope / nice - 1) < 1e-3:
            slope = nice
    offset = x[1] - slope * x[0]
    nearest = round(offset)
    return slope, float(nearest) if abs(offset - nearest) < 1e-3 * (1 + abs(x[1])) else offset


def merged(found: Sequence[Sequence[Argument]]) -> list[Argument]:
    """What all calls of an evaluation have in common: the same arguments, which are the same things."""
    common = {argument.path: argument for argument in found[0]}
    for others in found[1:]:
        if {argument.path for argument in others} != common.keys():
            raise ModelError("the calls of the network with and without the prompt have different arguments")
        for argument in others:
            before = common[argument.path]
            if replace(argument, varies=before.varies) != before:
                raise ModelError(f"the argument {named(argument.path)} of the network is not the same in every call")
            common[argument.path] = replace(before, varies=before.varies or argument.varies)
    return [*common.values()]
