"""What an image processor does to a picture, on tensors and on the device: resize, crop, rescale, normalise.

Processors resize 8-bit pictures with Pillow, in two passes, each of which rounds to 8 bits. Both are matrix products
here, with Pillow's own coefficients of 22 bits, so that a network sees what its processor would have given it, to the
last bit. Where a gradient is wanted nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from torch import Tensor

from rollflow.errors import ModelError, shown


def _box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1 - np.abs(x))


def _hamming(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 0.0)


def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


BITS = 22  # of Pillow's coefficients
_FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {  # Pillow's number -> filter and its support
    1: (_lanczos, 3.0),
    2: (_triangle, 1.0),
    3: (_cubic, 2.0),
    4: (_box, 0.5),
    5: (_hamming, 1.0),
}


@lru_cache(maxsize=32)
def _coefficients(old: int, new: int, resample: int, device: torch.device) -> Float64[Tensor, "new old"]:
    """One pass of Pillow's `Image.resize` as a matrix, in units of 2^-22."""
    filter, support = _FILTERS[resample]
    scale = old / new
    wide = max(scale, 1.0)  # when it shrinks, the filter covers all pixels that it averages
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum(0, (centre - support * wide + 0.5).astype(int))
    last = np.minimum(old, (centre + support * wide + 0.5).astype(int))
    at = np.arange(old)
    weights = filter((at - centre[:, None] + 0.5) / wide)
    weights *= (at >= first[:, None]) & (at < last[:, None])
    weights /= weights.sum(1, keepdims=True)
    whole = np.trunc(weights * 2**BITS + np.copysign(0.5, weights))
    with torch.inference_mode(False):
        return torch.tensor(whole, dtype=torch.float64, device=device)


@lru_cache
def _may_begin_with_columns() -> bool:
    """Whether this Pillow begins with the columns where the height shrinks far more than the width; old ones do not."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 20), np.uint8)
    once = Image.fromarray(noise).resize((20, 12), Image.Resampling.BICUBIC)
    twice = once.resize((24, 12), Image.Resampling.BICUBIC)
    return bool((np.array(Image.fromarray(noise).resize((24, 12), Image.Resampling.BICUBIC)) == np.array(twice)).all())


def resized(
    images: Float[Tensor, "row 3 height width"], height: int, width: int, resample: int = 3, bits: bool = True
) -> Float[Tensor, "row 3 h w"]:
    """Images in [0, 1] as Pillow resizes them in 8 bits; in full precision, and differentiable, if they need gradients.

    Args:
        images: what is resized.
        height: in pixels.
        width: in pixels.
        resample: Pillow's number of the filter: 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
        bits: whether each pass rounds to 8 bits, as Pillow does; torchvision, given tensors, rounds no pass.

    Raises:
        ModelError: another filter.
    """
    if resample not in _FILTERS:
        raise ModelError(f"resample={shown(resample)}: it must be one of {', '.join(map(str, _FILTERS))}, Pillow's own")
    high, wide = images.shape[-2:]
    exact = not images.requires_grad
    x = (images.double().clamp(0, 1) * 255).round() if exact else images.double() * 255
    passes = [(-1, wide, width), (-2, high, height)]
    if high - height > max(0, (wide - width) * 2) and _may_begin_with_columns():
        passes.reverse()
    for dim, old, new in passes:
        if old != new:
            c = _coefficients(old, new, resample, x.device)
            x = (x @ c.T if dim == -1 else c @ x) / 2**BITS
            x = (x + 0.5).floor().clamp(0, 255) if exact and bits else x
    return (x / 255).to(images.dtype if images.dtype == torch.float64 else torch.float32)


def eight_bit(images: Float[Tensor, "*row 3 height width"]) -> UInt8[np.ndarray, "*row height width 3"]:
    """Images in [0, 1] as 8-bit pictures on the host, which is a copy and waits for the device; a NaN is black."""
    whole = (images.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return whole.movedim(-3, -1).contiguous().cpu().numpy()


@dataclass(frozen=True)
class Preparation:
    """What a processor does to a picture.

    Attributes:
        shortest: the shorter side is resized to this, the other in proportion; None: not.
        exact: height and width that it is resized to; None: not.
        resample: Pillow's number of the filter.
        crop: height and width that are cut out of the middle; None: nothing is.
        mean, deviation: by channel, of pixels in [0, 1].
        bits: whether it resizes in 8 bits, as Pillow does, or in floats, as torchvision does with tensors.
        nearest: whether the crop's offset is rounded to the nearest pixel, as in torchvision, or down.
    """

    shortest: int | None
    exact: tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    bits: bool = True
    nearest: bool = False

    @classmethod
    def of(cls, processor: Any) -> Preparation:
        """What an image processor of transformers says that it does.

        Raises:
            ModelError: it resizes in another way.
        """
        said = {**processor.to_dict()}
        for name in ("do_pad", "do_thumbnail", "do_align_long_axis", "do_reduce_labels"):
            if said.get(name):
                raise ModelError(f"the processor {type(processor).__name__} has {name}=True, which is not known here")
        factor = said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1.0
        if abs(factor * 255 - 1) > 1e-6:
            raise ModelError(
                f"the processor {type(processor).__name__} rescales by {factor!r}, and 1/255 is known here"
            )
        shortest, exact = (None, None) if not said.get("do_resize", True) else _size(processor, said.get("size"))
        crop = None
        if said.get("do_center_crop"):
            _, crop = _size(processor, said.get("crop_size"))
        mean: tuple[float, ...] = (0.0,) * 3
        deviation: tuple[float, ...] = (1.0,) * 3
        if said.get("do_normalize", True):
            mean, deviation = (tuple(map(float, said[name])) for name in ("image_mean", "image_std"))
        resample = said.get("resample", 3)
        return cls(shortest, exact, int(getattr(resample, "value", resample)), crop, mean, deviation)

    def __call__(self, images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row 3 h w"]:
        """The network's input of images in [0, 1], float32, on their device; differentiable."""
        height, width = images.shape[-2:]
        if self.exact is not None:
            height, width = self.exact
        elif self.shortest is not None:
            short, long = sorted((height, width))
            long = int(self.shortest * long / short)
            height, width = (self.shortest, long) if height <= width else (long, self.shortest)
        x = resized(images, height, width, self.resample, self.bits)
        if self.crop is not None:
            x = cropped(x, *self.crop, nearest=self.nearest)
        mean, deviation = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.mean, self.deviation))
        return (x - mean) / deviation


def cropped(
    images: Float[Tensor, "row 3 height width"], height: int, width: int, nearest: bool = False
) -> Float[Tensor, "row 3 {height} {width}"]:
    """The middle of images, with black around it where they are smaller; see `Preparation.nearest`."""
    high, wide = images.shape[-2:]
    if high < height or wide < width:
        above, left = math.ceil(max(0, height - high) / 2), math.ceil(max(0, width - wide) / 2)
        below, right = max(0, height - high) - above, max(0, width - wide) - left
        images = torch.nn.functional.pad(images, (left, right, above, below))
        high, wide = images.shape[-2:]
    top, left = (high - height) // 2, (wide - width) // 2
    if nearest:
        top, left = round((high - height) / 2), round((wide - width) / 2)
    return images[..., top : top + height, left : left + width]


def _size(processor: Any, given: Any) -> tuple[int | None, tuple[int, int] | None]:
    if isinstance(given, int):
        return None, (given, given)
    if isinstance(given, Mapping):
        found = {name: value for name, value in given.items() if value is not None}
        if set(found) == {"height", "width"}:
            return None, (int(found["height"]), int(found["width"]))
        if set(found) == {"shortest_edge"}:
            return int(found["shortest_edge"]), None
    raise ModelError(f"the processor {type(processor).__name__} has size={shown(given)}, which is not known here")
