"""Masks of the objects in boxes, by Segment Anything (Kirillov et al. 2023, arXiv 2304.02643) of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from rollflow.errors import ModelError, shown
from rollflow.rewards.network import LOCAL, loading, pretrained
from rollflow.rewards.pixels import Preparation


class Segmenter:
    """Segment Anything, asked for the object in a box.

    Pictures stay tensors on their device; they are resized as Pillow does and padded below and to the right, which
    equals SAM's processor of the `pil` backend.
    """

    def __init__(self, network: Any, processor: Any):
        self._network = network
        self._longest, pad = processor.size["longest_edge"], processor.pad_size
        self._padded = (pad["height"], pad["width"])
        resample = getattr(processor.resample, "value", processor.resample)
        self._rest = (int(resample), None, tuple(processor.image_mean), tuple(processor.image_std))

    @classmethod
    def load(cls, reward: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Segmenter:
        """The model of a folder; `reward` is for whom, in messages. Raises `ModelError` if it is not SAM."""
        from transformers import AutoConfig, AutoImageProcessor, SamModel

        with loading(reward, folder):
            if (kind := AutoConfig.from_pretrained(folder, **LOCAL).model_type) != "sam":
                raise ModelError(f"{shown(str(folder))} holds a model of type {kind!r}: the reward {reward} takes sam")
            network = pretrained(reward, SamModel, folder, device, dtype)
            return cls(network, AutoImageProcessor.from_pretrained(folder, **LOCAL))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What an image is resized to before it is padded."""
        scale = self._longest / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def pixels(self, images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row 3 h w"]:
        """What the processor makes of images in [0, 1]."""
        height, width = self.size(*images.shape[-2:])
        x = Preparation(None, (height, width), *self._rest)(images)
        return functional.pad(x, (0, self._padded[1] - width, 0, self._padded[0] - height))

    def __call__(
        self, image: Float[Tensor, "3 height width"], boxes: Float[Tensor, "box 4"]
    ) -> Bool[Tensor, "box height width"]:
        """The mask of what is in each box: the union of SAM's three, for the whole, a part and a part of that."""
        height, width = image.shape[-2:]
        high, wide = self.size(height, width)
        scale = torch.tensor([wide / width, high / height] * 2)
        found = self._network(
            pixel_values=self.pixels(image[None]).to(self._network.dtype),
            input_boxes=(boxes.cpu() * scale)[None].to(image.device, self._network.dtype),
        ).pred_masks[0]
        large = functional.interpolate(found.float(), self._padded, mode="bilinear", align_corners=False)
        small = functional.interpolate(large[..., :high, :wide], (height, width), mode="bilinear", align_corners=False)
        return (small > 0).any(1)
