"""`siglip`: the probability that an image and its prompt belong together, by SigLIP or SigLIP 2."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError, shown
from rollflow.rewards.network import LOCAL, NetworkReward, frozen, loading, pretrained
from rollflow.rewards.pixels import Preparation
from rollflow.rewards.towers import Towers, tokens


@dataclass(frozen=True)
class SiglipReward(NetworkReward):
    """The probability `sigmoid(scale cos(image, prompt) + bias)` that a SigLIP gives a pair; differentiable.

    Zhai et al. 2023, arXiv 2303.15343, equation 1, and Tschannen et al. 2025 (SigLIP 2), arXiv 2502.14786. Unlike CLIP
    it is trained on pairs by themselves, so that the probability in [0, 1] means something without other prompts. It is
    tiny for most prompts of a few details; the logit, in about [-20, 5], ranks them without vanishing gradients.

    `transformers` does the work: `SiglipModel` (SigLIP, and SigLIP 2 of a fixed size) and `Siglip2Model` (NaFlex: the
    image keeps its proportions). open_clip has them too, from the same weights, but not as folders of safetensors with
    their processors. Prompts are what the models were trained on: lower case, padded to their full length, not masked;
    SigLIP 1 needs the packages sentencepiece and protobuf.

    Attributes:
        model: a SigLIP of transformers, with its processor.
        logit: whether the score is the logit of that probability.
    """

    kind: ClassVar[str] = "siglip"
    differentiable: ClassVar[bool] = True

    model: str = "google/siglip2-so400m-patch14-384"
    logit: bool = False

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Towers:
        """See `NetworkReward.load`."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Siglip2Model, SiglipModel

        with loading(self.kind, folder):
            config = AutoConfig.from_pretrained(folder, **LOCAL)
            kinds: dict[str, Any] = {"siglip": SiglipModel, "siglip2": Siglip2Model}
            if config.model_type not in kinds:
                raise ModelError(
                    f"siglip: {shown(str(folder))} is a model of type {config.model_type}: give one of type "
                    f"{' or '.join(kinds)}"
                )
            tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
            processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
            prepare = Preparation.of(processor) if config.model_type == "siglip" else Patches.of(processor)
        network = pretrained(self.kind, kinds[config.model_type], folder, torch.device("cpu"), torch.float32)
        scale, bias = float(network.logit_scale.exp()), float(network.logit_bias)  # before they are rounded
        network = frozen(network, device, dtype)
        length = config.text_config.max_position_embeddings

        def text(prompts: list[str]) -> Tensor:
            lower = [prompt.lower() for prompt in prompts]
            given = tokens(tokenizer, lower, length, device, padding="max_length")
            return network.text_model(input_ids=given["input_ids"]).pooler_output

        return Towers(device, _images(network, prepare), text, scale, bias)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        towers = self.parts(images.device)
        logits = towers.scale * towers.cosines(images, prompts) + towers.bias
        return logits if self.logit else logits.sigmoid()


def _images(network: Any, prepare: Preparation | Patches) -> Callable[[Tensor], Tensor]:
    """From images in [0, 1] to their embeddings `[row, channel]`."""

    def image(images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row channel"]:
        if isinstance(prepare, Preparation):
            return network.vision_model(pixel_values=prepare(images).to(network.dtype)).pooler_output
        patches = prepare(images)
        shape = torch.tensor([prepare.grid(*images.shape[-2:])], device=patches.device).expand(len(patches), -1)
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
        return network.vision_model(
            pixel_values=patches.to(network.dtype), pixel_attention_mask=mask, spatial_shapes=shape
        ).pooler_output

    return image


@dataclass(frozen=True)
class Patches:
    """What the processor of SigLIP 2 NaFlex does: an image of any shape as at most so many patches.

    Attributes:
        pixels: resizes and normalises.
        side: of a patch, in pixels.
        most: how many patches an image has at most.
    """

    pixels: Preparation
    side: int
    most: int

    @classmethod
    def of(cls, processor: Any) -> Patches:
        """What a `Siglip2ImageProcessor` of transformers says that it does."""
        mean, deviation = (tuple(map(float, v)) for v in (processor.image_mean, processor.image_std))
        pixels = Preparation(None, None, int(processor.resample), None, mean, deviation)
        return cls(pixels, processor.patch_size, processor.max_num_patches)

    def __call__(self, images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row patch channel"]:
        """Patches of images in [0, 1], row by row; without the processor's padding to `most`, which is masked."""
        rows, columns = self.grid(*images.shape[-2:])
        side = self.side
        x = replace(self.pixels, exact=(rows * side, columns * side))(images)
        x = x.view(len(x), 3, rows, side, columns, side)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(len(x), rows * columns, -1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return _grid(height, width, self.side, self.most)


@lru_cache(maxsize=256)
def _grid(height: int, width: int, side: int, most: int, precision: float = 1e-5) -> tuple[int, int]:
    """The largest scale at which an image has at most `most` patches, by the processor's own bisection."""

    def patches(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(length * scale / side)) for length in (height, width))
        return rows, columns

    low, high = precision / 10, 100.0
    while high - low >= precision:
        middle = (low + high) / 2
        low, high = (middle, high) if math.prod(patches(middle)) <= most else (low, middle)
    return patches(low)
