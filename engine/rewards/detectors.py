"""Zero-shot detectors: boxes of the objects that a text names, from Grounding DINO or OWLv2 of transformers.

Pictures stay tensors on their device. What the detectors' processors do to them is done here, and equals the processors
of the `pil` backend: Grounding DINO's sees 8-bit pictures that Pillow resized (`rollflow.rewards.pixels`), OWLv2's pads
them to a square below and to the right, and blurs and interpolates with scipy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from rollflow.errors import ModelError, shown
from rollflow.rewards.network import LOCAL, Remembered, loading, pretrained
from rollflow.rewards.pixels import Preparation


class Detections(NamedTuple):
    """What was found in one picture, on the CPU.

    Attributes:
        boxes: left, top, right and bottom in pixels; they may reach over the edge.
        scores: in (0, 1).
        classes: places in the names that were asked for.
    """

    boxes: Float[Tensor, "box 4"]
    scores: Float[Tensor, " box"]
    classes: Int[Tensor, " box"]

    def where(self, chosen: Bool[Tensor, " box"] | Int[Tensor, " some"]) -> Detections:
        """Some of them."""
        return Detections(self.boxes[chosen], self.scores[chosen], self.classes[chosen])


@runtime_checkable
class Detector(Protocol):
    """Finds what texts name.

    Attributes:
        threshold: score above which a box is usually taken for an object.
    """

    threshold: ClassVar[float]

    def __call__(
        self,
        images: Float[Tensor, "row 3 height width"],
        names: Sequence[tuple[str, ...]],
        threshold: float,
        text_threshold: float,
    ) -> list[Detections]:
        """The boxes of each image whose score is above `threshold`, for the names that are asked of it."""
        ...


def load(reward: str, folder: Path, device: torch.device, dtype: torch.dtype) -> Detector:
    """The detector of a folder; `reward` is for whom, in messages.

    Raises:
        ModelError: it is neither Grounding DINO nor OWLv2.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoTokenizer

    kinds: dict[str, Callable[..., Detector]] = {
        "grounding-dino": GroundingDino,
        "mm-grounding-dino": GroundingDino,
        "owlv2": Owlv2,
    }
    with loading(reward, folder):
        kind = AutoConfig.from_pretrained(folder, **LOCAL).model_type
        if kind not in kinds:
            raise ModelError(
                f"{shown(str(folder))} holds a model of type {kind!r}: the reward {reward} takes {', '.join(kinds)}"
            )
        network = pretrained(reward, AutoModelForZeroShotObjectDetection, folder, device, dtype)
        processor = AutoImageProcessor.from_pretrained(folder, **LOCAL)
        return kinds[kind](network, processor, AutoTokenizer.from_pretrained(folder, **LOCAL))


class GroundingDino:
    """Grounding DINO (Liu et al. 2023, arXiv 2303.05499): one text "a. b." for all names of an image.

    A box is of the one class whose words have tokens above `text_threshold`. The library decodes those tokens to a
    text, which equals a name only if all of its tokens are among them: there a "giraffe" is lost with its last
    syllable, here it is not. A box of two classes is of none, as there.
    """

    threshold: ClassVar[float] = 0.2  # of Kim et al. 2025, for their counting reward

    def __init__(self, network: Any, processor: Any, tokenizer: Any):
        self._network, self._tokenizer = network, tokenizer
        self._shortest, self._longest = processor.size["shortest_edge"], processor.size["longest_edge"]
        resample = getattr(processor.resample, "value", processor.resample)
        self._rest = (int(resample), None, tuple(processor.image_mean), tuple(processor.image_std))

    def pixels(self, images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row 3 h w"]:
        """What the processor makes of images in [0, 1]."""
        height, width = images.shape[-2:]
        size = within(height, width, self._shortest, self._longest)
        return Preparation(None, size, *self._rest)(images)

    def _text(self, names: Sequence[tuple[str, ...]]) -> tuple[dict[str, Tensor], Bool[Tensor, "row token class"]]:
        """The tokens of each image's text, and which belong to which of its names."""
        named = [[name.replace(".", " ").strip().lower() for name in those] for those in names]
        encoded = self._tokenizer(
            [". ".join(those) + "." for those in named],
            padding=True,
            truncation=True,
            max_length=self._network.config.max_text_len,
            return_offsets_mapping=True,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        start, end = encoded.pop("offset_mapping").unbind(-1)
        owner = torch.zeros((*start.shape, max(map(len, named))), dtype=torch.bool)
        for row, those in enumerate(named):
            at = 0
            for place, name in enumerate(those):
                owner[row, :, place] = (start[row] >= at) & (end[row] <= at + len(name)) & (end[row] > start[row])
                at += len(name) + 2
        return dict(encoded), owner

    def __call__(
        self,
        images: Float[Tensor, "row 3 height width"],
        names: Sequence[tuple[str, ...]],
        threshold: float,
        text_threshold: float,
    ) -> list[Detections]:
        """See `Detector`."""
        text, owner = self._text(names)
        device, (height, width) = images.device, images.shape[-2:]
        pixels = self.pixels(images)
        found = self._network(
            pixel_values=pixels.to(self._network.dtype),
            pixel_mask=torch.ones((len(pixels), *pixels.shape[-2:]), dtype=torch.int64, device=device),
            **{key: value.to(device) for key, value in text.items()},
        )
        probability = found.logits.float().sigmoid()
        scores = probability.amax(-1)
        above = (probability[..., : owner.shape[1]] > text_threshold).float() @ owner.to(device).float() > 0
        taken = (scores > threshold) & (above.sum(-1) == 1)
        scale = torch.tensor([width, height, width, height], device=device)
        return _each(corners(found.pred_boxes.float()) * scale, scores, above.int().argmax(-1), taken)


class Owlv2:
    """OWLv2 (Minderer et al. 2023, arXiv 2306.09683): each name is a query, "a photo of a NAME"."""

    threshold: ClassVar[float] = 0.1  # the library's

    def __init__(self, network: Any, processor: Any, tokenizer: Any):
        self._network, self._tokenizer = network, tokenizer
        self._size = (processor.size["height"], processor.size["width"])
        self._mean, self._deviation = processor.image_mean, processor.image_std
        self._queries = Remembered(self._embedded)

    def pixels(self, images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row 3 h w"]:
        """What the processor makes of images in [0, 1]."""
        height, width = images.shape[-2:]
        side = max(height, width)
        x = (images.double().clamp(0, 1) * 255).round() / 255
        x = functional.pad(x, (0, side - width, 0, side - height))
        down, across = (_blurred_and_zoomed(side, new, x.device) for new in self._size)
        x = (down @ x @ across.T).float()
        mean, deviation = (torch.tensor(v, device=x.device)[:, None, None] for v in (self._mean, self._deviation))
        return (x - mean) / deviation

    def _embedded(self, names: list[str]) -> Float[Tensor, "name channel"]:
        texts = [f"a photo of a {name}" for name in names]
        encoded = self._tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        owl = self._network.owlv2
        tokens = encoded.to(self._network.device)
        pooled = owl.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return functional.normalize(owl.text_projection(pooled), dim=-1)

    def __call__(
        self,
        images: Float[Tensor, "row 3 height width"],
        names: Sequence[tuple[str, ...]],
        threshold: float,
        text_threshold: float,
    ) -> list[Detections]:
        """See `Detector`; it has no use for `text_threshold`."""
        most = max(map(len, names))
        asked = torch.tensor([[place < len(those) for place in range(most)] for those in names], device=images.device)
        padded = [name for those in names for name in (*those, *those[:1] * (most - len(those)))]
        queries = self._queries(padded).unflatten(0, (-1, most))
        grid = self._network.image_embedder(self.pixels(images).to(self._network.dtype))[0]
        features = grid.flatten(1, 2)
        logits = self._network.class_predictor(features, queries, asked)[0].float()
        best = logits.max(-1)
        boxes = self._network.box_predictor(features, grid).float()
        scores = best.values.sigmoid()
        return _each(corners(boxes) * max(images.shape[-2:]), scores, best.indices, scores > threshold)


def _each(boxes: Tensor, scores: Tensor, classes: Tensor, taken: Tensor) -> list[Detections]:
    """The taken ones of each row, best first."""
    rows = []
    for row in zip(boxes.cpu(), scores.cpu(), classes.cpu(), taken.cpu(), strict=True):
        found = Detections(*row[:3]).where(row[3])
        rows.append(found.where(found.scores.argsort(descending=True, stable=True)))
    return rows


def corners(boxes: Float[Tensor, "*row box 4"]) -> Float[Tensor, "*row box 4"]:
    """Left, top, right and bottom of boxes that are given by centre, width and height."""
    centre, size = boxes.split(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def distinct(found: Detections, overlap: float) -> Detections:
    """Detections without those whose box overlaps a better one of its class (non-maximum suppression).

    Args:
        found: detections, best first.
        overlap: intersection over union that is still allowed; 1 keeps all.
    """
    size = (found.boxes[:, 2:] - found.boxes[:, :2]).clamp(min=0).prod(1)
    first = torch.maximum(found.boxes[:, None, :2], found.boxes[None, :, :2])
    last = torch.minimum(found.boxes[:, None, 2:], found.boxes[None, :, 2:])
    common = (last - first).clamp(min=0).prod(-1)
    same = (common / (size[:, None] + size - common)).nan_to_num() > overlap
    same &= found.classes[:, None] == found.classes
    kept = torch.ones(len(size), dtype=torch.bool)
    for place in range(len(size)):
        kept[place] = not (same[place, :place] & kept[:place]).any()
    return found.where(kept)


def within(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """The size to which DETR's processors resize: the shorter side is `shortest`, the longer at most `longest`."""
    short, long = sorted((height, width))
    exact = float(shortest)
    if long / short * shortest > longest:
        exact = longest * short / long
    side = round(exact)
    if short == side:
        return height, width
    other = int(exact * long / short)
    return (side, other) if height <= width else (other, side)


@lru_cache(maxsize=64)
def _blurred_and_zoomed(old: int, new: int, device: torch.device) -> Float64[Tensor, "{new} {old}"]:
    """One axis of OWLv2's resizing as a matrix: scipy's Gaussian blur if it shrinks, then its linear interpolation."""
    each = np.eye(old)
    if old > new:
        each = ndimage.gaussian_filter1d(each, (old / new - 1) / 2, axis=0, mode="mirror")
    matrix = ndimage.zoom(each, (new / old, 1), order=1, mode="mirror", grid_mode=True)
    with torch.inference_mode(False):
        return torch.tensor(matrix, dtype=torch.float64, device=device)
