"""Classifier-free guidance: how the velocities with a prompt and without it become one, as families define it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Norm = Literal["none", "token", "token at most"]
NORMS: tuple[Norm, ...] = ("none", "token", "token at most")


@dataclass(frozen=True)
class Rule:
    """`v = u + w (c - u)` of the velocities `c` with the prompt and `u` without it (Ho & Salimans, arXiv 2207.12598).

    Attributes:
        base: what the scale `s` counts from: "without", `w = s`, or "with", `w = s + 1`.
        norm: "none"; "token" gives each vector along the last dimension the length that `c` has there; "token at most"
            only shortens.
        above: guidance takes place at scales above this one; at others `v = c`.
    """

    base: Literal["without", "with"] = "without"
    norm: Norm = "none"
    above: float = 1.0

    def on(self, scale: float) -> bool:
        """Whether a scale takes two rows of the network."""
        return scale > self.above and scale != (1.0 if self.base == "without" else 0.0)

    def guided(
        self, c: Float[Tensor, "row ..."], u: Float[Tensor, "row ..."], scale: Float[Tensor, " row"]
    ) -> Float[Tensor, "row ..."]:
        """`v`, each row with its own scale, in the dtype of `c`."""
        weight = scale if self.base == "without" else scale + 1
        combined = u + weight.to(c.dtype).view(-1, *[1] * (c.ndim - 1)) * (c - u)
        if self.norm == "none":
            return combined
        lengths = (torch.linalg.vector_norm(one, dim=-1, keepdim=True) for one in (c, combined))
        ratio = next(lengths) / next(lengths).clamp(min=1e-12)
        return combined * (ratio if self.norm == "token" else ratio.clamp(max=1))
