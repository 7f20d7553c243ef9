"""What a pipeline's network gives: as rows, as states, and random numbers in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rollflow.models.pipeline.recording import Call


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
        return output.reshape(output.shape[0], *shape)
    end, dim = view.split()
    along = int(dim)
    size = shape[along]
    return output.narrow(along + 1, 0 if end == "first" else output.shape[along + 1] - size, size)


def random_outputs(real: Call, seed: int = 7) -> Callable[[Call], Any]:
    """Gives outputs of the kind that a real call gave, for as many rows as a call has, with random numbers.

    Vectors of different outputs point in similar directions and differ in length, so that guidance lengthens some of
    them and shortens others.
    """
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
        return _similar(output[0], rows, generator)
    if isinstance(output, list):
        return list(_similar(output[0], rows, generator).unbind(0))
    if type(output) is tuple:
        return tuple(_like(one, rows, generator) for one in output)
    if hasattr(output, "sample") and hasattr(output, "keys"):
        return type(output)(**{key: _like(output[key], rows, generator) for key in output})
    return output


def _similar(like: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    common = torch.randn(like.shape, generator=torch.Generator().manual_seed(generator.initial_seed()))
    noise = torch.randn(rows, *like.shape, generator=generator)
    lengths = 0.5 + torch.rand(rows, *like.shape[:-1], 1, generator=generator)
    return (common * lengths + 0.3 * noise).to(like)


def normal(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a tensor's shape, dtype and device."""
    return torch.randn(x.shape, generator=generator).to(x)
