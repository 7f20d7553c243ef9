"""Learns from a pipeline's own code how it calls its transformer: which argument is what, and what follows.

Runs that differ in one thing alone (state, time, scale, number of rows) are compared, argument by argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rollflow.errors import ModelError
from rollflow.models.pipeline.drive import Call, Driver, Evaluation, Recording, Script
from rollflow.models.pipeline.tree import Path, named, same
from rollflow.models.rule import NORMS, Rule
from rollflow.models.text import Size, Text

Kind = Literal["state", "time", "scale", "rows", "shared"]
LIST = -1  # in place of a dimension: a list with an entry a row
SCALES = (3.0, 5.0)
TIMES = (0.97, 0.93)  # as parts of the scheduler's, both of one expert where there are two
EXACT = 1e-4  # relative to the largest element


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


class Part(NamedTuple):
    """One block of network rows: which call of an evaluation, and which block of its rows."""

    call: int
    block: int


@dataclass(frozen=True)
class Learned:
    """How a pipeline evaluates its network.

    Attributes:
        arguments: of its calls, by path.
        shape: of a state, a row of it.
        conditional: the block of network rows that follows the prompt.
        unconditional: the one that does not; None without classifier-free guidance.
        sign: the pipeline's velocity is `sign` times that of the network.
        rule: how guidance combines them.
        view: how the network's output becomes a state, see `views`.
        like: a call's arguments, as recorded.
        real: a call, with what the network itself gave.
        rows: network rows of a call for one state.
        calls: calls of an evaluation.
        embedded: whether a scale is an argument of the network.
    """

    arguments: tuple[Argument, ...]
    shape: tuple[int, ...]
    conditional: Part
    unconditional: Part | None
    sign: float
    rule: Rule
    view: str
    like: dict[str, Any]
    real: Call
    rows: int
    calls: int
    embedded: bool


def learn(driver: Driver, size: Size, texts: Sequence[Text], trainings: int) -> Learned:
    """Learns from a few runs.

    Args:
        driver: of the pipeline.
        size: of the images.
        texts: two prompts of different lengths.
        trainings: the scheduler's number of training times.

    Raises:
        ModelError: the pipeline does something that no rule here describes; it says what.
    """
    times = [trainings * time for time in (TIMES[0], TIMES[0], TIMES[0], TIMES[1])]
    one, other = texts
    real = driver.run([one], size, SCALES[0], Script(times, calls=1)).calls[0]
    outputs = random_outputs(real)

    def run(asked: Sequence[Text], scale: float | None = SCALES[0]) -> Recording:
        generator = torch.Generator().manual_seed(1)
        script = Script(times, lambda i, x: _normal(x, generator) if i < 2 else x, outputs)
        return driver.run(asked, size, scale, script)

    alone = run([one])
    together, scaled, reworded = run([one, one]), run([one], SCALES[1]), run([other])
    moved, still = alone.evaluations[1:3], alone.evaluations[2:4]
    calls = len(moved[0].calls)
    _check_calls([*moved, *still, together.evaluations[1], scaled.evaluations[1], reworded.evaluations[1]], calls)
    found = [
        [*_arguments(i, alone.evaluations, together.evaluations, scaled.evaluations, reworded.evaluations, trainings)]
        for i in range(calls)
    ]
    arguments = _merged(found)
    states = [argument for argument in arguments if argument.kind == "state"]
    if len(states) != 1:
        raise ModelError(f"{_name(driver)}: {len(states)} arguments of its network are the state, there must be one")
    if not any(argument.kind == "time" for argument in arguments):
        raise ModelError(f"{_name(driver)}: no argument of its network depends on the time")
    first = moved[0].calls[0]
    rows = count(leaf(first.arguments, states[0].path), states[0].dim)
    learned = Learned(
        tuple(arguments), tuple(moved[0].sample.shape[1:]), Part(0, 0), None, 1.0, Rule(), "same", first.arguments,
        real, rows, calls, any(argument.kind == "scale" for argument in arguments),
    )  # fmt: skip
    return _with_rule(driver, size, one, learned, times[0])


def _arguments(
    i: int, alone: Sequence[Evaluation], together: Sequence[Evaluation], scaled: Sequence[Evaluation],
    reworded: Sequence[Evaluation], trainings: int,
) -> Iterator[Argument]:  # fmt: skip
    """What each argument of call `i` is."""
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
            yield replace(argument, kind="time", **_affine(path, pairs))
        elif not same(value, leaf(scaled[1].calls[i].arguments, path)):
            pairs = list(zip(SCALES, (value, leaf(scaled[1].calls[i].arguments, path)), strict=True))
            yield replace(argument, kind="scale", **_affine(path, pairs))
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
    return 1 if dim is None else len(value) if dim == LIST else value.shape[dim]


def leaf(arguments: Any, path: Path) -> Any:
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


def _affine(path: Path, pairs: Sequence[tuple[float, Any]]) -> dict[str, float]:
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
    return {"slope": slope, "offset": float(nearest) if abs(offset - nearest) < 1e-3 * (1 + abs(x[1])) else offset}


def _merged(found: Sequence[Sequence[Argument]]) -> list[Argument]:
    """What all calls of an evaluation have in common: the same arguments, which are the same things."""
    merged = {argument.path: argument for argument in found[0]}
    for others in found[1:]:
        if {argument.path for argument in others} != merged.keys():
            raise ModelError("the calls of the network with and without the prompt have different arguments")
        for argument in others:
            before = merged[argument.path]
            if replace(argument, varies=before.varies) != before:
                raise ModelError(f"the argument {named(argument.path)} of the network is not the same in every call")
            merged[argument.path] = replace(before, varies=before.varies or argument.varies)
    return [*merged.values()]


def _check_calls(evaluations: Sequence[Evaluation], calls: int) -> None:
    for evaluation in evaluations:
        if len(evaluation.calls) != calls or not calls:
            raise ModelError(
                f"the network is called {len(evaluation.calls)} times in one evaluation and {calls} in another"
            )


# What follows from the network's outputs.


def first(output: Any) -> Any:
    """The tensor, or the list of them, that a network gives."""
    if hasattr(output, "sample"):
        return output.sample
    return output[0] if isinstance(output, tuple) else output


def rows_of(output: Any) -> Tensor:
    """The same, with a row for each row of the call."""
    given = first(output)
    return torch.stack(list(given)) if isinstance(given, list | tuple) else given


def views(output: Tensor, shape: Sequence[int]) -> Iterator[str]:
    """Ways in which an output's rows can be states of a shape: the same, folded, or a part of them."""
    rows = output.shape[1:]
    if tuple(rows) == tuple(shape):
        yield "same"
    elif output[0].numel() == torch.Size(shape).numel():
        yield "folded"
    elif len(rows) == len(shape):
        longer = [dim for dim in range(len(rows)) if rows[dim] != shape[dim]]
        if len(longer) == 1 and rows[longer[0]] > shape[longer[0]]:
            yield f"first {longer[0]}"
            yield f"last {longer[0]}"


def viewed(output: Tensor, shape: Sequence[int], view: str) -> Tensor:
    """An output as states."""
    if view == "same":
        return output
    if view == "folded":
        return output.reshape(len(output), *shape)
    end, dim = view.split()
    along = int(dim)
    size = shape[along]
    return output.narrow(along + 1, 0 if end == "first" else output.shape[along + 1] - size, size)


def random_outputs(real: Call, seed: int = 7) -> Callable[[Call], Any]:
    """Gives outputs of the kind that a real call gave, for as many rows as a call has, with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    before, given = len(rows_of(real.output)), _entries(real)

    def output(call: Call) -> Any:
        return _like(real.output, before * _entries(call) // given, generator)

    return output


def _entries(call: Call) -> int:
    """The length of a call's first argument, which grows with its rows."""
    return len(next(iter(call.arguments.values())))


def _like(output: Any, rows: int, generator: torch.Generator) -> Any:
    if isinstance(output, Tensor):
        return _normal(output[:1].expand(rows, *output.shape[1:]), generator)
    if isinstance(output, list):
        return [_normal(output[0], generator) for _ in range(rows)]
    if type(output) is tuple:
        return tuple(_like(one, rows, generator) for one in output)
    if hasattr(output, "sample") and hasattr(output, "keys"):
        return type(output)(**{key: _like(output[key], rows, generator) for key in output})
    return output


def _with_rule(driver: Driver, size: Size, text: Text, learned: Learned, time: float) -> Learned:
    """Adds how the pipeline makes a velocity of what its network gives: random outputs go through its own code."""
    steps, outputs = 12, random_outputs(learned.real)

    def run(scale: float | None) -> list[Evaluation]:
        return driver.run([text], size, scale, Script([time] * steps, None, outputs)).evaluations

    known = {scale: run(scale) for scale in SCALES}
    tried = 0
    blocks = _blocks(known[SCALES[0]][0])
    for view in views(rows_of(known[SCALES[0]][0].calls[0].output), learned.shape):
        for candidate in _candidates(learned, blocks, view):
            tried += 1
            if all(_fits(candidate, e, scale) for scale in SCALES for e in known[scale][:2]):
                _check_steps(driver, candidate, known)
                return _with_threshold(candidate, run)
    raise ModelError(
        f"{_name(driver)}: what it makes of the outputs of its network ({len(blocks)} a state) is none of the {tried} "
        "known forms of guidance (rescaled, projected or momentum guidance is refused)"
    )


def _blocks(evaluation: Evaluation) -> list[Part]:
    """The network's rows of one state, as blocks."""
    rows = len(evaluation.sample)
    return [
        Part(i, j) for i, call in enumerate(evaluation.calls) for j in range(len(rows_of(call.output)) // max(1, rows))
    ]


def _candidates(learned: Learned, parts: Sequence[Part], view: str) -> Iterator[Learned]:
    for sign in (1.0, -1.0):
        if len(parts) == 1:
            yield replace(learned, conditional=parts[0], unconditional=None, sign=sign, view=view)
        elif len(parts) == 2:
            for c, u in (parts, parts[::-1]):
                for base in ("without", "with"):
                    for norm in NORMS:
                        yield replace(
                            learned, conditional=c, unconditional=u, sign=sign, view=view, rule=Rule(base, norm)
                        )


def _fits(candidate: Learned, evaluation: Evaluation, scale: float) -> bool:
    """Whether a rule gives what the pipeline gave to its scheduler."""

    def block(part: Part) -> Tensor:
        output = viewed(rows_of(evaluation.calls[part.call].output), candidate.shape, candidate.view)
        rows = len(evaluation.sample)
        return output[part.block * rows : (part.block + 1) * rows].float()

    velocity = block(candidate.conditional)
    if candidate.unconditional is not None:
        scales = torch.full((len(velocity),), scale, device=velocity.device)
        velocity = candidate.rule.guided(velocity, block(candidate.unconditional), scales)
    velocity, wanted = candidate.sign * velocity, evaluation.velocity.float()
    tolerance = EXACT if evaluation.velocity.dtype == torch.float32 else 3e-2
    return velocity.shape == wanted.shape and bool(
        (velocity - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())
    )


def _check_steps(driver: Driver, candidate: Learned, known: dict[float, list[Evaluation]]) -> None:
    """Guidance must be the same at every step: rows of an engine are at steps of their own."""
    for scale, evaluations in known.items():
        for i, evaluation in enumerate(evaluations):
            if not _fits(candidate, evaluation, scale):
                raise ModelError(
                    f"{_name(driver)}: its guidance changes at step {i} of {len(evaluations)}: what depends on the "
                    "step's number or on earlier steps is refused; switch that off (or give the pipeline another "
                    "guider)"
                )


def _with_threshold(learned: Learned, run: Callable[[float], list[Evaluation]]) -> Learned:
    """Adds from which scale on the pipeline guides at all."""
    if learned.unconditional is None:
        return learned
    above = next((scale for scale in (1.0, 0.0) if len(_blocks(run(scale)[0])) == 1), -math.inf)
    return replace(learned, rule=replace(learned.rule, above=above))


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x)


def _name(driver: Driver) -> str:
    return type(driver.pipeline).__name__
