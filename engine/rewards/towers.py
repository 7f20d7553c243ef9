"""Models with a tower for images and one for prompts, whose embeddings meet in one space: CLIP, and what is like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from rollflow.rewards.network import Remembered


class Towers:
    """Both towers of a model; each distinct prompt is embedded once.

    Args:
        device: where they are.
        image: embeddings `[row, channel]` of images in [0, 1] on that device.
        text: embeddings `[prompt, channel]` of prompts.
        scale, bias: of the logits that the model was trained with, `scale cos + bias`.
    """

    def __init__(
        self,
        device: torch.device,
        image: Callable[[Tensor], Tensor],
        text: Callable[[list[str]], Tensor],
        scale: float,
        bias: float = 0.0,
    ):
        self.device, self.scale, self.bias = device, scale, bias
        self._image, self._text = image, Remembered(lambda prompts: _unit(text(prompts)))

    def cosines(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Of each image with its prompt; float32, on the device of the towers, differentiable in the images."""
        return (_unit(self._image(images.to(self.device))) * self._text(prompts)).sum(1)


def tokens(
    tokenizer: Any, prompts: list[str], length: int, device: torch.device, **options: Any
) -> Mapping[str, Tensor]:
    """Prompts as a tokenizer of transformers gives them, cut to `length` tokens, on a device."""
    return tokenizer(prompts, truncation=True, max_length=length, return_tensors="pt", **options).to(device)


def _unit(embeddings: Float[Tensor, "row channel"]) -> Float[Tensor, "row channel"]:
    return normalize(embeddings.float(), dim=-1)
