"""`hps`: what people prefer, by HPSv2 and HPSv2.1."""

from __future__ import annotations

import html
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import RequestError, shown
from rollflow.rewards import checkpoint, openclip, published
from rollflow.rewards.network import NetworkReward, frozen, imported, loading
from rollflow.rewards.pixels import Preparation
from rollflow.rewards.towers import Towers, tokens
from rollflow.rewards.weights import Wanted

CHECKPOINTS = {"2": "HPS_v2_compressed", "2.0": "HPS_v2_compressed", "2.1": "HPS_v2.1_compressed"}
HEADS = (80, 64)  # channels of an attention head of ViT-H-14: of images, of text
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class HPS(NetworkReward):
    """The human preference score v2: the cosine of an image's and its prompt's embedding.

    Wu et al. 2023, arXiv 2306.09341: open_clip's ViT-H-14, tuned to 798 thousand choices between images of one prompt.
    Images of models score about 0.2 to 0.35; the paper prints a hundred times that.

    The arithmetic is that of the authors' package `hpsv2` (1.2.0, `img_score`). Neither it nor open_clip does the work:
    both import torchvision, and the package fetches 4 GB of a CLIP that it then overwrites. `CLIPModel` of transformers
    has the same layers; the published names become its own as it is loaded. The authors publish a torch pickle alone:
    it is read with `weights_only=True`; a .safetensors file of the same names beside it is preferred. Images are
    resized as tensors, with antialiasing, as the package does with torchvision since 0.17; older figures lack it.

    Attributes:
        version: "2.1", tuned to more and better choices, or "2".
        tokenizer: a hub id or a folder with CLIP's vocabulary; not asked for where the folder `model` has one.
    """

    kind: ClassVar[str] = "hps"
    differentiable: ClassVar[bool] = True

    model: str = "xswu/HPSv2"
    version: str = "2.1"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in CHECKPOINTS:
            other = "; version 3 is another network, the reward hpsv3" if self.version.startswith("3") else ""
            raise RequestError(f"hps: version={shown(self.version)}: choose 2.1 or 2{other}")

    @property
    def files(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `NetworkReward.files`."""
        return (f"{CHECKPOINTS[self.version]}.*",)

    def wanted(self) -> tuple[Wanted, ...]:
        """The checkpoint, and the tokenizer where it is elsewhere."""
        return published.with_vocabulary(super().wanted(), self.model, self.tokenizer)

    def check(self, prompt: str) -> None:
        """Looks for the checkpoint and the tokenizer, and for ftfy, with which prompts beyond ASCII are cleaned."""
        super().check(prompt)
        published.file(self.kind, self.folder, CHECKPOINTS[self.version])
        published.vocabulary(self.kind, self.wanted()[-1])
        if not prompt.isascii():
            imported(self.kind, ["ftfy"])

    def variant(self) -> tuple[Any, ...]:
        """See `NetworkReward.variant`."""
        return self.version, self.tokenizer

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Towers:
        """See `NetworkReward.load`."""
        path = published.file(self.kind, folder, CHECKPOINTS[self.version])
        with loading(self.kind, path):
            from transformers import CLIPModel, CLIPTokenizer

            tensors = checkpoint.tensors(self.kind, Wanted(str(path)))
            config, named = openclip.configuration(tensors, *HEADS), openclip.mapped(tensors)
            network = published.filled(self.kind, CLIPModel, config, named)
            tokenizer = CLIPTokenizer.from_pretrained(published.vocabulary(self.kind, self.wanted()[-1]))
            return towers(frozen(network, device, dtype), tokenizer)

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        return self.parts(images.device).cosines(images, prompts)


def towers(network: Any, tokenizer: Any) -> Towers:
    """The towers of a `CLIPModel` as open_clip runs them."""
    length = network.config.text_config.max_position_embeddings
    prepare = preparation(network.config.vision_config.image_size)

    def image(images: Float[Tensor, "row 3 height width"]) -> Float[Tensor, "row channel"]:
        pooled = network.vision_model(pixel_values=prepare(images).to(network.dtype)).pooler_output
        return network.visual_projection(pooled)

    def text(prompts: list[str]) -> Float[Tensor, "prompt channel"]:
        cleaned = [clean(prompt) for prompt in prompts]
        ids = tokens(tokenizer, cleaned, length, network.device, padding="max_length")["input_ids"]
        hidden = network.text_model(input_ids=ids).last_hidden_state
        ends = ids.argmax(1)  # the end's token is the highest, and what follows it is padding
        return network.text_projection(hidden[torch.arange(len(ids), device=ids.device), ends])

    return Towers(network.device, image, text, 1.0)


def preparation(side: int) -> Preparation:
    """What `hpsv2` does to pictures: resized as tensors, not in 8 bits."""
    return Preparation(side, None, 3, (side, side), MEAN, DEVIATION, bits=False, nearest=True)


def clean(prompt: str) -> str:
    """A prompt as open_clip's tokenizer cleans it; plain ASCII needs no mending by ftfy."""
    if not prompt.isascii():
        prompt = import_module("ftfy").fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split()).lower()
