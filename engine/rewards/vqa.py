"""`vqa`: whether a vision-language model answers yes when it is asked if the image shows the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError, shown
from rollflow.rewards import clip_flant5, weights
from rollflow.rewards.clip_flant5 import ClipFlanT5
from rollflow.rewards.network import NetworkReward
from rollflow.rewards.vision_language import VisionLanguage
from rollflow.rewards.weights import Wanted

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'


class _Parts(NamedTuple):
    device: torch.device
    asks: ClipFlanT5 | VisionLanguage


@dataclass(frozen=True)
class VqaReward(NetworkReward):
    """VQAScore: the probability, in [0, 1], that a model's answer is "Yes" to whether the image shows the prompt.

        score = P("Yes" | image, 'Does this figure show "PROMPT"? Please answer yes or no.')

    Lin et al. 2024, arXiv 2404.01291, equation 2. For an image-text-to-text model of transformers it is the softmax of
    the logits that the model predicts after its chat template, over the whole vocabulary, at the first token of the
    answer. As in the authors' package `t2v-metrics` 3.0, nothing is summed over spellings: " Yes" and "yes" are other
    answers. Unlike there, for its Qwen models, no repetition penalty changes the logits, and their question, 'Does this
    image show "{}"?', is not the paper's. For CLIP-FlanT5 see `rollflow.rewards.clip_flant5`: there it is the geometric
    mean of the probabilities of the answer's tokens, the end of the sentence included, as the authors have it.

    `transformers` does the work, and its `generate` the one token. t2v-metrics asks for torch 2.5 and transformers 4.49
    exactly, reads images from files, and runs these models one image at a time.

    The usual model is Qwen2.5-VL-7B, t2v-metrics' own choice of that family, under Apache-2.0. The 3B model is faster
    and less exact; its licence forbids commercial use. Prompts are not cut. No gradient.

    Attributes:
        model: an image-text-to-text model of transformers with its processor, or zhiqiulin/clip-flant5-xxl or -xl.
        dtype: of the network; "auto": bfloat16 on a GPU, else float32.
        batch: the most images of a call.
        question: in which {} stands for the prompt.
        answer: whose probability is the score.
    """

    kind: ClassVar[str] = "vqa"

    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    dtype: str = "auto"
    batch: int | None = 16
    question: str = QUESTION
    answer: str = "Yes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.answer.strip() or not self.question.strip():
            raise RequestError(
                f"vqa: question={shown(self.question)}, answer={shown(self.answer)}: they must not be empty"
            )

    def wanted(self) -> tuple[Wanted, ...]:
        """See `NetworkReward.wanted`."""
        if clip_flant5.is_one(self.model):
            return clip_flant5.wanted(self.model, self.revision or self.pinned())
        return super().wanted()

    @property
    def folder(self) -> Path:
        """See `NetworkReward.folder`."""
        return weights.folder(self.name, *self.wanted()[0])

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> _Parts:
        """See `NetworkReward.load`."""
        if clip_flant5.is_one(self.model):
            vision = weights.folder(self.name, *self.wanted()[1])
            return _Parts(device, ClipFlanT5(self.kind, folder, vision, device, dtype))
        return _Parts(device, VisionLanguage(self.kind, folder, device, dtype))

    @torch.no_grad()
    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        device, asks = self.parts(images.device)
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        return asks.probability(images.to(device), questions, self.answer).to(images.device)
