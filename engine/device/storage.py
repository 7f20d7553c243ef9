"""The state of particles, addressed by slot."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Storage:
    """Preallocated state of at most `slots` particles of one geometry.

    Attributes:
        x: their latents, in float32 (bfloat16 would lose an SDE's small increments).
        u: the velocities that the model gave for them.
        kept: of requests with a cache, what is kept of a particle's evaluation for its children, in the model's dtype;
            the last entry, which -1 names, is that of padding.
        move: by how much the reward's gradient moves the velocity that a particle's children start from; made when the
            first guided row comes, and half as large as the other two together.
    """

    def __init__(
        self,
        slots: int,
        token: int,
        channel: int,
        device: torch.device,
        kept: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        self.x: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device)
        self.u: Float[Tensor, "slot token channel"] = torch.zeros(slots, token, channel, device=device)
        entries = slots + 1 if kept else 0
        self.kept: Float[Tensor, "entry token kept"] = torch.zeros(entries, token, kept, device=device, dtype=dtype)
        self._move: Float[Tensor, "slot token channel"] | None = None

    @property
    def move(self) -> Float[Tensor, "slot token channel"]:
        """See the class."""
        if self._move is None:
            self._move = torch.zeros_like(self.x)
        return self._move
