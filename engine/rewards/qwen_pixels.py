"""What the image processor of Qwen2-VL and Qwen2.5-VL does, on tensors and on the device: resize, normalise, cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rollflow.errors import ModelError, RequestError
from rollflow.rewards.pixels import resized

STRETCHED = 200  # the most that a side may be of the other


@dataclass(frozen=True)
class Patches:
    """How images become the patches that Qwen's vision tower reads.

    Attributes:
        least, most: pixels that an image has after it was resized; both sides are multiples of `patch * merge`.
        patch: side of a patch.
        merge: patches a side that become one token.
        frames: of a patch; an image is all of them.
        resample: Pillow's number of the filter.
        mean, deviation: by channel, of pixels in [0, 1].
    """

    least: int
    most: int
    patch: int = 14
    merge: int = 2
    frames: int = 2
    resample: int = 3
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    deviation: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def of(cls, processor: Any) -> Patches:
        """What an image processor of transformers says that it does.

        Raises:
            ModelError: it has none of the names that Qwen's have.
        """
        said = processor.to_dict()
        try:
            least, most = (said["size"][name] for name in ("shortest_edge", "longest_edge"))
            names = ("patch_size", "merge_size", "temporal_patch_size", "resample", "image_mean", "image_std")
            patch, merge, frames, resample, mean, deviation = (said[name] for name in names)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"the image processor {type(processor).__name__} has no {error}: it must be that of a Qwen2-VL"
            ) from error
        resample = int(getattr(resample, "value", resample))
        return cls(least, most, patch, merge, frames, resample, tuple(map(float, mean)), tuple(map(float, deviation)))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """To what height and width an image is resized.

        Raises:
            RequestError: it is too long for its width, or too wide for its height.
        """
        if max(height, width) > STRETCHED * min(height, width):
            raise RequestError(f"an image of {height}x{width}: Qwen takes sides of up to {STRETCHED} times the other")
        unit, area = self.patch * self.merge, height * width
        high, wide = round(height / unit), round(width / unit)
        if high * wide * unit**2 > self.most:
            by = math.sqrt(area / self.most)
            high, wide = max(1, math.floor(height / by / unit)), max(1, math.floor(width / by / unit))
        elif high * wide * unit**2 < self.least:
            by = math.sqrt(self.least / area)
            high, wide = math.ceil(height * by / unit), math.ceil(width * by / unit)
        return high * unit, wide * unit

    def tokens(self, height: int, width: int) -> int:
        """How many tokens an image of this size becomes."""
        high, wide = self.size(height, width)
        return high * wide // (self.patch * self.merge) ** 2

    def __call__(
        self, images: Float[Tensor, "row 3 height width"]
    ) -> tuple[Float[Tensor, "row_patch value"], Int[Tensor, "row 3"]]:
        """Patches of images in [0, 1], and the grid of each (1, rows, columns); differentiable, on their device."""
        high, wide = self.size(*images.shape[-2:])
        x = resized(images, high, wide, self.resample)
        mean, deviation = (x.new_tensor(value)[:, None, None] for value in (self.mean, self.deviation))
        rows, columns = high // self.patch, wide // self.patch
        cut = ((x - mean) / deviation).unflatten(3, (columns // self.merge, self.merge, self.patch))
        cut = cut.unflatten(2, (rows // self.merge, self.merge, self.patch))
        # row, channel, big row, small row, y, big column, small column, x -> those that become one token together
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)
        cut = cut[:, :, None].expand(-1, -1, self.frames, -1, -1).flatten(1)
        return cut, torch.tensor([[1, rows, columns]], device=x.device).expand(len(images), 3)
