"""Particles are handles; their state lives in a pool of slots.

A search method holds `Particle` objects and knows of each only its reward and its step. The device state (the
latent `x` in float32 and the model's velocity `u` there) sits in preallocated storage, addressed by slot, so that
resampling and survival copy nothing. A slot is free again when no particle refers to it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from rollflow.schedule.pool import Slot
from rollflow.sde import Step


class Particle:
    """One evaluated sample: what a method sees of it, and where its state is.

    Attributes:
        reward: the reward of its posterior mean; `None` when it was drawn with `scored=False`.
        step: its place on the request's time grid, 0 for a sample of the prior.
        index: its place in the request's history.
        parent: the parent's place in the history, `None` for a sample of the prior.
        arrival: the step that led to it: its time, and the coefficients of its posterior mean.
        slot: its place in the pool.
        shift: by how much its children's velocity `u` is moved by the reward's gradient; None for most.
    """

    __slots__ = ("arrival", "index", "parent", "reward", "shift", "slot", "step")

    def __init__(self, step: int, arrival: Step, slot: Slot, index: int, parent: int | None):
        self.step, self.arrival, self.slot, self.index, self.parent = step, arrival, slot, index, parent
        self.reward: float | None = None
        self.shift: Float[Tensor, "token channel"] | None = None

    @property
    def time(self) -> float:
        """The interpolant's time at which it was evaluated."""
        return self.arrival.time

    def __repr__(self) -> str:
        return f"Particle(step={self.step}, reward={self.reward}, index={self.index}, parent={self.parent})"
