"""Particles are handles; their state lives in a pool of slots.

A search method holds `Particle` objects and knows of each only its reward and its step. The device state (the
latent `x` in float32 and the model's velocity `u` there) sits in preallocated storage, addressed by slot, so that
resampling and survival copy nothing. A slot is free again when no particle refers to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError


class Slot:
    """Ownership of one place in a pool; dropping the last reference gives the place back."""

    __slots__ = ("_pool", "index")

    def __init__(self, pool: ParticlePool, index: int):
        self._pool, self.index = pool, index

    def __del__(self) -> None:
        self._pool._free.append(self.index)


class Particle:
    """One evaluated sample: what a method sees of it, and where its state is.

    Attributes:
        reward: the reward of its posterior mean; `None` when it was drawn with `scored=False`.
        step: its place on the request's time grid, 0 for a sample of the prior.
        index: its place in the request's history.
        parent: the parent's place in the history, `None` for a sample of the prior.
        time: the interpolant's time at which it was evaluated.
        slot: its place in the pool.
    """

    __slots__ = ("index", "parent", "reward", "slot", "step", "time")

    def __init__(self, step: int, time: float, slot: Slot, index: int, parent: int | None):
        self.step, self.time, self.slot, self.index, self.parent = step, time, slot, index, parent
        self.reward: float | None = None

    def __repr__(self) -> str:
        return f"Particle(step={self.step}, reward={self.reward}, index={self.index}, parent={self.parent})"


@runtime_checkable
class Evaluated(Protocol):
    """All that a search method knows of a particle; tests drive methods with objects of their own."""

    reward: float | None
    step: int


@dataclass(frozen=True)
class Draw:
    """What a method asks for: children of one particle, or fresh samples of the prior.

    Attributes:
        parent: the particle to branch from; `None` draws from the prior at the first time of the grid.
        count: draw at most this many children, in order ...
        until: ... stopping after the first whose reward is strictly above this.
        scored: whether the children are decoded and judged; without it their reward is `None` (and `until` is moot).
    """

    parent: Evaluated | None
    count: int = 1
    until: float = math.inf
    scored: bool = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RequestError(f"a draw of {self.count} children: it must be at least 1")
        if not self.scored and self.until != math.inf:
            raise RequestError("a draw with `until` must be scored: its stopping rule looks at rewards")


class ParticlePool:
    """Preallocated state of at most `slots` particles of one geometry.

    Args:
        slots: how many particles can live at once; the memory is `slots * token * channel * 8` bytes.
        token, channel: the shape of one latent.
        device: where the storage is.
    """

    def __init__(self, slots: int, token: int, channel: int, device: torch.device):
        self.slots = slots
        self.x: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device)
        self.u: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device)
        self._free = list(range(slots - 1, -1, -1))
        self._promised = 0

    @property
    def live(self) -> int:
        """How many slots are in use."""
        return self.slots - len(self._free)

    def take(self) -> Slot:
        """A free slot. Running out is an engine error: admission promises slots before they are needed."""
        if not self._free:
            raise RuntimeError(f"all {self.slots} slots of the particle pool are in use: admission promised too many")
        return Slot(self, self._free.pop())

    def reserve(self, count: int) -> bool:
        """Promises `count` slots to a request if that many are not promised yet; says whether it did."""
        if self._promised + count > self.slots:
            return False
        self._promised += count
        return True

    def unreserve(self, count: int) -> None:
        """Takes a promise back when its request is over."""
        self._promised -= count
