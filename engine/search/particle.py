"""Particles are handles; their state lives in a pool of slots.

A search method holds `Particle` objects and knows of each only its reward and its step. The device state (the latent
`x` in float32 and the model's velocity `u` there) sits in preallocated storage, addressed by slot, so that resampling
and survival copy nothing. A slot is free again when no particle refers to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from rollflow.row import Candidate
from rollflow.sde import Step


@runtime_checkable
class Slot(Protocol):
    """A place in a pool; see `rollflow.schedule.pool.Slot`."""

    index: int

    def release(self) -> None:
        """Gives the place back."""
        ...

    def pin(self) -> Callable[[], None]:
        """Keeps the place as it is until the function that it returns is called."""
        ...


@runtime_checkable
class Lease(Protocol):
    """The slots of one request; see `rollflow.schedule.pool.Lease`."""

    @property
    def excess(self) -> int:
        """How many slots it holds beyond its promise."""
        ...

    def take(self, within: bool = True) -> Slot | None:
        """A slot, or None while there is none."""
        ...

    def extend(self, promise: int) -> bool:
        """Raises the promise to at least that many slots; says whether it could."""
        ...

    def close(self) -> None:
        """Gives every slot back."""
        ...


@runtime_checkable
class Odds(Protocol):
    """What was learned of successes; see `rollflow.schedule.odds.Odds`."""

    def observe(self, method: str, level: int, success: bool) -> None:
        """One child was judged."""
        ...

    def success(self, method: str, level: int) -> float:
        """The chance that the next child beats its bar."""
        ...


class Particle:
    """One evaluated sample: what a method sees of it, and where its state is.

    Attributes:
        reward: the reward of its posterior mean; `None` when it was drawn with `scored=False`.
        value: the reward as it is compared: one that is no finite number is worst.
        terms: the scores of a combined reward's terms; None of another, or where it was not judged.
        step: its place on the request's time grid, 0 for a sample of the prior.
        index: its place in the request's history; -1 until it is there.
        parent: the parent's place in the history, `None` for a sample of the prior.
        arrival: the step that led to it: its time, and the coefficients of its posterior mean.
        slot: its place in the pool.
        cached: whether it was evaluated from a cache, and not anew since.
        guessed: whether its reward is that of an evaluation from a cache.
        moved: whether its children's velocity is moved by its reward's gradient.
        kept: whether the method may still draw from it or return it; see `rollflow.draw.Draw.keep`.
        number: of the row that made it.
    """

    __slots__ = (
        "__weakref__", "arrival", "cached", "guessed", "index", "kept", "moved", "number", "parent", "reward", "slot",
        "step", "terms", "value",
    )  # fmt: skip

    def __init__(
        self, step: int, arrival: Step, slot: Slot, moved: bool = False, number: int = -1, cached: bool = False
    ):
        self.cached = self.guessed = cached
        self.step, self.arrival, self.slot, self.moved = step, arrival, slot, moved
        self.index, self.kept, self.number = -1, True, number
        self.parent: int | None = None
        self.reward: float | None = None
        self.terms: tuple[float, ...] | None = None
        self.value = -math.inf

    def judge(self, reward: float | None) -> None:
        """Its reward came."""
        self.reward = reward
        if reward is not None and math.isfinite(reward):
            self.value = reward  # as `rollflow.methods.budget.worth` has it

    @property
    def time(self) -> float:
        """The interpolant's time at which it was evaluated."""
        return self.arrival.time

    @property
    def candidate(self) -> Candidate:
        """What the device needs to make its image."""
        return Candidate(self.slot.index, self.arrival.p, self.arrival.q, self.step)

    def __repr__(self) -> str:
        return f"Particle(step={self.step}, reward={self.reward}, index={self.index}, parent={self.parent})"


def rank(particle: Particle) -> tuple[float, int]:
    """Better rewards first; of equal ones that of the later point of the grid, whose posterior mean is sharper."""
    return particle.value, particle.step
