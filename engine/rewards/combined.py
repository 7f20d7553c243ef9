"""Rewards made of others: sums, minima, thresholds and normalised terms; see `rollflow.rewards.expression`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError, line
from rollflow.rewards import expression, protocol
from rollflow.rewards.expression import Named, Node
from rollflow.rewards.protocol import Reward

Scale = tuple[float, float]  # mean and deviation of a normalised term
UNSCALED: Scale = (0.0, 1.0)


class Combined(Reward):
    """An expression of other rewards, its terms.

    The engine calls each term for itself, in batches with whatever other requests ask of that term, and combines what
    they give. A term in a `z` is normalised by the mean and the deviation of the request's first particles. The
    held-out judge is that of its terms, where they name one and no two.

    Args:
        node: the expression.
        rewards: what its names stand for.

    Attributes:
        terms: the distinct rewards, in order.
        labels: what to call each in histories and results.
        normalised: the places of those in a `z`.
        name: the expression.
    """

    def __init__(self, node: Node, rewards: dict[Named, Reward]):
        named = [*dict.fromkeys(expression.rewards_of(node))]
        self._node, self._places = node, {one: i for i, one in enumerate(named)}
        self.terms = tuple(rewards[one] for one in named)
        self.labels = expression.labels(named)
        self.normalised = tuple(sorted({self._places[one] for one in expression.normalised_of(node)}))
        self.name = line(str(node), 300)
        self.size = _same_size(self.name, self.terms)
        self.clips = any(map(protocol.clips, self.terms))
        smooth = not self.normalised and not expression.has_threshold(node)
        self.differentiable = smooth and all(map(protocol.differentiable, self.terms))

    @property
    def held_out(self) -> Any:
        """The judge that its terms name, if it is one."""
        named = [protocol.asked(term, partial(getattr, term, "held_out", None)) for term in self.terms]
        judges = {id(judge): judge for judge in named if judge is not None}
        return next(iter(judges.values())) if len(judges) == 1 else None

    def check(self, prompt: str) -> None:
        """Asks each term."""
        for term in self.terms:
            protocol.check(term, prompt)

    def combine(self, scores: Float[Tensor, "term row"], scales: Sequence[Scale] = ()) -> Float[Tensor, " row"]:
        """The reward of each row.

        Args:
            scores: of each term.
            scales: mean and deviation of each of `normalised`, by default 0 and 1.
        """
        scale = dict(zip(self.normalised, scales or [UNSCALED] * len(self.normalised), strict=True))
        return expression.evaluate(
            self._node, lambda one: scores[self._places[one]], lambda one: scale[self._places[one]]
        )

    def of(self, scores: Sequence[float], scales: Sequence[Scale] = ()) -> float:
        """`combine` for one row."""
        return float(self.combine(torch.tensor([*scores], dtype=torch.float64)[:, None], scales))

    def __call__(
        self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """The reward of images, each term asked in turn; what stands in a `z` is not normalised."""
        scores = [term(images, prompts).to(images.device) for term in self.terms]
        dtype = torch.promote_types(torch.float32, scores[0].dtype)
        return self.combine(torch.stack([score.to(dtype) for score in scores]))


def terms_of(reward: Reward) -> tuple[Reward, ...]:
    """What is called for a reward: its terms, or itself."""
    return reward.terms if isinstance(reward, Combined) else (reward,)


def _same_size(name: str, terms: Sequence[Reward]) -> tuple[int, int] | None:
    sizes = {size for size in map(protocol.size, terms) if size is not None}
    if len(sizes) > 1:
        wanted = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise RequestError(f"the terms of the reward {name} judge images of different sizes: {wanted}")
    return sizes.pop() if sizes else None
