"""`imagereward`: what people prefer, by ImageReward."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rollflow.rewards import checkpoint, published
from rollflow.rewards.hps import DEVIATION, MEAN
from rollflow.rewards.network import NetworkReward, Remembered, frozen, loading
from rollflow.rewards.pixels import Preparation
from rollflow.rewards.weights import Wanted

CHECKPOINT = "ImageReward"
HEAD = 64  # channels of an attention head, of BLIP's and of BERT's
TOKENS = 35  # of a prompt; the rest is cut
AVERAGE, SPREAD = 0.16717362830052426, 1.0333394966054072  # of raw scores over the authors' data

_VISION = {  # the authors' names -> those of transformers' BlipVisionModel
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}
_IMAGE = re.compile(r"blip\.visual_encoder\.(?:blocks\.(\d+)\.)?(.+?)(|\.weight|\.bias)")
_TEXT, _HEAD = "blip.text_encoder.", "mlp.layers."


class Parts(NamedTuple):
    """What `ImageReward` loads."""

    vision: Any
    text: Any
    head: nn.Module
    prepare: Preparation
    tokens: Remembered


@dataclass(frozen=True)
class ImageReward(NetworkReward):
    """ImageReward-v1.0: how much people would like an image for its prompt, in deviations from the average.

    Xu et al. 2023, arXiv 2304.05977: BLIP's large image encoder, its text encoder with cross-attention to the image,
    and five linear layers on the first token, `(head(h) - 0.167) / 1.033`; trained on 137 thousand comparisons. Scores
    are mostly between -2.5 and 2.

    The arithmetic is that of the authors' package `image-reward` (1.5, `ImageReward.score`), which wants timm 0.6.13,
    fairscale and functions that transformers 5 has dropped; transformers' own BLIP has the same layers, and the
    published names become its own as it is loaded. The authors publish a torch pickle alone: it is read with
    `weights_only=True`; a .safetensors file of the same names beside it is preferred.

    Attributes:
        tokenizer: a hub id or a folder with BERT's vocabulary; not asked for where the folder `model` has one.
    """

    kind: ClassVar[str] = "imagereward"
    differentiable: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = (f"{CHECKPOINT}.*",)

    model: str = "zai-org/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"

    def wanted(self) -> tuple[Wanted, ...]:
        """The checkpoint, and the tokenizer where it is elsewhere."""
        return published.with_vocabulary(super().wanted(), self.model, self.tokenizer)

    def check(self, prompt: str) -> None:
        """Looks for the checkpoint and the tokenizer."""
        super().check(prompt)
        published.file(self.kind, self.folder, CHECKPOINT)
        published.vocabulary(self.kind, self.wanted()[-1])

    def variant(self) -> tuple[Any, ...]:
        """See `NetworkReward.variant`."""
        return (self.tokenizer,)

    def load(self, folder: Path, device: torch.device, dtype: torch.dtype) -> Parts:
        """See `NetworkReward.load`."""
        path = published.file(self.kind, folder, CHECKPOINT)
        with loading(self.kind, path):
            from transformers import BertTokenizer

            vision, text, head = filled(checkpoint.tensors(self.kind, Wanted(str(path))))
            vision, text = frozen(vision, device, dtype), frozen(text, device, dtype)
            head = frozen(head, device, torch.float32)
            tokenizer = BertTokenizer.from_pretrained(published.vocabulary(self.kind, self.wanted()[-1]))
            tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)  # BLIP's marks, which no prompt should have
            side = vision.config.image_size
            prepare = Preparation(side, None, 3, (side, side), MEAN, DEVIATION, nearest=True)
            return Parts(vision, text, head, prepare, Remembered(lambda prompts: _tokens(tokenizer, prompts)))

    def score(self, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Float[Tensor, " row"]:
        """See `FrameReward.score`."""
        vision, text, head, prepare, tokens = self.parts(images.device)
        pixels = prepare(images.to(vision.device)).to(vision.dtype)
        ids, mask = tokens(prompts).to(vision.device).unbind(1)
        seen = vision(pixel_values=pixels).last_hidden_state
        read = text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        return (head(read[:, 0].float()).squeeze(1) - AVERAGE) / SPREAD


def _tokens(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Tokens and mask of prompts, `[prompt, 2, token]`."""
    found = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return torch.stack([found.input_ids, found.attention_mask], 1)


def filled(tensors: Mapping[str, Tensor]) -> tuple[Any, Any, nn.Module]:
    """The image encoder, the text encoder and the head of the authors' tensors.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape.
    """
    from transformers import BlipTextModel, BlipVisionModel

    vision, text, linear = mapped(tensors)
    pause = nn.Identity()  # where the authors' dropout is
    of_vision, of_text = configurations(vision, text)
    return (
        published.filled(ImageReward.kind, BlipVisionModel, of_vision, vision),
        published.filled(ImageReward.kind, BlipTextModel, of_text, text, add_pooling_layer=False),
        published.head(ImageReward.kind, linear, (None, pause, None, pause, None, pause, None, None)),
    )


def mapped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The authors' tensors for `BlipVisionModel`, `BlipTextModel` and the head; BLIP's projections are not used."""
    vision: dict[str, Tensor] = {}
    text: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if found := _IMAGE.fullmatch(name):
            block, part, kind = found.groups()
            into = f"encoder.layers.{block}." if block else ""
            vision[f"{into}{_VISION.get(part, part)}{kind}"] = value
        elif name.startswith(_HEAD):
            head[name.removeprefix(_HEAD)] = value
        elif name.startswith(_TEXT) and not name.endswith("position_ids"):
            text[name.removeprefix(_TEXT)] = value
    return vision, text, head


def configurations(vision: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Those of `BlipVisionModel` and `BlipTextModel` with these tensors."""
    from transformers import BlipTextConfig, BlipVisionConfig

    patches, places = vision["embeddings.patch_embedding.weight"], vision["embeddings.position_embedding"]
    inner = vision["encoder.layers.0.mlp.fc1.weight"].shape[0]
    width = patches.shape[0]
    of_vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=sum(name.endswith("self_attn.qkv.weight") for name in vision),
        num_attention_heads=width // HEAD,
        image_size=math.isqrt(places.shape[1] - 1) * patches.shape[-1],
        patch_size=patches.shape[-1],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    words, hidden = text["embeddings.word_embeddings.weight"].shape
    of_text = BlipTextConfig(
        vocab_size=words,
        hidden_size=hidden,
        encoder_hidden_size=width,
        intermediate_size=text["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("crossattention.self.query.weight") for name in text),
        num_attention_heads=hidden // HEAD,
        max_position_embeddings=text["embeddings.position_embeddings.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # else it has no cross-attention
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    return of_vision, of_text
