"""Tiny tokenizers and text encoders of random weights, for tiny pipelines of the true classes; without downloads."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

CHARACTERS = "".join(map(chr, range(33, 127)))  # what a prompt of a test may contain, besides spaces
CHAT = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline: how to build it, a size at which it works, and what its call needs to stay small."""

    build: Callable[[], Any]
    height: int
    width: int
    frames: int | None = None
    call: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def tiny(cls, *arguments, seed=0, gain=1.0, **config):
    """A module whose weights depend on the seed alone; none is left at zero, and `gain` multiplies the matrices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = cls(*arguments, **config).float().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
                if parameter.ndim > 1:
                    parameter.mul_(gain)
    return module


def words(template):
    """The words of a prompt template, each with the space before it, as a trained tokenizer would split them."""
    return sorted({word for word in re.findall(r" ?[A-Za-z]+", template) if len(word) > 1})


# Tokenizers
# ----------


def t5_tokenizer():
    """A T5 tokenizer whose pieces are characters."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in "▁" + CHARACTERS)]
    return transformers.T5Tokenizer(vocab=vocab, extra_ids=0)


def clip_tokenizer():
    """A CLIP tokenizer whose pieces are bytes, with its 77 positions."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer({piece: i for i, piece in enumerate(pieces)}, [], model_max_length=77)


def qwen2_tokenizer(template=""):
    """A Qwen tokenizer whose pieces are bytes, chat marks, and the words of a prompt template."""
    vocab = {piece: i for i, piece in enumerate(sorted(ByteLevel.alphabet()))}
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    marks += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocab |= {mark: len(vocab) + i for i, mark in enumerate(marks)}
    tokenizer = transformers.Qwen2Tokenizer(vocab, [], extra_special_tokens=marks[1:], chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens([*CHAT, *(word for word in words(template) if word not in CHAT)])
    return tokenizer


def gemma_tokenizer(template=""):
    """A Gemma tokenizer whose pieces are characters and the words of a prompt template."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *CHARACTERS]
    tokenizer = transformers.GemmaTokenizer({piece: i for i, piece in enumerate(pieces)}, [], add_bos_token=True)
    tokenizer.add_tokens(words(template))
    return tokenizer


def llama_tokenizer(template=""):
    """A Llama tokenizer whose pieces are characters and the words of a prompt template."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", "\n", *CHARACTERS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = transformers.LlamaTokenizer(vocab, [], pad_token="<pad>", add_bos_token=True, padding_side="right")
    tokenizer.add_tokens(words(template))
    return tokenizer


# Tokenizers with their encoders
# ------------------------------


def t5(width=16, seed=0):
    """A T5 tokenizer and encoder."""
    return _t5(transformers.T5EncoderModel, transformers.T5Config, width, seed)


def byt5(width=16, seed=0):
    """A tokenizer of bytes and a T5 encoder."""
    return _t5(transformers.T5EncoderModel, transformers.T5Config, width, seed, transformers.ByT5Tokenizer())


def umt5(width=16, seed=0):
    """A T5 tokenizer and a UMT5 encoder."""
    return _t5(transformers.UMT5EncoderModel, transformers.UMT5Config, width, seed)


def _t5(model, config, width, seed, tokenizer=None):
    """A tokenizer and an encoder of the T5 family."""
    tokenizer = tokenizer or t5_tokenizer()
    size = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    rest = {"feed_forward_proj": "gated-gelu", "vocab_size": len(tokenizer), "dropout_rate": 0.0}
    return tokenizer, tiny(model, config(**size, **rest), seed=seed)


def clip(width=16, seed=0):
    """A CLIP tokenizer and text encoder."""
    tokenizer = clip_tokenizer()
    return tokenizer, tiny(transformers.CLIPTextModel, _clip(tokenizer, width), seed=seed)


def clip_with_projection(width=16, seed=0):
    """A CLIP tokenizer and a text encoder with its projection, to `width` channels too."""
    tokenizer = clip_tokenizer()
    return tokenizer, tiny(transformers.CLIPTextModelWithProjection, _clip(tokenizer, width), seed=seed)


def _clip(tokenizer, width):
    """The configuration of a CLIP text encoder."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    size = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_attention_heads": 2}
    return transformers.CLIPTextConfig(**ids, **size, num_hidden_layers=2, initializer_factor=3.0)


def _causal(tokenizer, width, layers, heads=2):
    """What the configurations of decoder-only encoders share."""
    size = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // heads}
    size |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**size, **ids, "vocab_size": len(tokenizer), "initializer_range": 0.3}


def qwen2(width=16, layers=2, seed=0, template="", model=transformers.Qwen2Model):
    """A Qwen tokenizer and a Qwen2 encoder."""
    tokenizer = qwen2_tokenizer(template)
    config = _causal(tokenizer, width, layers)
    del config["head_dim"]
    return tokenizer, tiny(model, transformers.Qwen2Config(**config), seed=seed)


def qwen3(width=16, layers=2, seed=0, template="", model=transformers.Qwen3Model):
    """A Qwen tokenizer and a Qwen3 encoder; `transformers.Qwen3ForCausalLM` as `model` adds the head."""
    tokenizer = qwen2_tokenizer(template)
    return tokenizer, tiny(model, transformers.Qwen3Config(**_causal(tokenizer, width, layers)), seed=seed)


def qwen2_vl(width=16, layers=2, seed=0, template=""):
    """A Qwen tokenizer and a Qwen2-VL model, with a vision tower of one layer."""
    tokenizer = qwen2_tokenizer(template)
    tower = {"depth": 1, "embed_dim": 8, "hidden_size": width, "num_heads": 1, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(**_vision_language(tokenizer, width, layers, tower))
    return tokenizer, tiny(transformers.Qwen2VLForConditionalGeneration, config, seed=seed)


def qwen2_5_vl(width=16, layers=2, seed=0, template="", model=transformers.Qwen2_5_VLForConditionalGeneration):
    """A Qwen tokenizer and a Qwen2.5-VL model, with a vision tower of one layer."""
    tokenizer = qwen2_tokenizer(template)
    tower = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(**_vision_language(tokenizer, width, layers, tower))
    return tokenizer, tiny(model, config, seed=seed)


def _vision_language(tokenizer, width, layers, tower):
    """What the configurations of Qwen's vision-language models share."""
    text = _causal(tokenizer, width, layers)
    half = text.pop("head_dim") // 2
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [half - 2, 1, 1], "rope_theta": 1e6}
    marks = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in marks.items()}
    return {"text_config": text, "vision_config": tower, **ids}


def gemma2(width=16, layers=2, seed=0, template=""):
    """A Gemma tokenizer and a Gemma2 encoder."""
    tokenizer = gemma_tokenizer(template)
    config = transformers.Gemma2Config(**_causal(tokenizer, width, layers), query_pre_attn_scalar=8)
    return tokenizer, tiny(transformers.Gemma2Model, config, seed=seed)


def llama(width=16, layers=2, seed=0, template="", model=transformers.LlamaModel):
    """A Llama tokenizer and encoder; `transformers.LlamaForCausalLM` as `model` adds the head."""
    tokenizer = llama_tokenizer(template)
    return tokenizer, tiny(model, transformers.LlamaConfig(**_causal(tokenizer, width, layers)), seed=seed)
