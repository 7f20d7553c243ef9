"""`clip`: how well an image fits its prompt, by CLIP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.rewards.network import LOCAL, NetworkReward, frozen, loading, pretrained
from rollflow.rewards.pixels import Preparation
from rollflow.rewards.towers import Towers, tokens


@dataclass(frozen=True)
class ClipReward(NetworkReward):
    """CLIPScore: `scale max(cos(image, prompt), 0)` of CLIP's embeddings; differentiable where the cosine is above 0.

    Hessel et al. 2021, arXiv 2104.08718, equation 1, with their w = 2.5; scores of prompts and images that fit are
    about 0.5 to 0.8. The authors judged captions with ViT-B/32 and put "A photo depicts" before each (`prefix`); for
    text-to-image the plain prompt and ViT-L/14 are the custom, and the default.

    `transformers` does the work. torchmetrics' `CLIPScore` is 100 cos, here `scale=100`; it was not taken because it
    runs its processor on the CPU, without gradients, embeds each prompt anew, cuts long prompts without their end
    token, from which CLIP reads the embedding, and (1.9) fails with transformers 5. The authors' package wants OpenAI's
    `clip`, which is not kept.

    Attributes:
        model: a CLIP of transformers, with its processor.
        scale: w; 100 gives the percentages that torchmetrics reports.
        prefix: stands before each prompt.
    """

    kind: ClassVar[str] = "clip"
    differentiable: ClassVar[bool] = True

    model: str = "openai/clip-vit-large-patch14"
    scale: float = 2.5
    prefix: str = ""

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Towers:
        """See `NetworkReward.load`."""
        return clip(self.kind, folder, folder, device, dtype)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        cosines = self.parts(images.device).cosines(images, [self.prefix + prompt for prompt in prompts])
        return self.scale * cosines.clamp(min=0)


def clip(reward: str, folder: Path, processor: Path, device: torch.device, dtype: torch.dtype) -> Towers:
    """The towers of a CLIP of transformers.

    Args:
        reward: for whom, in messages.
        folder: of its weights.
        processor: of its tokenizer and image processor.
        device, dtype: of its network.
    """
    from transformers import AutoTokenizer, CLIPModel

    network = pretrained(reward, CLIPModel, folder, torch.device("cpu"), torch.float32)
    scale = float(network.logit_scale.exp())  # before it is rounded
    network = frozen(network, device, dtype)
    with loading(reward, processor):
        tokenizer = AutoTokenizer.from_pretrained(processor, **LOCAL)
    length = network.config.text_config.max_position_embeddings

    def text(prompts: list[str]) -> Tensor:
        given = tokens(tokenizer, prompts, length, device, padding=True)
        pooled = network.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).pooler_output
        return network.text_projection(pooled)

    return Towers(device, images_of(reward, network, processor), text, scale)


def images_of(reward: str, network: Any, processor: Path) -> Callable[[Tensor], Tensor]:
    """From images in [0, 1] to their embeddings `[row, channel]`, of a CLIP of transformers."""
    from transformers import AutoImageProcessor

    with loading(reward, processor):
        prepare = Preparation.of(AutoImageProcessor.from_pretrained(processor, **LOCAL))

    def image(images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row channel"]:
        pooled = network.vision_model(pixel_values=prepare(images).to(network.dtype)).pooler_output
        return network.visual_projection(pooled)

    return image
