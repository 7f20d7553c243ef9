"""Vision transformers of open_clip as `CLIPModel` of transformers: the same layers under other names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BLOCK = {  # open_clip's names -> those of transformers' CLIPModel, within a layer; `attn.in_proj` becomes three
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_NAMES = {  # and outside of them
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)\.(\w+)")


def configuration(tensors: Mapping[str, Tensor], image_head: int, text_head: int) -> Any:
    """The configuration of a `CLIPModel` that has these tensors of open_clip.

    Args:
        tensors: by open_clip's names.
        image_head, text_head: channels of an attention head, which cannot be read off the tensors.
    """
    from transformers import CLIPConfig

    def tower(prefix: str, width: int, head: int) -> dict[str, Any]:
        layers = sum(name.startswith(f"{prefix}resblocks.") and name.endswith("in_proj_bias") for name in tensors)
        inner = tensors[f"{prefix}resblocks.0.mlp.c_fc.weight"].shape[0]
        size = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "hidden_act": "gelu"}
        return {**size, "num_attention_heads": width // head, "layer_norm_eps": 1e-5}

    patches = tensors["visual.conv1.weight"]
    side = math.isqrt(len(tensors["visual.positional_embedding"]) - 1) * patches.shape[-1]
    vision = tower("visual.transformer.", patches.shape[0], image_head)
    vocabulary, width = tensors["token_embedding.weight"].shape
    text = tower("transformer.", width, text_head)
    text |= {"vocab_size": vocabulary, "max_position_embeddings": len(tensors["positional_embedding"])}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    vision |= {"image_size": side, "patch_size": patches.shape[-1]}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=tensors["text_projection"].shape[1])


def mapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Open_clip's tensors by the names of `CLIPModel`; what is not known keeps its name, which the model refuses."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if layer := _LAYER.fullmatch(name):
            visual, number, part, kind = layer.groups()
            into = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
            if part == "attn" and kind.startswith("in_proj_"):
                for one, third in zip("qkv", value.chunk(3), strict=True):
                    found[f"{into}.self_attn.{one}_proj.{kind.removeprefix('in_proj_')}"] = third
            else:
                found[f"{into}.{_BLOCK.get(part, part)}.{kind}"] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.T
        else:
            found[_NAMES.get(name, name)] = value
    return found
