"""The state of particles, addressed by slot."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError


class Storage:
    """Preallocated state of at most `slots` particles of one geometry.

    Attributes:
        x: their latents, in float32 (bfloat16 would lose an SDE's small increments).
        u: the velocities that the model gave for them, in the dtype that it gives them in.
        move: by how much the reward's gradient moves the velocity that a particle's children start from, in float32;
            made when the first guided row comes, and as large as `x`.
        kept: of requests with a cache, what is kept of a particle's evaluation for its children, in the model's dtype;
            the last entry, which -1 names, is that of padding.

    Args:
        slots, token, channel, device: of the states.
        velocity: the dtype of `u`.
        kept, dtype: numbers a token that are kept for a cache, and their dtype.
    """

    def __init__(
        self,
        slots: int,
        token: int,
        channel: int,
        device: torch.device,
        velocity: torch.dtype = torch.float32,
        kept: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.x: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device)
        self.u: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device, dtype=velocity)
        entries = slots + 1 if kept else 0
        self.kept: Float[Tensor, "entry token kept"] = torch.zeros(entries, token, kept, device=device, dtype=dtype)
        self._move: Float[Tensor, "slot token channel"] | None = None

    @property
    def move(self) -> Float[Tensor, "slot token channel"]:
        """See the class."""
        if self._move is None:
            self._move = torch.zeros_like(self.x)
        return self._move

    def as_kept(self, u: Float[Tensor, "row token channel"]) -> Float[Tensor, "row token channel"]:
        """A model's velocities in the dtype of `u`.

        Raises:
            ModelError: it is one that loses some of them.
        """
        if u.dtype != self.u.dtype and self.u.dtype != torch.float32:
            raise ModelError(
                f"the model gave velocities in {u.dtype} and declares the capability rounded, which keeps them in "
                f"{self.u.dtype}: return them in the model's dtype, or do not declare it"
            )
        return u.to(self.u.dtype)
