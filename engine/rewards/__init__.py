"""Rewards: functions from images and prompts to scores.

A reward is anything with the methods of `Reward`, or a plain function `f(images, prompts) -> scores`. It may name a
*held-out* reward, a second judge that no search sees: the engine reports its score of the final image, which shows
whether a search improved the image or only fooled its reward.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError, RewardUnavailable

_BUILT_IN = {  # name -> module and class; imported when first asked for
    "count": ("rollflow.rewards.count", "CountReward"),
    "classifier": ("rollflow.rewards.classifier", "CountClassifier"),
    "soft_count": ("rollflow.rewards.classifier", "SoftCount"),
}


@runtime_checkable
class Reward(Protocol):
    """Scores images for their prompts; higher is better.

    A reward may also have the attributes `held_out: Reward | None`, a second judge of the final image, and
    `size: tuple[int, int] | None`, the only height and width that it can judge; requests for other sizes are refused;
    and `differentiable: bool`, whether its scores have gradients with respect to the images, for guided methods; and
    `concurrent: bool`, whether several threads may call it at a time. Rewards are called by threads of the engine, one
    call at a time unless they say that they are concurrent; one that takes long (a service, say) holds up only the
    requests that it judges.
    """

    name: str

    def check(self, prompt: str) -> None:
        """Raises `RequestError` if the reward cannot judge this prompt; called before any work is done."""
        ...

    def __call__(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Scores of images in [0, 1], one prompt a row, on any device."""
        ...


class FunctionReward(Reward):
    """A plain function `f(images, prompts) -> scores` as a reward that accepts every prompt.

    It is taken for differentiable if the function has the attribute `differentiable = True`.
    """

    def __init__(self, function: Callable[..., Tensor], name: str | None = None):
        self.function = function
        self.differentiable: bool = differentiable(function)
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))

    def check(self, prompt: str) -> None:
        """Accepts every prompt."""

    def __call__(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """The function's scores as a floating tensor; raises `RequestError` if they are not one number a row."""
        scores = torch.as_tensor(self.function(images, prompts))
        if scores.shape != (len(images),):
            raise RequestError(
                f"the reward {self.name!r} returned a tensor of shape {tuple(scores.shape)} for {len(images)} images: "
                f"it must return one score an image, shape ({len(images)},)"
            )
        return scores if scores.dtype in (torch.float32, torch.float64) else scores.float()


def names() -> tuple[str, ...]:
    """The names that `make` accepts."""
    return tuple(_BUILT_IN)


def make(reward: str | Reward | Callable[..., Tensor]) -> Reward:
    """The reward of a name, a reward itself, or a plain function `f(images, prompts) -> scores` made one.

    Raises:
        RequestError: no reward has this name, or the object is not callable.
    """
    if isinstance(reward, str):
        if reward not in _BUILT_IN:
            raise RequestError(
                f"there is no reward {reward!r}: choose one of {', '.join(names())}, "
                "or give a function f(images, prompts) that returns one score an image"
            )
        return _built_in(reward)
    if isinstance(reward, type) or not callable(reward):
        raise RequestError(
            f"a reward is a name ({', '.join(names())}), an instance with the methods of rollflow.rewards.Reward, or a "
            f"function f(images, prompts), not {reward!r}"
        )
    return reward if isinstance(reward, Reward) else FunctionReward(reward)


@lru_cache
def _built_in(name: str) -> Reward:
    """One object a name, so that all requests that ask for it are judged in one call a batch."""
    module, attribute = _BUILT_IN[name]
    return getattr(importlib.import_module(module), attribute)()


def size(reward: Reward) -> tuple[int, int] | None:
    """The only (height, width) that `reward` can judge, or None."""
    return getattr(reward, "size", None)


def differentiable(reward: object) -> bool:
    """Whether a reward says that its scores have gradients with respect to the images."""
    return bool(getattr(reward, "differentiable", False))


def held_out(reward: Reward) -> Reward | None:
    """The second judge that `reward` names for the final image, or None."""
    return getattr(reward, "held_out", None)


def timeout(reward: Reward) -> float | None:
    """Seconds that a call of `reward` may take, or None."""
    return getattr(getattr(reward, "function", reward), "timeout", None)


def retry_on(reward: Reward) -> tuple[type[BaseException], ...]:
    """The errors after which `reward` is called again."""
    return (RewardUnavailable, *getattr(getattr(reward, "function", reward), "retry_on", ()))


def retries(reward: Reward) -> int:
    """How often `reward` is called again."""
    return getattr(getattr(reward, "function", reward), "retries", 3)
