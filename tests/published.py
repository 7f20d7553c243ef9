"""Checkpoints as the authors of preference rewards publish them: names, shapes, and their arithmetic in plain torch."""

import math

import torch
from torch.nn.functional import gelu, layer_norm, linear, normalize

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def filled(shapes, seed=0, gain=1.0):
    """Random tensors of these shapes: matrices of about unit gain, scales near one."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, value in tensors.items():
        if value.ndim > 1:
            value.mul_(gain / math.sqrt(value[0].numel()))
        else:
            value.mul_(0.2).add_(1.0 if name.endswith(("weight", "logit_scale")) else 0.0)
    return tensors


def meta(shapes):
    """Tensors of these shapes without values."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def attended(queries, keys, values, heads, mask=None):
    """Scaled dot-product attention, written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


# HPSv2: a CLIP of open_clip.


def open_clip(embed=1024, image=224, patch=14, vision=(1280, 32), text=(1024, 24), words=49408, context=77):
    """Names and shapes of a CLIP of open_clip; by default of its ViT-H-14, which HPSv2 is."""

    def blocks(prefix, width, layers):
        found = {}
        for layer in range(layers):
            into = f"{prefix}transformer.resblocks.{layer}."
            found |= _norm(f"{into}ln_1", width) | _norm(f"{into}ln_2", width)
            found |= {f"{into}attn.in_proj_weight": (3 * width, width), f"{into}attn.in_proj_bias": (3 * width,)}
            found |= _linear(f"{into}attn.out_proj", width, width)
            found |= _linear(f"{into}mlp.c_fc", 4 * width, width) | _linear(f"{into}mlp.c_proj", width, 4 * width)
        return found

    (wide, deep), (width, layers) = vision, text
    return {
        "positional_embedding": (context, width),
        "text_projection": (width, embed),
        "logit_scale": (),
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": ((image // patch) ** 2 + 1, wide),
        "visual.proj": (wide, embed),
        "visual.conv1.weight": (wide, 3, patch, patch),
        **_norm("visual.ln_pre", wide),
        **blocks("visual.", wide, deep),
        **_norm("visual.ln_post", wide),
        **blocks("", width, layers),
        "token_embedding.weight": (words, width),
        **_norm("ln_final", width),
    }


class OpenClip:
    """A CLIP of open_clip: `cosine(pixels, ids)`."""

    def __init__(self, tensors, image_heads, text_heads):
        self.w, self.image_heads, self.text_heads = tensors, image_heads, text_heads

    def _norm(self, name, x):
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def _linear(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _blocks(self, prefix, x, heads, mask=None):
        layer = 0
        while f"{prefix}transformer.resblocks.{layer}.ln_1.weight" in self.w:
            at = f"{prefix}transformer.resblocks.{layer}."
            q, k, v = linear(
                self._norm(f"{at}ln_1", x), self.w[f"{at}attn.in_proj_weight"], self.w[f"{at}attn.in_proj_bias"]
            ).chunk(3, -1)
            x = x + self._linear(f"{at}attn.out_proj", attended(q, k, v, heads, mask))
            inner = gelu(self._linear(f"{at}mlp.c_fc", self._norm(f"{at}ln_2", x)))
            x = x + self._linear(f"{at}mlp.c_proj", inner)
            layer += 1
        return x

    def cosine(self, pixels, ids):
        kernel = self.w["visual.conv1.weight"]
        x = torch.nn.functional.conv2d(pixels, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        first = self.w["visual.class_embedding"].expand(len(x), 1, -1)
        x = self._norm("visual.ln_pre", torch.cat([first, x], 1) + self.w["visual.positional_embedding"])
        x = self._blocks("visual.", x, self.image_heads)[:, 0]
        image = self._norm("visual.ln_post", x) @ self.w["visual.proj"]
        y = self.w["token_embedding.weight"][ids] + self.w["positional_embedding"]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        y = self._norm("ln_final", self._blocks("", y, self.text_heads, causal))
        text = y[torch.arange(len(ids)), ids.argmax(1)] @ self.w["text_projection"]
        return (normalize(image, dim=1) * normalize(text, dim=1)).sum(1)


# ImageReward: BLIP and a head.


def image_reward(image=224, patch=16, vision=(1024, 24), text=(768, 12), inner=3072, words=30524, places=512):
    """Names and shapes of an ImageReward; by default of v1.0."""
    (wide, deep), (width, layers) = vision, text
    eyes = {"cls_token": (1, 1, wide), "pos_embed": (1, (image // patch) ** 2 + 1, wide)}
    eyes |= {"patch_embed.proj.weight": (wide, 3, patch, patch), "patch_embed.proj.bias": (wide,)}
    for block in range(deep):
        at = f"blocks.{block}."
        eyes |= _norm(f"{at}norm1", wide) | _linear(f"{at}attn.qkv", 3 * wide, wide)
        eyes |= _linear(f"{at}attn.proj", wide, wide) | _norm(f"{at}norm2", wide)
        eyes |= _linear(f"{at}mlp.fc1", 4 * wide, wide) | _linear(f"{at}mlp.fc2", wide, 4 * wide)
    eyes |= _norm("norm", wide)
    words_ = {"embeddings.position_ids": (1, places), "embeddings.word_embeddings.weight": (words, width)}
    words_ |= {"embeddings.position_embeddings.weight": (places, width)} | _norm("embeddings.LayerNorm", width)
    for layer in range(layers):
        at = f"encoder.layer.{layer}."
        for kind, source in (("attention", width), ("crossattention", wide)):
            words_ |= _linear(f"{at}{kind}.self.query", width, width)
            words_ |= _linear(f"{at}{kind}.self.key", width, source)
            words_ |= _linear(f"{at}{kind}.self.value", width, source)
            words_ |= _linear(f"{at}{kind}.output.dense", width, width) | _norm(f"{at}{kind}.output.LayerNorm", width)
        words_ |= _linear(f"{at}intermediate.dense", inner, width) | _linear(f"{at}output.dense", width, inner)
        words_ |= _norm(f"{at}output.LayerNorm", width)
    sizes = [width, 1024, 128, 64, 16, 1]
    head = {}
    for place, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        head |= _linear(f"mlp.layers.{place}", outputs, inputs)
    return {
        **{f"blip.visual_encoder.{name}": shape for name, shape in eyes.items()},
        **{f"blip.text_encoder.{name}": shape for name, shape in words_.items()},
        **_linear("blip.vision_proj", 256, wide),
        **_linear("blip.text_proj", 256, width),
        **head,
    }


class ImageRewardNet:
    """ImageReward: `score(pixels, ids, mask)`."""

    def __init__(self, tensors, image_heads, text_heads):
        self.w, self.image_heads, self.text_heads = tensors, image_heads, text_heads

    def _norm(self, name, x, eps):
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps)

    def _linear(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _seen(self, pixels):
        at = "blip.visual_encoder."
        kernel = self.w[f"{at}patch_embed.proj.weight"]
        x = torch.nn.functional.conv2d(pixels, kernel, self.w[f"{at}patch_embed.proj.bias"], kernel.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.w[f"{at}cls_token"].expand(len(x), -1, -1), x], 1) + self.w[f"{at}pos_embed"]
        block = 0
        while (into := f"{at}blocks.{block}.") + "norm1.weight" in self.w:
            q, k, v = self._linear(f"{into}attn.qkv", self._norm(f"{into}norm1", x, 1e-6)).chunk(3, -1)
            x = x + self._linear(f"{into}attn.proj", attended(q, k, v, self.image_heads))
            inner = gelu(self._linear(f"{into}mlp.fc1", self._norm(f"{into}norm2", x, 1e-6)))
            x = x + self._linear(f"{into}mlp.fc2", inner)
            block += 1
        return self._norm(f"{at}norm", x, 1e-6)

    def _read(self, into, x, source, mask):
        q, k, v = (self._linear(f"{into}.self.{n}", s) for n, s in (("query", x), ("key", source), ("value", source)))
        out = self._linear(f"{into}.output.dense", attended(q, k, v, self.text_heads, mask))
        return self._norm(f"{into}.output.LayerNorm", out + x, 1e-12)

    def score(self, pixels, ids, mask):
        seen, at = self._seen(pixels), "blip.text_encoder."
        x = self.w[f"{at}embeddings.word_embeddings.weight"][ids]
        x = x + self.w[f"{at}embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self._norm(f"{at}embeddings.LayerNorm", x, 1e-12)
        layer = 0
        while (into := f"{at}encoder.layer.{layer}.") + "output.dense.weight" in self.w:
            x = self._read(f"{into}attention", x, x, mask.bool()[:, None, None])
            x = self._read(f"{into}crossattention", x, seen, None)
            inner = self._linear(f"{into}output.dense", gelu(self._linear(f"{into}intermediate.dense", x)))
            x = self._norm(f"{into}output.LayerNorm", inner + x, 1e-12)
            layer += 1
        x = x[:, 0]
        for place in (0, 2, 4, 6, 7):
            x = self._linear(f"mlp.layers.{place}", x)
        return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


# HPSv3: Qwen2-VL as transformers 4.45 named it, and a head.


def hpsv3(width=3584, inner=18944, layers=28, keys=512, words=151658, vision=(1280, 32), patch=14, ratio=4):
    """Names and shapes of an HPSv3; by default of the published one, on Qwen2-VL-7B."""
    wide, deep = vision
    found = {"visual.patch_embed.proj.weight": (wide, 3, 2, patch, patch)}
    for block in range(deep):
        at = f"visual.blocks.{block}."
        found |= _norm(f"{at}norm1", wide) | _norm(f"{at}norm2", wide) | _linear(f"{at}attn.qkv", 3 * wide, wide)
        found |= _linear(f"{at}attn.proj", wide, wide)
        found |= _linear(f"{at}mlp.fc1", ratio * wide, wide) | _linear(f"{at}mlp.fc2", wide, ratio * wide)
    found |= _norm("visual.merger.ln_q", wide) | _linear("visual.merger.mlp.0", 4 * wide, 4 * wide)
    found |= _linear("visual.merger.mlp.2", width, 4 * wide) | {"model.embed_tokens.weight": (words, width)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        found |= _linear(f"{at}self_attn.q_proj", width, width) | _linear(f"{at}self_attn.k_proj", keys, width)
        found |= _linear(f"{at}self_attn.v_proj", keys, width) | {f"{at}self_attn.o_proj.weight": (width, width)}
        found |= {f"{at}mlp.gate_proj.weight": (inner, width), f"{at}mlp.up_proj.weight": (inner, width)}
        found |= {f"{at}mlp.down_proj.weight": (width, inner), f"{at}input_layernorm.weight": (width,)}
        found |= {f"{at}post_attention_layernorm.weight": (width,)}
    found |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    head = _linear("rm_head.0", 1024, width) | _linear("rm_head.3", 16, 1024) | _linear("rm_head.5", 2, 16)
    return found | head
