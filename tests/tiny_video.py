"""Tiny video pipelines of the true diffusers classes: random weights, built by constructors, without a download."""

import diffusers
import torch
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tiny_text import Tiny, clip, gemma2, llama, qwen2_5_vl, t5, tiny, umt5

HEAD = {"num_attention_heads": 2, "attention_head_dim": 12}  # rotary embeddings share 12 channels among three axes
INNER = 24


# --- Wan and those that share its parts -------------------------------------------------------------------------------


def _unipc(shift):
    """The multistep scheduler of the Wan family, on the sigmas of a flow."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift
    )


def _wan_vae(seed):
    """The VAE of Wan 2.1: 8 pixels and 4 frames to a latent, with the true statistics of its 16 channels."""
    return tiny(diffusers.AutoencoderKLWan, seed=seed, base_dim=4, num_res_blocks=1)


def _wan_transformer(cls, text, channels, seed):
    """A transformer of Wan or SkyReels."""
    size = {"in_channels": channels, "out_channels": channels, "text_dim": text.config.d_model, "num_layers": 2}
    return tiny(cls, seed=seed, **HEAD, **size, freq_dim=32, ffn_dim=32, rope_max_seq_len=32)


def wan(seed=0):
    """Wan 2.1: one transformer, two calls for guidance."""
    tokenizer, encoder = umt5(seed=seed)
    transformer = _wan_transformer(diffusers.WanTransformer3DModel, encoder, 16, seed)
    return diffusers.WanPipeline(tokenizer, encoder, _wan_vae(seed), _unipc(3.0), transformer)


def wan_two_experts(seed=0):
    """Wan 2.2 A14B: one transformer above the boundary, another below it."""
    tokenizer, encoder = umt5(seed=seed)
    high, low = (_wan_transformer(diffusers.WanTransformer3DModel, encoder, 16, seed + i) for i in range(2))
    return diffusers.WanPipeline(tokenizer, encoder, _wan_vae(seed), _unipc(3.0), high, low, boundary_ratio=0.875)


def wan_5b(seed=0):
    """Wan 2.2 5B: a time for every token, and a VAE of 16 pixels and 4 frames to a latent."""
    tokenizer, encoder = umt5(seed=seed)
    transformer = _wan_transformer(diffusers.WanTransformer3DModel, encoder, 12, seed)
    statistics = {"latents_mean": [i / 12 - 0.5 for i in range(12)], "latents_std": [0.5 + i / 12 for i in range(12)]}
    size = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 12, "num_res_blocks": 1, "scale_factor_spatial": 16}
    patches = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    vae = tiny(diffusers.AutoencoderKLWan, seed=seed, **size, **patches, **statistics)
    return diffusers.WanPipeline(tokenizer, encoder, vae, _unipc(5.0), transformer, expand_timesteps=True)


def skyreels(seed=0):
    """SkyReels-V2: the parts of Wan 2.1 under a transformer class of its own."""
    tokenizer, encoder = umt5(seed=seed)
    transformer = _wan_transformer(diffusers.SkyReelsV2Transformer3DModel, encoder, 16, seed)
    return diffusers.SkyReelsV2Pipeline(tokenizer, encoder, transformer, _wan_vae(seed), _unipc(8.0))


def sana_video(seed=0):
    """SANA-Video: linear attention, the VAE of Wan, DPM-Solver++ on the sigmas of a flow."""
    tokenizer, encoder = gemma2(seed=seed)
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": INNER}
    size = {"num_layers": 2, "caption_channels": encoder.config.hidden_size, "rope_max_seq_len": 32}
    transformer = tiny(diffusers.SanaVideoTransformer3DModel, seed=seed, **HEAD, **cross, **size)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    return diffusers.SanaVideoPipeline(tokenizer, encoder, _wan_vae(seed), transformer, scheduler)


# --- LTX --------------------------------------------------------------------------------------------------------------


def ltx(seed=0):
    """LTX-Video: packed tokens, one batch for guidance, length-shifted sigmas; 32 pixels, 8 frames to a latent."""
    tokenizer, encoder = t5(seed=seed)
    size = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": INNER, "num_layers": 2}
    text = {"caption_channels": encoder.config.d_model}
    transformer = tiny(diffusers.LTXVideoTransformer3DModel, seed=seed, **HEAD, **size, **text)
    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
    decoder = {"decoder_block_out_channels": (8,) * 4, "decoder_layers_per_block": (1,) * 5}
    vae = tiny(diffusers.AutoencoderKLLTXVideo, seed=seed, latent_channels=8, **blocks, **decoder)
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8))
    shift = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shift)
    return diffusers.LTXPipeline(scheduler, vae, encoder, tokenizer, transformer)


# --- Mochi ------------------------------------------------------------------------------------------------------------


def mochi(seed=0):
    """Mochi: inverted sigmas, so that its time runs from 0 to 1000; 8 pixels and 6 frames to a latent."""
    tokenizer, encoder = t5(seed=seed)
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16}
    text = {"text_embed_dim": encoder.config.d_model, "time_embed_dim": 32}
    transformer = tiny(diffusers.MochiTransformer3DModel, seed=seed, **size, **text)
    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    vae = tiny(diffusers.AutoencoderKLMochi, seed=seed, **widths, layers_per_block=(1,) * 5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(scheduler, vae, encoder, tokenizer, transformer)


# --- HunyuanVideo and what shares its VAE -----------------------------------------------------------------------------


def _hunyuan_vae(seed):
    """The VAE of HunyuanVideo: 8 pixels and 4 frames to a latent."""
    size = {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    return tiny(diffusers.AutoencoderKLHunyuanVideo, seed=seed, **size)


def hunyuan_video(seed=0):
    """HunyuanVideo: guidance embedded, or by a second call; Llama in a template, and CLIP's pooled embedding."""
    tokenizer, encoder = llama(layers=3, seed=seed, template=DEFAULT_PROMPT_TEMPLATE["template"])
    tokenizer_2, encoder_2 = clip(seed=seed)
    size = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    text = {"text_embed_dim": encoder.config.hidden_size, "pooled_projection_dim": encoder_2.config.hidden_size}
    transformer = tiny(
        diffusers.HunyuanVideoTransformer3DModel, seed=seed, **HEAD, **size, **text, rope_axes_dim=(4, 4, 4)
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return diffusers.HunyuanVideoPipeline(
        encoder, tokenizer, transformer, _hunyuan_vae(seed), scheduler, encoder_2, tokenizer_2
    )


def kandinsky5(seed=0):
    """Kandinsky 5 T2V: channels last, with empty channels for a conditioning video beside the latents."""
    template = diffusers.Kandinsky5T2VPipeline(*[None] * 7).prompt_template
    tokenizer, encoder = qwen2_5_vl(seed=seed, template=template)
    tokenizer_2, encoder_2 = clip(seed=seed)
    size = {"in_visual_dim": 4, "out_visual_dim": 4, "model_dim": INNER, "ff_dim": 32, "time_dim": 16}
    blocks = {"num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 4, 4), "visual_cond": True}
    text = {"in_text_dim": encoder.config.text_config.hidden_size, "in_text_dim2": encoder_2.config.hidden_size}
    transformer = tiny(diffusers.Kandinsky5Transformer3DModel, seed=seed, **size, **blocks, **text)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    return diffusers.Kandinsky5T2VPipeline(
        transformer, _hunyuan_vae(seed), encoder, tokenizer, encoder_2, tokenizer_2, scheduler
    )


SHORT = {"max_sequence_length": 64}
PLAIN = {"use_resolution_binning": False, "complex_human_instruction": None}

VIDEO: dict[str, Tiny] = {
    "WanPipeline 2.1": Tiny(wan, 32, 48, 5, SHORT),
    "WanPipeline 2.2 A14B": Tiny(wan_two_experts, 32, 48, 5, SHORT),
    "WanPipeline 2.2 5B": Tiny(wan_5b, 32, 64, 5, SHORT),
    "LTXPipeline": Tiny(ltx, 64, 96, 9, SHORT),
    "HunyuanVideoPipeline": Tiny(hunyuan_video, 32, 48, 5, {"max_sequence_length": 96}),
    "MochiPipeline": Tiny(mochi, 16, 32, 7, SHORT),
    "SanaVideoPipeline": Tiny(sana_video, 32, 32, 5, SHORT | PLAIN),
    "Kandinsky5T2VPipeline": Tiny(kandinsky5, 32, 48, 5),
    "SkyReelsV2Pipeline": Tiny(skyreels, 32, 48, 5, SHORT, needs=("ftfy",)),
}
