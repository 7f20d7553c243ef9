"""Complete FLUX pipelines of true sizes with random weights, for measuring what the engine costs on them.

Time and memory depend on shapes, not on what a model has learned, so nothing is downloaded: every network is laid out
on the `meta` device, allocated once on its own device in its own dtype, and filled there. Matrices are normal with
variance 1 / fan-in, which keeps activations of moderate size through all blocks: none overflows, and a GPU, whose clock
depends on how many bits flip, does not get the easy work of multiplying zeros. The images are noise.

The transformer, the autoencoder and the light decoder (TAEF1, TAESD3) have their true sizes. The text encoders do not:
they are one-layer stand-ins with the right output widths and numbers of tokens. They run once a distinct prompt,
outside the forwards that are measured, and know the words of the built-in world only, so that prompts come from
`rollflow.bench.prompt_sets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from rollflow.bench import shapes_networks
from rollflow.errors import ModelError, RequestError, shown
from rollflow.models import BUILT_IN
from rollflow.models.loading import load, load_light

POOLED_TOKENS = 77  # of the CLIP encoder, whose sequence is pooled away
SEED = 0
_VOCABULARY = len(shapes_networks.tokenizer())


@dataclass(frozen=True)
class ModelGeometry:
    """The sizes of a FLUX-class model and of the images that it is measured on.

    Attributes:
        name: how results name it.
        description: what it stands for.
        height: of an image, in pixels.
        width: of an image, in pixels.
        layers: double blocks, in which text and image have weights of their own.
        single_layers: single blocks, which share them.
        heads: of attention.
        head_dim: width of a head; the sum of `axes`.
        axes: how many of a head's dimensions turn with each position axis (text, row, column).
        text_tokens: tokens of the sequence that the image tokens attend to.
        text_width: width of the sequence encoder.
        pooled_width: width of the pooled prompt.
        latent_channels: of the autoencoder; the transformer reads 2 x 2 of its latent pixels as one token.
        decoder: widths of the autoencoder's four resolutions.
        light: width of the light decoder, the same at all four.
    """

    name: str
    description: str
    height: int
    width: int
    layers: int
    single_layers: int
    heads: int
    head_dim: int
    axes: tuple[int, int, int]
    text_tokens: int
    text_width: int
    pooled_width: int
    latent_channels: int = 16
    decoder: tuple[int, ...] = (128, 256, 512, 512)
    light: int = 64

    @property
    def inner(self) -> int:
        """Width of the transformer."""
        return self.heads * self.head_dim

    @property
    def image_tokens(self) -> int:
        """Tokens of one image; each is 16 x 16 pixels."""
        return (self.height // 16) * (self.width // 16)

    @property
    def built_in(self) -> bool:
        """Whether the package has trained weights of it."""
        return self.name in BUILT_IN

    def shrunk(self, by: int) -> ModelGeometry:
        """The same kind of model with layers, heads, widths and image sides divided by `by`, for trying code out.

        Every size has a floor, so that any divisor gives a model that runs. A built-in model stays as it is.

        Raises:
            RequestError: `by` is below 1.
        """
        if by < 1:
            raise RequestError(f"shrink={by}: it divides sizes, so it must be a whole number from 1 on")
        if by == 1 or self.built_in:
            return self
        return replace(
            self,
            name=f"{self.name}/{by}",
            height=_part(self.height, by, 64),
            width=_part(self.width, by, 64),
            layers=min(self.layers, _part(self.layers, by)),
            single_layers=min(self.single_layers, _part(self.single_layers, by)),
            heads=_part(self.heads, by),
            text_tokens=max(32, self.text_tokens // by),
            text_width=_part(self.text_width, by, 64),
            pooled_width=_part(self.pooled_width, by, 64),
            decoder=tuple(_part(width, by, 32) for width in self.decoder),
            light=_part(self.light, by, 8),
        )


def _part(size: int, by: int, unit: int = 1) -> int:
    """`size / by` rounded down to a multiple of `unit`, and at least `unit`."""
    return max(unit, size // by // unit * unit)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        ModelGeometry(
            "shapes",
            "the built-in model, trained: 2.55 M parameters, 16 image tokens",
            height=64,
            width=64,
            layers=2,
            single_layers=5,
            heads=4,
            head_dim=32,
            axes=(8, 12, 12),
            text_tokens=shapes_networks.TEXT_TOKENS,
            text_width=shapes_networks.TEXT_WIDTH,
            pooled_width=shapes_networks.TEXT_WIDTH,
            latent_channels=shapes_networks.LATENT_CHANNELS,
            decoder=(16, 16, 32, 48),
        ),
        # Stable Diffusion 3 medium (arXiv 2403.03206): 24 joint blocks of 24 heads, 77 CLIP and 256 T5 tokens. Its last
        # block drops the text, where FLUX's blocks do not.
        ModelGeometry(
            "sd3",
            "SD3 medium's depth and widths in FLUX's blocks at 512^2: 2.06 B parameters, random, 1,024 image tokens",
            height=512,
            width=512,
            layers=24,
            single_layers=0,
            heads=24,
            head_dim=64,
            axes=(8, 28, 28),
            text_tokens=77 + 256,
            text_width=4096,
            pooled_width=2048,
        ),
        ModelGeometry(
            "flux",
            "FLUX.1-schnell at 1024^2: 11.89 B parameters, random, 4,096 image tokens",
            height=1024,
            width=1024,
            layers=19,
            single_layers=38,
            heads=24,
            head_dim=128,
            axes=(16, 56, 56),
            text_tokens=256,
            text_width=4096,
            pooled_width=768,
        ),
    )
}


def geometry(name: str | ModelGeometry) -> ModelGeometry:
    """The geometry of a name; one that was made with `dataclasses.replace` or `shrunk` is returned as it is.

    Raises:
        RequestError: there is none of this name.
    """
    if isinstance(name, ModelGeometry):
        return name
    if name not in GEOMETRIES:
        raise RequestError(f"there is no geometry {shown(name)}: choose one of {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name]


def transformer(of: ModelGeometry) -> FluxTransformer2DModel:
    """The transformer on the default device, as diffusers initialises it."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * of.latent_channels,
        num_layers=of.layers,
        num_single_layers=of.single_layers,
        attention_head_dim=of.head_dim,
        num_attention_heads=of.heads,
        joint_attention_dim=of.text_width,
        pooled_projection_dim=of.pooled_width,
        guidance_embeds=False,
        axes_dims_rope=of.axes,
    )


@lru_cache
def parameters(name: str | ModelGeometry) -> int:
    """How many parameters the transformer has; nothing is allocated. Raises `RequestError` for unknown names."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in transformer(geometry(name)).parameters())


def flops(name: str | ModelGeometry) -> int:
    """Floating-point operations of one row's forward: two for each multiply-add of linear layers and attention.

    Every token passes 12 d^2 weights in every block: query, key, value and output 4 d^2, the perceptron 8 d^2 (single
    blocks: 3 + 4 in, 5 out). Attention of S tokens takes 2 S^2 d multiply-adds a block. Modulations, d^2 times 12, 3
    and 2 in double blocks, single blocks and at the end, are computed once a row. Element-wise work is not counted.

    Raises:
        RequestError: there is no geometry of this name.
    """
    of = geometry(name)
    d, channels = of.inner, 4 * of.latent_channels
    tokens, blocks = of.image_tokens + of.text_tokens, of.layers + of.single_layers
    time_and_pooled = (256 + of.pooled_width + 2 * d) * d
    modulations = (12 * of.layers + 3 * of.single_layers + 2) * d * d
    ends = of.image_tokens * 2 * channels * d + of.text_tokens * of.text_width * d
    return 2 * (time_and_pooled + modulations + ends + blocks * (12 * tokens * d * d + 2 * tokens * tokens * d))


def pipeline(
    name: str | ModelGeometry, device: str | torch.device, dtype: torch.dtype, shrink: int = 1
) -> FluxPipeline:
    """A complete pipeline on `device`, with the same random weights at every call on devices of one kind.

    Args:
        name: one of `GEOMETRIES`, or a geometry, for another size or number of text tokens.
        device: where the weights are made; the host holds none of them.
        dtype: of all networks.
        shrink: see `ModelGeometry.shrunk`.

    Raises:
        RequestError: an unknown name, or a shrink below 1.
    """
    of, device = geometry(name).shrunk(shrink), torch.device(device)
    if of.built_in:
        return load(of.name, device, dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=_made(lambda: _autoencoder(of), dtype, generator),
        text_encoder=_made(lambda: _pooled_encoder(of), dtype, generator),
        tokenizer=_tokenizer(POOLED_TOKENS),
        text_encoder_2=_made(lambda: _sequence_encoder(of), dtype, generator),
        tokenizer_2=_tokenizer(of.text_tokens),
        transformer=_made(lambda: transformer(of), dtype, generator),
    )


def _autoencoder(of: ModelGeometry) -> AutoencoderKL:
    """FLUX's autoencoder, 8x down; `sample_size`, the size that the engine takes by default, is the geometry's."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=of.decoder,
        layers_per_block=2,
        latent_channels=of.latent_channels,
        norm_num_groups=32,
        sample_size=of.height,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def light_decoder(
    name: str | ModelGeometry, device: str | torch.device, dtype: torch.dtype, shrink: int = 1
) -> AutoencoderTiny | AutoencoderKL:
    """The light decoder of `pipeline`'s latents on `device`: of TAEF1's and TAESD3's size, with random weights.

    A built-in model has its own, which is trained. Arguments and errors are those of `pipeline`.
    """
    of, device = geometry(name).shrunk(shrink), torch.device(device)
    if of.built_in:
        return load_light("", of.name, device, dtype)
    return _made(lambda: _tiny_autoencoder(of), dtype, torch.Generator(device).manual_seed(SEED))


def _tiny_autoencoder(of: ModelGeometry) -> AutoencoderTiny:
    """The configuration of madebyollin/taef1, which is that of madebyollin/taesd3, at `of.light` channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(of.light,) * 4,
        decoder_block_out_channels=(of.light,) * 4,
        latent_channels=of.latent_channels,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def _pooled_encoder(of: ModelGeometry) -> CLIPTextModel:
    """A stand-in of one layer for CLIP's text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=_VOCABULARY,
            hidden_size=of.pooled_width,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=of.pooled_width // 64,
            max_position_embeddings=POOLED_TOKENS,
            projection_dim=of.pooled_width,
            pad_token_id=0,
            bos_token_id=3,
            eos_token_id=1,  # never 2: that selects CLIP's legacy pooling
        )
    )


def _sequence_encoder(of: ModelGeometry) -> T5EncoderModel:
    """A stand-in of one layer for T5-XXL."""
    return T5EncoderModel(
        T5Config(
            vocab_size=_VOCABULARY,
            d_model=of.text_width,
            d_kv=64,
            d_ff=64,
            num_layers=1,
            num_heads=1,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def _tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """The built-in world's words, with room for `tokens` of them."""
    tokenizer = shapes_networks.tokenizer()
    tokenizer.model_max_length = tokens
    return tokenizer


def _made(build: Callable[[], nn.Module], dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """A module in `dtype`, made and filled on the generator's device without a copy anywhere else."""
    with torch.device("meta"):
        module = build()
    # nn.Module's own `to`: those of diffusers and transformers warn of casting loaded weights, and there are none yet.
    module = nn.Module.to(module, dtype).to_empty(device=generator.device)
    _fill(module, generator)
    return module.eval().requires_grad_(False)


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Norms' weights 1, biases 0, everything else normal with variance 1 / fan-in; buffers what their classes mean.

    Raises:
        ModelError: a buffer whose values are not known here; left alone it would hold whatever memory held.
    """
    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "bias":
            parameter.zero_()
        elif leaf == "weight" and parameter.ndim == 1:
            parameter.fill_(1)
        else:  # a vector that is neither, CLIP's class embedding, counts as one row
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.normal_(std=fan_in**-0.5, generator=generator)
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2] != "position_ids":
            raise ModelError(
                f"{type(module).__name__} has the buffer {name!r}, whose values this module does not know: "
                "fill it in rollflow.bench.geometries"
            )
        buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device))


class ClipReward:
    """A random network of CLIP's image encoder size: the cosine of an image's embedding with a fixed direction.

    It costs what a CLIP-based reward costs and means nothing. All of it is queued on the device; nothing waits for a
    result. Images of any size are resized to 224 x 224, without the crop that CLIP takes of images that are not square.

    Args:
        device: where it runs.
        dtype: of the network; resizing and scores are float32.
        config: the image encoder.
    """

    name = "clip"
    differentiable = True

    def __init__(self, device: torch.device, dtype: torch.dtype, config: CLIPVisionConfig):
        generator = torch.Generator(device).manual_seed(SEED)
        self.encoder = _made(lambda: CLIPVisionModelWithProjection(config), dtype, generator)
        direction = torch.randn(config.projection_dim, device=device, generator=generator)
        self.direction = F.normalize(direction, dim=0)
        self.mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device).view(3, 1, 1)
        self.deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device).view(3, 1, 1)
        self.side, self.dtype = config.image_size, dtype

    def check(self, prompt: str) -> None:
        """Accepts every prompt, and reads none."""

    def __call__(self, images: Float[Tensor, "row 3 height width"], prompts: Sequence[str]) -> Float[Tensor, " row"]:
        """Float32 scores in [-1, 1] of images in [0, 1], on the reward's device."""
        images = images.to(self.direction.device, torch.float32)
        images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True, align_corners=False)
        pixels = (images.clamp(0, 1) - self.mean) / self.deviation
        embedding = self.encoder(pixel_values=pixels.to(self.dtype)).image_embeds.float()
        return F.normalize(embedding, dim=1) @ self.direction


def clip_reward(device: str | torch.device, dtype: torch.dtype, shrink: int = 1) -> ClipReward:
    """The reward of ViT-L/14's size, 0.304 B parameters (Radford et al. 2021, arXiv 2103.00020).

    `shrink` divides layers and heads, for trying code out; below 1 it is a `RequestError`.
    """
    if shrink < 1:
        raise RequestError(f"shrink={shrink}: it divides sizes, so it must be a whole number from 1 on")
    heads = _part(16, shrink)
    config = CLIPVisionConfig(
        hidden_size=64 * heads,
        intermediate_size=4 * 64 * heads,
        projection_dim=_part(768, shrink, 64),
        num_hidden_layers=_part(24, shrink),
        num_attention_heads=heads,
        image_size=224,
        patch_size=14,
    )
    return ClipReward(torch.device(device), dtype, config)
