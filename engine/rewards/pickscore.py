"""`pickscore`: what people would pick, by PickScore."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.rewards import known, weights
from rollflow.rewards.clip import clip
from rollflow.rewards.network import NetworkReward
from rollflow.rewards.towers import Towers
from rollflow.rewards.weights import Wanted

PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True)
class PickScore(NetworkReward):
    """PickScore: `scale cos(image, prompt)` of a CLIP ViT-H/14 tuned to half a million choices; differentiable.

    Kirstain et al. 2023, Pick-a-Pic, arXiv 2305.01569, section 3. `scale` is the learnt inverse temperature, about 100;
    the mean score of a text-to-image model is about 20 to 23, and the softmax over images of one prompt is the
    probability that each is picked.

    `transformers` does the work, as in the authors' example; their package only adds the training. Neither the hub nor
    their repository names a licence of the weights.

    Attributes:
        model: a CLIP of transformers.
        processor: hub id or folder of its tokenizer and image processor; None: the model's own, and where its folder
            has none, those of the CLIP that it was tuned from, which the authors' example takes.
    """

    kind: ClassVar[str] = "pickscore"
    differentiable: ClassVar[bool] = True

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = None

    def wanted(self) -> tuple[Wanted, ...]:
        """The model, and the processor where the model's folder holds none."""
        own = super().wanted()
        there = weights.here(*own[0])
        if self.processor is None and there is not None and _has_processor(there):
            return own
        return *own, _processor(self.processor or PROCESSOR)

    def variant(self) -> tuple[Any, ...]:
        """See `NetworkReward.variant`."""
        return (self.processor,)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Towers:
        """See `NetworkReward.load`."""
        return clip(self.kind, folder, self._processor(folder), device, dtype)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        towers = self.parts(images.device)
        return towers.scale * towers.cosines(images, prompts)

    def _processor(self, folder: Path) -> Path:
        if self.processor is None and _has_processor(folder):
            return folder
        return weights.folder(self.name, *_processor(self.processor or PROCESSOR))


def _has_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def _processor(model: str) -> Wanted:
    return Wanted(model, known.revision(model), ("*.json", "*.txt"))
