"""The image that some rewards compare others with: a file, a tensor or a picture of Pillow."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from rollflow.errors import RequestError, said, shown


@dataclass(frozen=True)
class Reference:
    """A given image; two of the same pixels are equal.

    Attributes:
        digest: of its pixels.
        pixels: in [0, 1], on the CPU.
    """

    digest: str
    pixels: Float[Tensor, "3 height width"] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"image-{self.digest[:12]}"

    @classmethod
    def of(cls, pixels: Float[Tensor, "3 height width"]) -> Reference:
        """The reference of pixels in [0, 1]."""
        kept = pixels.detach().to("cpu", torch.float32).contiguous()
        digest = hashlib.sha256(f"{tuple(kept.shape)}".encode() + kept.numpy().tobytes())
        return cls(digest.hexdigest(), kept)


Given = str | Tensor | Image.Image | Reference


def given(reward: str, image: Given) -> str | Reference:
    """What a reward keeps of the option `image`: the path of a file, or the pixels.

    Raises:
        RequestError: a tensor that is no image [3, height, width] in [0, 1], or 0 to 255 if it is of bytes.
    """
    if isinstance(image, str | Reference):
        return image
    if isinstance(image, Image.Image):
        return Reference.of(_pixels(image))
    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    pixels = image.float() / 255 if image.dtype == torch.uint8 else image
    if pixels.ndim != 3 or len(pixels) != 3 or not pixels.numel() or not pixels.is_floating_point():
        raise RequestError(
            f"{reward}: image={shown(image)}: it must be [3, height, width], of numbers in [0, 1] or bytes"
        )
    if not bool((pixels >= 0).all() and (pixels <= 1).all()):
        raise RequestError(f"{reward}: image={shown(image)} has numbers outside of [0, 1]: scale it, or give bytes")
    return Reference.of(pixels)


def reference(reward: str, image: str | Reference) -> Reference:
    """The image that a reward was given.

    Raises:
        RequestError: there is none, or the file is no image.
    """
    if isinstance(image, Reference):
        return image
    if not image:
        raise RequestError(f"the reward {reward} compares with an image: give {reward}:image=FILE")
    path = Path(image).expanduser()
    try:
        return _read(str(path), path.stat().st_mtime_ns)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise RequestError(f"{reward}: image={shown(image)} is no image that can be read: {said(error)}") from error


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Reference:
    with Image.open(path) as image:
        return Reference.of(_pixels(image))


def _pixels(image: Image.Image) -> Float[Tensor, "3 height width"]:
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).float() / 255
