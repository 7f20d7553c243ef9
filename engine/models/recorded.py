"""Records a network's operations once, with `torch.jit.trace`, so that a CPU runs them without Python in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Any]  # that gives a tensor, or a tuple of them


class _Recordable(nn.Module):
    """A function as a module that owns its network: a recorded function would keep the weights for ever."""

    def __init__(self, function: Function, network: nn.Module):
        super().__init__()
        self.network, self._function = network, function

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(*inputs)


def traced(
    function: Function, network: nn.Module, example: tuple[Tensor, ...], other: tuple[Tensor, ...], what: str,
    further: Sequence[tuple[Tensor, ...]] = (),
) -> Function:  # fmt: skip
    """`function`, recorded once (`torch.jit.trace`) and run by torch's own interpreter.

    Between two operations of a small network, Python costs as much as the operation, and two threads that run the same
    network wait for each other's turn at the interpreter: recorded, they do not. The operations are the same, and so
    are the bits. What the recording holds of the networks are their tensors: change them in place or not at all.

    Args:
        network: the module whose weights it uses.
        function: of tensors alone, whose course does not depend on their values nor on the number of rows.
        example: what it is recorded with.
        other: arguments with another number of rows, and other values where a course could depend on them, on which
            the recording must agree with the function.
        what: a name for the warning.
        further: more such arguments, of a function that somebody else wrote.

    Returns:
        The recording, or with a warning `function` itself where it cannot be recorded for all numbers of rows.
    """
    with torch.no_grad():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the tracer warns of each shape that it takes for a constant
                recorded = partial(_run, torch.jit.trace(_Recordable(function, network), example, check_trace=False))
        except RuntimeError as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        else:
            if _agree(recorded, function, (example, other, *further)):
                return recorded
            reason = "the recording computes something else for another number of rows"
    warnings.warn(
        f"the {what} runs with Python between its operations ({reason}), which makes small batches slower",
        RuntimeWarning,
        stacklevel=2,
    )
    return function


def _agree(recorded: Function, function: Function, examples: Sequence[tuple[Tensor, ...]]) -> bool:
    try:
        return all(_equal(recorded(*inputs), function(*inputs)) for inputs in examples)
    except RuntimeError:  # of an operation that was recorded with the number of rows
        return False


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return all(map(_equal, one, other))
    return torch.equal(one, other)


def _run(recorded: Function, *inputs: Tensor) -> Any:
    # The optimiser would look at every new batch size, and changes nothing.
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        return recorded(*inputs)
