"""More tiny image pipelines of the true classes, of random weights; nothing is downloaded."""

import diffusers
import transformers
from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageByT5TextProjection
from tiny_text import (
    Tiny,
    clip,
    clip_with_projection,
    gemma_tokenizer,
    llama,
    qwen2_5_vl,
    qwen2_tokenizer,
    qwen3,
    t5,
    tiny,
)
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

TEMPLATE = (  # the words of the prompt templates of Krea 2, Kandinsky 5, HunyuanImage and Ovis-Image
    "You are a prompt engineer. Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background"
)
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
BLOCKS = {"num_layers": 1, "num_single_layers": 1}


def vae(levels, latent_channels=4, seed=0, **config):
    """An `AutoencoderKL` that halves the image `levels - 1` times."""
    blocks = {"block_out_channels": (8,) * levels, "layers_per_block": 1, "norm_num_groups": 4}
    blocks |= {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return tiny(diffusers.AutoencoderKL, seed=seed, latent_channels=latent_channels, **blocks, **config)


def flux_vae(levels, latent_channels=4):
    """A VAE with the scaling of Flux, without the convolutions that Flux' VAE lacks too."""
    config = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return vae(levels, latent_channels, **config)


def qwen_vae():
    """The VAE of Qwen-Image, which halves an image thrice."""
    means = {"latents_mean": [0.1, -0.2, 0.3, -0.4], "latents_std": [0.8, 1.0, 1.2, 1.4]}
    size = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return tiny(diffusers.AutoencoderKLQwenImage, **size, **means)


def euler(**config):
    """A flow-matching Euler scheduler; without a configuration, one whose shift follows the size as Flux' does."""
    flux = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    return diffusers.FlowMatchEulerDiscreteScheduler(**(config or flux))


def quiet(pipeline):
    """The pipeline without its progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Tokenizers and encoders that no other family has
# ------------------------------------------------


def glm():
    """A GLM tokenizer, which pads to the left and starts with two marks, and its encoder."""
    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "[gMASK]", "<sop>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    rules = Tokenizer(BPE(vocab=vocab, merges=[]))
    rules.pre_tokenizer = ByteLevel(add_prefix_space=False)
    marks = [(mark, vocab[mark]) for mark in ("[gMASK]", "<sop>")]
    rules.post_processor = TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=marks)
    rules.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[-3:]])
    end = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=rules, padding_side="left", **end)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    ids = {"pad_token_id": vocab["<|endoftext|>"], "eos_token_id": vocab["<|endoftext|>"], "vocab_size": len(pieces)}
    return tokenizer, tiny(transformers.GlmModel, transformers.GlmConfig(**size, **ids))


def qwen3_vl(width=16, layers=3, template=""):
    """A Qwen tokenizer and the Qwen3-VL model without its head, with a vision tower of one layer."""
    tokenizer = qwen2_tokenizer(template)
    text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    tower = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": width}
    tower |= {"num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
    marks = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for name, mark in marks.items()}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **ids)
    return tokenizer, tiny(transformers.Qwen3VLModel, config)


def byt5(width=16):
    """A tokenizer of bytes and its T5 encoder."""
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    size = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**size, feed_forward_proj="gated-gelu", vocab_size=len(tokenizer), dropout_rate=0.0)
    return tokenizer, tiny(transformers.T5EncoderModel, config)


def t5gemma(width=16):
    """A Gemma tokenizer of 64 positions and the encoder of a T5Gemma."""
    tokenizer = gemma_tokenizer()
    tokenizer.model_max_length = 64
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "head_dim": 8}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "query_pre_attn_scalar": 8}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.T5GemmaModuleConfig(**size, **ids, vocab_size=len(tokenizer), dropout_rate=0.0)
    return tokenizer, tiny(T5GemmaEncoder, config)


# The pipelines
# -------------


def cogview4():
    """CogView4: no mask of the text, and a linear shift."""
    transformer = tiny(
        diffusers.CogView4Transformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        rope_axes_dim=(16, 16),
    )
    scheduler = euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear")
    return quiet(diffusers.CogView4Pipeline(*glm(), vae(3), transformer, scheduler))


def hidream():
    """HiDream-I1: four encoders, experts, and latents that are padded to `max_resolution` where they are not square."""
    clips = [part for seed in (1, 2) for part in reversed(clip_with_projection(seed=seed))]
    (tokenizer_3, encoder_3), (tokenizer_4, encoder_4) = t5(), llama(model=transformers.LlamaForCausalLM)
    encoder_4.set_attn_implementation("eager")  # the pipeline asks for its attention maps
    transformer = tiny(
        diffusers.HiDreamImageTransformer2DModel,
        **HEADS,
        **BLOCKS,
        patch_size=2,
        in_channels=4,
        caption_channels=[16, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(8, 16),
        llama_layers=[0, 1],
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler = diffusers.UniPCMultistepScheduler(**flow)
    parts = (*clips, encoder_3, tokenizer_3, encoder_4, tokenizer_4, transformer)
    pipeline = diffusers.HiDreamImagePipeline(scheduler, flux_vae(3), *parts)
    pipeline.default_sample_size = 10  # every size is scaled to the area of (10 * 4)² pixels; 32 x 48 stays itself
    return quiet(pipeline)


def bria():
    """Bria 3.2: Flux' blocks without a pooled text, and text embeddings that are padded with zeros."""
    tokenizer, encoder = t5()
    config = {"in_channels": 16, "joint_attention_dim": 16, "axes_dims_rope": [4, 6, 6]}
    transformer = tiny(diffusers.BriaTransformer2DModel, **HEADS, **BLOCKS, **config)
    return quiet(diffusers.BriaPipeline(transformer, euler(), vae(3, shift_factor=0.0), encoder, tokenizer))


def krea2():
    """Krea 2: the transformer reads two layers of the text encoder."""
    tokenizer, encoder = qwen3_vl(template=TEMPLATE)
    transformer = tiny(
        diffusers.Krea2Transformer2DModel,
        **HEADS,
        in_channels=16,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    scheduler = euler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400)
    parts = (scheduler, qwen_vae(), encoder, tokenizer, transformer)
    return quiet(diffusers.Krea2Pipeline(*parts, text_encoder_select_layers=(1, 3)))


def kandinsky5():
    """Kandinsky 5 text to image: latents with their channels last; no mask of the text."""
    transformer = tiny(
        diffusers.Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    texts = [part for text in (qwen2_5_vl(template=TEMPLATE), clip()) for part in reversed(text)]
    pipeline = diffusers.Kandinsky5T2IPipeline(transformer, flux_vae(4), *texts, euler(shift=3.0))
    pipeline.resolutions = [(48, 32), (32, 48)]  # width and height; every size becomes one of these
    return quiet(pipeline)


def hunyuan_image():
    """HunyuanImage 2.1: a second text for quoted words; its guider starts APG later than any test runs."""
    (tokenizer, encoder), (tokenizer_2, encoder_2) = qwen2_5_vl(layers=3, template=TEMPLATE), byt5()
    transformer = tiny(
        diffusers.HunyuanImageTransformer2DModel,
        **HEADS,
        **BLOCKS,
        in_channels=4,
        out_channels=4,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(8, 8),
    )
    transformer.context_embedder_2 = tiny(HunyuanImageByT5TextProjection, 16, 32, 32)  # the constructor's is 2048 wide
    size = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1, "sample_size": 64}
    size |= {"block_out_channels": (32,) * 4, "spatial_compression_ratio": 8, "scaling_factor": 0.75}
    autoencoder = tiny(diffusers.AutoencoderKLHunyuanImage, **size)
    guider = diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1000)
    parts = (autoencoder, encoder, tokenizer, encoder_2, tokenizer_2, transformer, guider)
    pipeline = diffusers.HunyuanImagePipeline(euler(shift=5.0), *parts)
    pipeline.tokenizer_max_length = 64
    return quiet(pipeline)


def ovis_image():
    """Ovis-Image: Flux' layout with the text of a Qwen3."""
    tokenizer, encoder = qwen3(template=TEMPLATE)
    config = {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6)}
    transformer = tiny(diffusers.OvisImageTransformer2DModel, **HEADS, **BLOCKS, **config)
    return quiet(diffusers.OvisImagePipeline(euler(), flux_vae(3), encoder, tokenizer, transformer))


def longcat_image():
    """LongCat-Image, whose latents have 16 channels; its prompt is not rewritten, so a tokenizer stands for that."""
    tokenizer, encoder = qwen2_5_vl(template=TEMPLATE)
    config = {"in_channels": 64, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6]}
    transformer = tiny(diffusers.LongCatImageTransformer2DModel, **HEADS, **BLOCKS, **config)
    parts = (flux_vae(3, 16), encoder, tokenizer, tokenizer, transformer)
    pipeline = diffusers.LongCatImagePipeline(euler(), *parts)
    pipeline.tokenizer_max_length = 64
    return quiet(pipeline)


def prx():
    """PRX: the encoder of a T5Gemma, and one time for the whole batch; guidance fails upstream for two prompts."""
    tokenizer, encoder = t5gemma()
    config = {"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    transformer = tiny(diffusers.PRXTransformer2DModel, **config)
    return quiet(diffusers.PRXPipeline(transformer, euler(shift=3.0), encoder, tokenizer, flux_vae(4)))


MORE = {
    "CogView4Pipeline": Tiny(cogview4, 32, 48, call={"guidance_scale": 3.0}),
    "HiDreamImagePipeline": Tiny(hidream, 32, 48, call={"guidance_scale": 3.0, "max_sequence_length": 64}),
    "BriaPipeline": Tiny(bria, 32, 48, call={"guidance_scale": 3.0, "max_sequence_length": 64}),
    "Krea2Pipeline": Tiny(krea2, 32, 48, call={"guidance_scale": 3.0, "max_sequence_length": 64}),
    "Kandinsky5T2IPipeline": Tiny(kandinsky5, 32, 48, call={"guidance_scale": 3.0}),
    "HunyuanImagePipeline": Tiny(hunyuan_image, 32, 48),
    "OvisImagePipeline": Tiny(ovis_image, 32, 48, call={"guidance_scale": 3.0, "max_sequence_length": 64}),
    "LongCatImagePipeline": Tiny(longcat_image, 32, 48, call={"guidance_scale": 3.0, "enable_prompt_rewrite": False}),
    "PRXPipeline": Tiny(prx, 32, 48, call={"guidance_scale": 1.0, "use_resolution_binning": False}, needs=("ftfy",)),
}
