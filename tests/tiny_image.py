"""Tiny image pipelines of the true diffusers classes: random weights, and schedulers as their families set them."""

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_text import Tiny, clip, clip_with_projection, gemma2, qwen2_5_vl, qwen3, t5, tiny, umt5

QWEN_TEMPLATE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
LUMINA_TEMPLATE = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start>"
)


def autoencoder(scaling_factor, shift_factor=None, cls=diffusers.AutoencoderKL, **rest):
    """An autoencoder of 4 channels that halves a side three times."""
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    shape = {"block_out_channels": (4,) * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 2}
    if scaling_factor is not None:
        rest |= {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    return tiny(cls, down_block_types=down, up_block_types=up, sample_size=32, **shape, **rest)


def shifting(shift=3.0, **rest):
    """Flux's kind of scheduler: the shift grows with the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=True, **rest)


def flux():
    """Flux dev: tokens, embedded guidance, T5 tokens and a pooled CLIP vector."""
    tokenizer, text_encoder = clip()
    tokenizer_2, text_encoder_2 = t5()
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    layers = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    widths = {"in_channels": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    return diffusers.FluxPipeline(
        transformer=tiny(diffusers.FluxTransformer2DModel, **heads, **layers, **widths),
        scheduler=shifting(),
        vae=autoencoder(0.3611, 0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def stable_diffusion_3():
    """Stable Diffusion 3.5 medium: maps, two CLIP encoders beside a wider T5, dual attention in the first layer."""
    tokenizer, text_encoder = clip_with_projection(seed=0)
    tokenizer_2, text_encoder_2 = clip_with_projection(seed=1)
    tokenizer_3, text_encoder_3 = t5(width=40)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    widths = {"in_channels": 4, "out_channels": 4, "joint_attention_dim": 40, "caption_projection_dim": 32}
    rest = {"num_layers": 2, "pooled_projection_dim": 32, "sample_size": 8, "pos_embed_max_size": 16}
    return diffusers.StableDiffusion3Pipeline(
        transformer=tiny(diffusers.SD3Transformer2DModel, **heads, **widths, **rest),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def qwen_image():
    """Qwen-Image: tokens, prompts of their own lengths, guidance that keeps each token's norm, a VAE of videos."""
    tokenizer, text_encoder = qwen2_5_vl(template=QWEN_TEMPLATE)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    widths = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 16}
    moments = {"latents_mean": [-0.7, 0.5, 0.1, -0.2], "latents_std": [2.8, 1.5, 2.3, 1.2]}
    return diffusers.QwenImagePipeline(
        transformer=tiny(diffusers.QwenImageTransformer2DModel, num_layers=2, gain=1.7, **heads, **widths),
        scheduler=shifting(1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=tiny(diffusers.AutoencoderKLQwenImage, base_dim=4, z_dim=4, num_res_blocks=1, **moments),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def sana():
    """Sana: maps, linear attention, a DPM-Solver in flow prediction, an autoencoder that halves a side five times."""
    tokenizer, text_encoder = gemma2()
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2}
    cross = {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    rest = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8}
    sides = ("encoder", "decoder")
    shape = {f"{side}_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",) for side in sides}
    shape |= {f"{side}_block_out_channels": (4, 4, 4, 4, 8, 8) for side in sides}
    shape |= {f"{side}_layers_per_block": (1,) * 6 for side in sides}
    shape |= {f"{side}_qkv_multiscales": ((),) * 5 + ((5,),) for side in sides}
    shape |= {"upsample_block_type": "interpolate", "downsample_block_type": "Conv", "attention_head_dim": 4}
    return diffusers.SanaPipeline(
        transformer=tiny(diffusers.SanaTransformer2DModel, **heads, **cross, **rest),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=tiny(diffusers.AutoencoderDC, latent_channels=4, scaling_factor=0.41407, **shape),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def chroma():
    """Chroma: Flux without the pooled vector; the prompt's mask is part of the conditioning."""
    tokenizer, text_encoder = t5()
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    layers = {"num_layers": 1, "num_single_layers": 1, "in_channels": 16, "joint_attention_dim": 16}
    time = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2}
    return diffusers.ChromaPipeline(
        transformer=tiny(diffusers.ChromaTransformer2DModel, **heads, **layers, **time),
        scheduler=shifting(),
        vae=autoencoder(0.3611, 0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def aura_flow():
    """AuraFlow: maps, prompts of a fixed length that the encoder masks."""
    tokenizer, text_encoder = umt5()
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    rest = {"joint_attention_dim": 16, "caption_projection_dim": 32, "sample_size": 8, "pos_embed_max_size": 64}
    return diffusers.AuraFlowPipeline(
        transformer=tiny(diffusers.AuraFlowTransformer2DModel, gain=2.0, **heads, **rest),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=autoencoder(0.13025),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def lumina2():
    """Lumina 2: maps, a time that runs backwards, a system prompt before each prompt."""
    tokenizer, text_encoder = gemma2(template=LUMINA_TEMPLATE)
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "hidden_size": 32, "axes_dim_rope": (4, 6, 6)}
    layers = {"num_layers": 2, "num_refiner_layers": 1, "multiple_of": 16, "axes_lens": (300, 16, 16)}
    return diffusers.Lumina2Pipeline(
        transformer=tiny(
            diffusers.Lumina2Transformer2DModel, gain=1.7, in_channels=4, cap_feat_dim=16, **heads, **layers
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(0.3611, 0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def z_image():
    """Z-Image: lists of images and of prompts, each of its own length; a time that runs backwards."""
    tokenizer, text_encoder = qwen3()
    heads = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [4, 6, 6], "axes_lens": [256, 16, 16]}
    layers = {"n_layers": 2, "n_refiner_layers": 1, "in_channels": 4, "cap_feat_dim": 16}
    return diffusers.ZImagePipeline(
        transformer=tiny(diffusers.ZImageTransformer2DModel, **heads, **layers),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(0.3611, 0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


def flux2_klein():
    """Flux 2 Klein: tokens of patches that the autoencoder normalises, text from three layers of 27."""
    tokenizer, text_encoder = qwen3(layers=27, model=transformers.Qwen3ForCausalLM)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4)}
    layers = {"num_layers": 1, "num_single_layers": 1, "timestep_guidance_channels": 32, "guidance_embeds": False}
    vae = autoencoder(None, cls=diffusers.AutoencoderKLFlux2)
    vae.bn.running_mean.copy_(torch.linspace(-0.2, 0.3, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return diffusers.Flux2KleinPipeline(
        transformer=tiny(
            diffusers.Flux2Transformer2DModel, gain=1.7, in_channels=16, joint_attention_dim=48, **heads, **layers
        ),
        scheduler=shifting(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )


SHORT = {"max_sequence_length": 64}  # the longest prompt of a test is one token a character

IMAGE = {
    "FluxPipeline": Tiny(flux, 32, 48, call=SHORT),
    "StableDiffusion3Pipeline": Tiny(stable_diffusion_3, 32, 48, call=SHORT),
    "QwenImagePipeline": Tiny(qwen_image, 32, 48),
    "SanaPipeline": Tiny(
        sana, 64, 96, call={**SHORT, "use_resolution_binning": False, "complex_human_instruction": None}
    ),
    "ChromaPipeline": Tiny(chroma, 32, 48, call=SHORT),
    "AuraFlowPipeline": Tiny(aura_flow, 32, 48, call=SHORT),
    "Lumina2Pipeline": Tiny(lumina2, 32, 48, call={"max_sequence_length": 112}),
    "ZImagePipeline": Tiny(z_image, 32, 48, call=SHORT),
    "Flux2KleinPipeline": Tiny(flux2_klein, 32, 48, call=SHORT),
}
