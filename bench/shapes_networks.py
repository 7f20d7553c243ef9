"""The networks and tokenizers of the built-in `shapes` pipeline: FLUX's classes with tiny configurations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from rollflow.models.world import SIZE, words

TEXT_TOKENS = 16  # the longest prompt of the world has 15 words and marks
LATENT_CHANNELS = 8
LATENT_SIZE = SIZE // 8
TEXT_WIDTH = 64
SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")


def autoencoder() -> AutoencoderKL:
    """64 x 64 x 3 to 8 x 8 x 8; a light decoder, because a search decodes once an evaluation."""
    channels = (16, 16, 32, 48)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def transformer() -> FluxTransformer2DModel:
    """2 double and 5 single blocks of width 128 on 16 image tokens of 32 channels."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def text_encoders() -> tuple[CLIPTextModel, T5EncoderModel]:
    """The pooled (CLIP, one layer) and the sequence (T5, two layers) text encoder, width 64."""
    size = len(SPECIAL) + len(words())
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=TEXT_WIDTH,
            pad_token_id=0,
            bos_token_id=3,
            eos_token_id=1,  # never 2: that selects CLIP's legacy pooling
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=size,
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
    return clip, t5


def tokenizer() -> PreTrainedTokenizerFast:
    """That of the world's vocabulary."""
    return word_tokenizer((*SPECIAL, *words()), TEXT_TOKENS, bos_token="<s>")


def word_tokenizer(known: Sequence[str], most: int, **special: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over a vocabulary, special tokens first; other words become `<unk>`."""
    vocabulary = {word: i for i, word in enumerate(known)}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.normalizer = normalizers.Lowercase()
    words_only.pre_tokenizer = pre_tokenizers.Whitespace()
    words_only.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=most,
        **special,
    )


def pipeline(vae: AutoencoderKL, flow: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel) -> FluxPipeline:
    """The four networks as the pipeline that diffusers knows."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer(),
        text_encoder_2=t5,
        tokenizer_2=tokenizer(),
        transformer=flow,
    )


def embed(clip: CLIPTextModel, t5: T5EncoderModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [row, text] to (pooled [row, width], sequence [row, text, width]), exactly as FluxPipeline does it."""
    return clip(ids).pooler_output, t5(ids).last_hidden_state


class Flow(nn.Module):
    """The transformer and its text encoders: velocity(x, t, token ids)."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = transformer()
        self.clip, self.t5 = text_encoders()
        side = LATENT_SIZE // 2
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
        self.register_buffer("image_ids", ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(TEXT_TOKENS, 3), persistent=False)

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """[row, 16, 32], [row], [row, text] to the velocity [row, 16, 32]."""
        pooled, sequence = embed(self.clip, self.t5, ids)
        return self.transformer(
            hidden_states=x,
            timestep=t,
            pooled_projections=pooled,
            encoder_hidden_states=sequence,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]

    @torch.no_grad()
    def solve(self, x: Tensor, ids: Tensor, steps: int, guidance: float = 1.0) -> Tensor:
        """Euler steps of the ODE on a uniform grid from t = 1 to t = 0, with classifier-free guidance if not 1."""
        empty = token_ids([""]).expand(len(ids), -1).to(ids.device)
        for i in range(steps):
            t = torch.full((len(x),), 1 - i / steps, device=x.device)
            velocity = self(x, t, ids)
            if guidance != 1.0:
                without = self(x, t, empty)
                velocity = without + guidance * (velocity - without)
            x = x - velocity / steps
        return x


def token_ids(prompts: list[str]) -> Tensor:
    """Prompts to token ids, padded to [row, text]."""
    return tokenizer()(
        prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
