"""Hands a network's time embeddings the exact times, where the network rounds them to 16 bits before.

In bfloat16 the times 901 and 901.2 are the same number, and many networks cast their timestep to the weights' dtype.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rollflow.errors import shown

PROBES = (0.5, 0.125, 0.25)  # parts of the scheduler's span that 16 bits hold, as they hold 1000 times them
Line = tuple[float, float]  # slope and offset of what a module is given, over the time


class ExactTimes:
    """The modules that embed times, and which of their calls take one.

    The modules are found by what they are given. They have hooks only while one of this object's calls runs.
    """

    def __init__(self) -> None:
        self._lines: dict[nn.Module, dict[int, Line]] = {}
        self._own = threading.local()
        self._lock = threading.Lock()
        self._running = 0
        self._hooks: list[Any] = []

    def learn(self, network: nn.Module, call: Callable[[Tensor], Tensor], span: int, device: torch.device) -> None:
        """Finds the modules of a network; leaves those alone that cannot take exact times.

        Args:
            network: the network.
            call: gives its output for times of `PROBES`, a row each.
            span: the scheduler's largest time.
            device: of the times.
        """
        times = torch.tensor(PROBES, device=device) * span
        with torch.no_grad():
            found, before = _lines(network, call, times)
            self._lines.update(found)
            try:
                with self.at(network, times):
                    same = torch.equal(call(times), before)
            except (RuntimeError, TypeError):  # a module that takes 16 bits only
                same = False
        if not same:
            for module in found:
                del self._lines[module]

    @contextmanager
    def at(self, network: nn.Module, time: Float[Tensor, " row"]) -> Iterator[None]:
        """Calls of the network by this thread have these times, until the end."""
        if not self._lines or getattr(network, "_compiled_call_impl", None) is not None:  # which runs no new hooks
            yield
            return
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._hooks = [module.register_forward_pre_hook(self._hand) for module in self._lines]
        self._own.time, self._own.calls = time, {}
        try:
            yield
        finally:
            self._own.time = None
            with self._lock:
                self._running -= 1
                if not self._running:
                    for hook in self._hooks:
                        hook.remove()

    def _hand(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        time = getattr(self._own, "time", None)
        if time is None or not args:
            return None
        call = self._own.calls.get(module, 0)
        self._own.calls[module] = call + 1
        line = self._lines[module].get(call)
        if line is None or args[0].numel() % len(time):
            return None
        exact, rows = time.float() * line[0] + line[1], args[0].reshape(time.shape[0], -1)
        return exact[:, None].expand_as(rows).reshape(args[0].shape), *args[1:]

    def __repr__(self) -> str:
        return f"ExactTimes({shown([type(module).__name__ for module in self._lines])})"


def _lines(
    network: nn.Module, call: Callable[[Tensor], Tensor], times: Tensor
) -> tuple[dict[nn.Module, dict[int, Line]], Tensor]:
    """The innermost modules whose first argument follows the time, call by call; and the network's output."""
    thread, counts = threading.get_ident(), dict[nn.Module, int]()
    found: dict[nn.Module, dict[int, Line]] = {}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != thread:
            return
        counts[module] = counts.get(module, 0) + 1
        line = _line(args[0], times) if args else None
        if line is not None:
            found.setdefault(module, {})[counts[module] - 1] = line

    names = {module: name for name, module in network.named_modules() if name}
    hooks = [module.register_forward_pre_hook(look) for module in names]
    try:
        output = call(times)
    finally:
        for hook in hooks:
            hook.remove()
    outer = {module for module in found if any(names[other].startswith(f"{names[module]}.") for other in found)}
    return {module: lines for module, lines in found.items() if module not in outer}, output


def _line(given: Any, times: Tensor) -> Line | None:
    """Slope and offset of a tensor that has for each row one number, a multiple of the time and a constant."""
    if not isinstance(given, Tensor) or given.is_complex() or not given.numel() or given.numel() % len(times):
        return None
    rows = given.reshape(len(times), -1).double()
    if not bool((rows == rows[:, :1]).all()):
        return None
    (x, y, z), (a, b, c) = times.tolist(), rows[:, 0].tolist()
    slope = (b - a) / (y - x)
    offset = a - slope * x
    return (slope, offset) if slope and abs(slope * z + offset - c) <= 1e-6 * (1 + abs(c)) else None
