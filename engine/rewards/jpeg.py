"""The `jpeg` reward: how small an image is as a JPEG, or with the other sign how large."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rollflow.errors import RequestError
from rollflow.rewards import pixels
from rollflow.rewards.network import FrameReward

KILOBYTE = 1000  # bytes, as the paper's authors count


@dataclass(frozen=True)
class JpegReward(FrameReward):
    """Minus the size of an image as a JPEG, in kB of 1000 bytes: compressibility. The prompt does not matter.

        score = - sign bytes / 1000

    From Black et al. 2023 (DDPO, arXiv 2305.13301, section 5.1), who write with Pillow at quality 95. So does this, by
    the same calls: Pillow is there in any case, and an encoder on the GPU (nvJPEG, which torchvision offers) gives
    other sizes. The images are copied to the host for it. It has no gradient. At the default quality a 512 x 512 image
    has about 50 to 250 kB.

    Attributes:
        quality: of the encoder, from 1 to 100.
        sign: 1 for compressibility, -1 for incompressibility.
    """

    kind: ClassVar[str] = "jpeg"
    concurrent: ClassVar[bool] = True

    quality: int = 95
    sign: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.quality <= 100:
            raise RequestError(f"jpeg: quality={self.quality}: it must be from 1 to 100")
        if self.sign not in (1, -1):
            raise RequestError(f"jpeg: sign={self.sign}: 1 rewards small files, -1 large ones")

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward`; on the CPU."""
        sizes = [self._bytes(picture) for picture in pixels.eight_bit(images)]
        return -self.sign * torch.tensor(sizes, dtype=torch.float32) / KILOBYTE

    def _bytes(self, picture: np.ndarray) -> int:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=self.quality)
        return file.tell()
