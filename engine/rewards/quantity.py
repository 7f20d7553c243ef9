"""`count:model=...`: the numbers of objects that a prompt names against those that a detector finds in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rollflow.errors import RequestError, shown
from rollflow.rewards import detectors, known, phrases, weights
from rollflow.rewards.count import CountReward
from rollflow.rewards.detectors import Detections, Detector
from rollflow.rewards.network import NetworkReward
from rollflow.rewards.protocol import Reward
from rollflow.rewards.segments import Segmenter
from rollflow.rewards.weights import Wanted


class Parts(NamedTuple):
    """The networks of a reward that detects, and where they are."""

    device: torch.device
    detector: Detector
    segmenter: Segmenter | None


@dataclass(frozen=True)
class DetectionReward(NetworkReward):
    """A reward that looks for objects.

    Attributes:
        model: Grounding DINO or OWLv2 of transformers, with its processor.
        batch: the most images of a call.
        threshold: score above which a box is an object; None: 0.2 for Grounding DINO (Kim et al. 2025), 0.1 for OWLv2
            (the library's).
        text_threshold: score above which Grounding DINO takes a word for one that the box is of.
        nms: intersection over union above which the worse of two boxes of a class is dropped; 1: none is.
        masks: Segment Anything, `facebook/sam-vit-base` for example: what it segments is used too; None: boxes alone.
    """

    model: str = "IDEA-Research/grounding-dino-base"
    batch: int | None = 8
    threshold: float | None = None
    text_threshold: float = 0.2
    nms: float = 0.5
    masks: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "text_threshold", "nms"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise RequestError(f"{self.kind}: {name}={value:g}: it must be from 0 to 1")

    def wanted(self) -> tuple[Wanted, ...]:
        """See `NetworkReward.wanted`."""
        masks = () if self.masks is None else (Wanted(self.masks, known.revision(self.masks), self.files),)
        return (*super().wanted(), *masks)

    def variant(self) -> tuple[Any, ...]:
        """See `NetworkReward.variant`."""
        return (self.masks,)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Parts:
        """See `NetworkReward.load`."""
        detector = detectors.load(self.kind, folder, device, dtype)
        if self.masks is None:
            return Parts(device, detector, None)
        masks = weights.folder(self.name, *self.wanted()[1])
        return Parts(device, detector, Segmenter.load(self.kind, masks, device, dtype))

    def detections(
        self, parts: Parts, images: Float[Tensor, "row 3 height width"], names: Sequence[tuple[str, ...]]
    ) -> list[Detections]:
        """What the detector finds in images on its device, best first, without boxes of the same object."""
        threshold = parts.detector.threshold if self.threshold is None else self.threshold
        found = parts.detector(images, names, threshold, self.text_threshold)
        return [detectors.distinct(each, self.nms) for each in found]


@dataclass(frozen=True)
class QuantityReward(DetectionReward):
    """Minus the residual sum of squares between the objects that a prompt names and those that are detected.

        score = -sum over the classes c of the prompt of (n_c - detected_c)^2

    The counting reward of Kim et al. 2025 (arXiv 2503.19385, section 6), 0 at best. A prompt names objects by numbers
    and articles: "three red apples and a dog", "no people", and "on a table" asks for a table
    (`rollflow.rewards.phrases`); what it does not name is not counted. As in the authors' code, a box counts whose
    score is above `share` of the best of its class or above `sure`, and with `masks` a box is dropped whose mask is
    mostly covered by smaller ones of its class, or by better ones of any. Their procedure is
    `count:model=IDEA-Research/grounding-dino-base,masks=facebook/sam-vit-base,nms=1`.

    `transformers` runs the detectors; see `rollflow.rewards.detectors`. No gradient.

    Attributes:
        share, sure: as above; share=0 keeps all boxes above `threshold`.
    """

    kind: ClassVar[str] = "count"
    always: ClassVar[tuple[str, ...]] = ("model",)  # without one it is another reward

    share: float = 0.6
    sure: float = 0.32

    def check(self, prompt: str) -> None:
        """Raises `RequestError` if the prompt names no number of objects; see `NetworkReward.check`."""
        asked(prompt)
        super().check(prompt)

    @torch.no_grad()
    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        parts = self.parts(images.device)
        images, wanted = images.to(parts.device), [asked(prompt) for prompt in prompts]
        scores = []
        for image, found, those in zip(
            images, self.detections(parts, images, [tuple(each) for each in wanted]), wanted, strict=True
        ):
            found = found.where(self._clear(found))
            if parts.segmenter is not None and len(found.boxes):
                found = found.where(uncovered(parts.segmenter(image, found.boxes).cpu(), found))
            counts = found.classes.bincount(minlength=len(those))
            scores.append(-(counts - torch.tensor([*those.values()])).square().sum())
        return torch.stack(scores).to(images.device, torch.float32)

    def _clear(self, found: Detections) -> Bool[Tensor, " box"]:
        """The boxes whose score is not far below the best of their class."""
        best = torch.zeros(int(found.classes.amax()) + 1 if len(found.classes) else 0)
        best = best.scatter_reduce(0, found.classes, found.scores, "amax")
        return (found.scores > self.share * best[found.classes]) | (found.scores > self.sure)


def uncovered(masks: Bool[Tensor, "box height width"], found: Detections) -> Bool[Tensor, " box"]:
    """The detections whose mask is an object of its own, by the rule of Kim et al. 2025.

    Within a class, from the smallest on, one of which half or more is covered by those kept so far is dropped; of those
    kept, one of which half or more belongs to a better one, of any class.
    """
    area = masks.flatten(1).sum(1)
    kept = torch.zeros(len(masks), dtype=torch.bool)
    best = torch.zeros(masks.shape[1:])
    for one in found.classes.unique():
        covered = torch.zeros(masks.shape[1:], dtype=torch.bool)
        for place in area.argsort(stable=True).tolist():
            mask = masks[place]
            if found.classes[place] == one and 2 * (mask & ~covered).sum() > area[place]:
                kept[place] = True
                covered |= mask
                best[mask] = best[mask].clamp(min=float(found.scores[place]))
    for place in kept.nonzero()[:, 0].tolist():
        kept[place] = 2 * (best[masks[place]] > found.scores[place]).sum() < area[place]
    return kept


@lru_cache(maxsize=4096)
def asked(prompt: str) -> dict[str, int]:
    """How many of each kind a prompt names; raises `RequestError` if none."""
    found: dict[str, int] = {}
    for group in phrases.groups(prompt):
        found[group.name] = found.get(group.name, 0) + group.count
    if not found:
        raise RequestError(
            f"the reward count compares numbers of objects, and {shown(prompt)} names none: say how many, as in "
            "'three dogs and a cat', or choose another reward"
        )
    return found


def count(
    model: str | None = None,
    revision: str | None = None,
    frames: str = "mean",
    device: str | None = None,
    dtype: str = "float32",
    batch: int | None = 8,
    threshold: float | None = None,
    text_threshold: float = 0.2,
    nms: float = 0.5,
    masks: str | None = None,
    share: float = 0.6,
    sure: float = 0.32,
) -> Reward:
    """Minus the squared errors of the numbers of objects, summed over their kinds: 0 is exactly what was asked for.

    One circle too few is -1, two too many are -4, and both at once are -5. Without a model it judges pictures of the
    built-in model, where whatever is no whole shape counts as a kind of which none was asked for; with one, real images
    by a detector, and what the prompt does not name is not counted.
    """
    given = dict(locals())
    if model is not None:
        return QuantityReward(**given)
    usual = {f.name: f.default for f in fields(QuantityReward)} | {"model": None}
    options = [name for name, value in given.items() if value != usual[name]]
    if options:
        raise RequestError(
            f"the reward count has {', '.join(options)} without a model, and counts the shapes of the built-in model: "
            f"for real images add model={DetectionReward.model}"
        )
    return CountReward()
