"""The networks and the tokenizer of the built-in `shapes-video` pipeline: Wan's classes with tiny configurations."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from rollflow.bench.shapes_networks import word_tokenizer
from rollflow.models.moving import FRAMES, SIZE, words

TEXT_TOKENS = 13  # the longest prompt of the world has 11 words and an end mark; the last token is always padding
WAN_TOKENS = 512  # to which WanPipeline pads the embedded text by default
LATENT_CHANNELS = 16
LATENT = (LATENT_CHANNELS, 1 + (FRAMES - 1) // 4, SIZE // 8, SIZE // 8)
TEXT_WIDTH = 64
SHIFT = 3.0
SPECIAL = ("<pad>", "</s>", "<unk>")


def autoencoder() -> AutoencoderKLWan:
    """9 x 32 x 32 x 3 to 3 x 4 x 4 x 16, as in Wan: 4 frames (the first one alone) and 8 x 8 pixels to a latent.

    As in the one of Wan 2.2, the first factor of two is a patch of pixels: convolutions at full size are what a CPU is
    slowest at.
    """
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` without its clamp, which hides the error of what lies outside from training."""
    vae.clear_cache()
    hidden, parts = vae.post_quant_conv(latents), []
    for i in range(latents.shape[2]):
        vae._conv_idx = [0]
        parts.append(vae.decoder(hidden[:, :, i : i + 1], vae._feat_map, vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(parts, 2), vae.config.patch_size)


def transformer() -> WanTransformer3DModel:
    """6 blocks of width 96 on 12 tokens of 64 channels: patches of 2 x 2 latents, as in Wan."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=256,
        num_layers=6,
        rope_max_seq_len=32,
    )


def text_encoder() -> UMT5EncoderModel:
    """Two layers of width 64."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(SPECIAL) + len(words()),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """That of the world's vocabulary."""
    return word_tokenizer((*SPECIAL, *words()), WAN_TOKENS)


def pipeline(vae: AutoencoderKLWan, flow: WanTransformer3DModel, text: UMT5EncoderModel) -> WanPipeline:
    """The networks as the pipeline that diffusers knows, with the sampler of Wan 2.1."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    return WanPipeline(tokenizer=tokenizer(), text_encoder=text, vae=vae, scheduler=scheduler, transformer=flow)


class Padded(WanAttnProcessor):
    """Attention to a text whose last token stands for `repeats` equal ones.

    WanPipeline pads the embedded text with zeros, to 512 tokens by default, and masks none of them. Equal keys with
    equal values are one key whose logit is greater by the logarithm of their number.
    """

    repeats = 1

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):  # type: ignore[no-untyped-def]
        if encoder_hidden_states is not None and self.repeats > 1:
            attention_mask = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
            attention_mask[..., -1] = math.log(self.repeats)
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class Flow(nn.Module):
    """The transformer and its text encoder: velocity(x, t, token ids)."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = transformer()
        self.text = text_encoder()
        self.padded = Padded()
        for block in self.transformer.blocks:
            block.attn2.set_processor(self.padded)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, text_tokens: int = WAN_TOKENS) -> Tensor:
        """[row, 16, 3, 4, 4], [row], [row, text] to the velocity, as for texts padded to `text_tokens`."""
        self.padded.repeats = text_tokens - TEXT_TOKENS + 1
        mask = (ids > 0).long()
        embedded = self.text(ids, mask).last_hidden_state * mask[..., None]
        return self.transformer(x, 1000 * t, embedded, return_dict=False)[0]

    @torch.no_grad()
    def solve(self, x: Tensor, ids: Tensor, steps: int, guidance: float = 1.0, shift: float = SHIFT) -> Tensor:
        """Euler steps of the ODE from t = 1 to t = 0 on a shifted grid, with classifier-free guidance if not 1."""
        empty = token_ids([""]).expand(len(ids), -1)
        grid = torch.linspace(1, 0, steps + 1)
        grid = shift * grid / (1 + (shift - 1) * grid)
        for t, following in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            if guidance == 1.0:
                velocity = self(x, x.new_full((len(x),), t), ids)
            else:
                both = self(torch.cat([x, x]), x.new_full((2 * len(x),), t), torch.cat([ids, empty]))
                given, without = both.chunk(2)
                velocity = without + guidance * (given - without)
            x = x + (following - t) * velocity
        return x


def token_ids(prompts: list[str]) -> Tensor:
    """Prompts to token ids, padded to [row, text]."""
    return tokenizer()(
        prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
