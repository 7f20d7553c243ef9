"""The adapter of diffusers' `FluxPipeline` (FLUX.1 schnell and dev, and the built-in `shapes`)."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline, FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rollflow.errors import ModelError, RequestError, line, shown
from rollflow.models import Capabilities, FlowModel, Geometry, caching, norms, recompute
from rollflow.models.attention import Pin, check_attention, pin
from rollflow.models.borrowed import Borrowed, networks_of
from rollflow.models.layout import Layout
from rollflow.models.loaded import is_compiled, loaded
from rollflow.models.recorded import traced
from rollflow.values import whole

_PATCH = (1, 2, 2)  # (t, y, x) of a token, in latent pixels
# Pixels that the decoder takes at a time, on a CPU and on a GPU: a bound on its memory, and on a CPU a size whose
# activations are not handed back to the system after each batch (see `rollflow.engine`).
_DECODE_PIXELS = (2**17, 2**22)
_TEXT_TOKENS = (256, 512)  # that FLUX.1 was trained with: schnell; and dev, which embeds its guidance
_WORD_LEVEL = 1000  # vocabularies smaller than this are lists of words, and an unknown word is an error


class Conditioning(NamedTuple):
    """What the transformer needs of one prompt."""

    pooled: Float[Tensor, " pooled"]
    sequence: Float[Tensor, "text width"]


class FluxModel(FlowModel):
    """Drives the parts of a `FluxPipeline` with rows of different prompts at different times.

    It has what `rollflow.models.pipeline.PipelineModel` has not: previews, CUDA graphs, a pinned attention, text
    encoders that can be released, and prompts that are checked. On a CPU it is no faster (`rollflow bench adapters`).

    Args:
        pipeline: a complete FluxPipeline; its modules are used where they are, without gradients of their weights, and
            the autoencoder's weights are laid out channels last, in which a CPU convolves faster. When the last engine
            on it closes they are as they were; see `rollflow.models.borrowed`. The declared signature is that of the
            networks as they come: compile or quantise the transformer, and load its LoRA, before.
        light: a small decoder of the same latents that particles may be judged by, such as TAESD's for FLUX.1 (its
            `scaling_factor` and `shift_factor` are heeded). Its output is an image, or has 3 n^2 channels, for cells of
            n x n pixels.
        attention: the kernel of the transformer's attention on a GPU, one of `rollflow.models.attention.ATTENTION`; by
            default torch's own choice, see `rollflow.models.attention.pin`.
        text_tokens: how many tokens of a prompt the transformer reads, padding included; by default those that it was
            trained with, see `text_tokens_of`.

    Raises:
        ModelError: the object is no FluxPipeline, parts of it are missing, or it is loaded in a way that no engine can
            work with; see `rollflow.models.loaded`.
        RequestError: an unknown attention, or more text tokens than the tokenizer gives.
    """

    def __init__(
        self,
        pipeline: FluxPipeline,
        light: AutoencoderKL | AutoencoderTiny | None = None,
        attention: str | None = None,
        text_tokens: int | None = None,
    ):
        if not isinstance(pipeline, FluxPipeline):
            raise ModelError(f"a {type(pipeline).__name__} is no pipeline that rollflow knows: pass a FluxPipeline")
        missing = [
            name
            for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            if getattr(pipeline, name, None) is None
        ]
        if missing:
            raise ModelError(f"the pipeline lacks {', '.join(missing)}: load it whole")
        check_attention(attention)
        self.text_tokens = text_tokens_of(pipeline, text_tokens)
        self.loaded = loaded(pipeline)
        self.pipeline, self.attention = pipeline, attention
        self.transformer, self.vae, self.light = pipeline.transformer, pipeline.vae, light
        if light is not None:
            light.to(self.vae.device, self.vae.dtype)
        decoders = [decoder for decoder in (self.vae, light) if decoder is not None]
        # The transformer rounds its timestep to the model's dtype, which merges neighbouring times in bfloat16: this
        # hook hands the embedding the exact one of the thread's own batch.
        self._exact = threading.local()
        hook = partial(_hooks, self.transformer, self._exact, attention)
        self._borrowed = Borrowed(self, [*networks_of(pipeline).values(), *decoders], decoders, hook)
        self.borrow, self.give_back = self._borrowed.borrow, self._borrowed.give_back
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        latent_channels = self.transformer.config.in_channels // math.prod(_PATCH)
        scaling, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        self.layout = Layout(_PATCH, (scaling,) * latent_channels, (shift,) * latent_channels)
        self.capabilities = Capabilities(
            preview=light is not None, graphable=self.loaded.graphable, recordable=True, releases_text=True,
            images=True, returns=True, rounded=True, caches=True, signature=self._signature(),
            compiled=self.loaded.compiled or any(map(is_compiled, decoders)),
        )  # fmt: skip
        self.kept = caching.width(self.transformer)
        # Prompts are checked on threads of those who ask, while a lane encodes: a tokenizer's padding is its state.
        self._reader = copy.deepcopy(pipeline.tokenizer_2)
        self._ids: dict[Geometry, tuple[Tensor, Tensor]] = {}
        self._recorded: dict[Geometry, Callable[..., Tensor]] = {}
        self._forms = caching.Forms(self.transformer)
        self._decoders: dict[tuple[torch.nn.Module, tuple[int, ...]], Callable[..., Tensor]] = {}

    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry:
        """See `FlowModel.geometry`; sizes are multiples of a token's."""
        factor = self.pipeline.vae_scale_factor
        own = self.vae.config.sample_size
        height, width = own if height is None else height, own if width is None else width
        unit = self.layout.patch[1] * factor
        if height % unit or width % unit or height < unit or width < unit:
            raise RequestError(f"size {height}x{width}: height and width must be multiples of {unit} pixels")
        size = height // factor, width // factor
        return Geometry(height, width, *size, self.layout.tokens(*size), self.layout.token_channels)

    def _signature(self) -> str:
        """The networks' configurations."""
        kinds = sorted({f"{type(p).__name__} {p.dtype}" for p in self.transformer.parameters()})
        decoders = [(dict(one.config), is_compiled(one)) for one in (self.vae, self.light) if one is not None]
        given = self.attention, self.text_tokens, self.loaded
        return repr((dict(self.transformer.config), *decoders, kinds, *given))

    def release_text_encoders(self) -> None:
        """Drops the text encoders, and their memory with them; prompts that were not encoded before are refused."""
        self.pipeline.text_encoder = self.pipeline.text_encoder_2 = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See `FlowModel.encode`."""
        with self._borrowed.lent():
            sequence, pooled, _ = self.pipeline.encode_prompt(
                list(prompts), None, device=self.device, max_sequence_length=self.text_tokens
            )
        return [Conditioning(p.to(self.dtype), s.to(self.dtype)) for p, s in zip(pooled, sequence, strict=True)]

    def check_prompt(self, prompt: str) -> None:
        """See `FlowModel.check_prompt`."""
        if self.pipeline.text_encoder is None:
            raise RequestError(
                f"the prompt {shown(prompt, 60)} was not encoded before the text encoders were released: encode all "
                "prompts first (Engine.encode), or make a new engine"
            )
        tokenizer = self._reader
        ids = tokenizer(prompt).input_ids
        if len(tokenizer) < _WORD_LEVEL and tokenizer.unk_token_id in ids:
            known = sorted(word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens)
            strange = [word for word in dict.fromkeys(re.findall(r"\w+|[^\w\s]+", prompt.lower())) if word not in known]
            raise RequestError(
                f"the model does not know {line(', '.join(strange), 60)} in {shown(prompt, 60)}: its words are "
                f"{line(' '.join(known), 320)}"
            )
        if len(ids) > self.text_tokens:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the model reads {self.text_tokens}: shorten {shown(prompt, 60)}"
            )

    def _position_ids(self, geometry: Geometry, text: int) -> tuple[Tensor, Tensor]:
        if geometry not in self._ids:
            _, y, x = self.layout.patch
            rows, columns = geometry.latent_height // y, geometry.latent_width // x
            with torch.inference_mode(False):  # they outlive this call, which may or may not need gradients
                image = FluxPipeline._prepare_latent_image_ids(1, rows, columns, self.device, self.dtype)
                self._ids[geometry] = torch.zeros(text, 3, device=self.device, dtype=self.dtype), image
        return self._ids[geometry]

    def velocity(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        conditioning: Sequence[Conditioning],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
    ) -> Float[Tensor, "row token channel"]:
        """See `FlowModel.velocity`; `guidance` is FLUX.1-dev's embedded guidance and is not used by other models."""
        return self.forward(x, tau, self.collate(conditioning), guidance, geometry)

    def collate(self, conditioning: Sequence[Conditioning]) -> tuple[Tensor, Tensor]:
        """The conditionings of a batch's rows as the tensors that `forward` takes: pooled, sequence."""
        return torch.stack([c.pooled for c in conditioning]), torch.stack([c.sequence for c in conditioning])

    def forward(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        collated: tuple[Tensor, ...],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
    ) -> Float[Tensor, "row token channel"]:
        """`velocity` of collated conditionings: a function of tensors alone, which a CUDA graph can hold."""
        network = None if torch.is_grad_enabled() else self._recorded.get(geometry)
        with self._borrowed.lent():
            return (network or partial(self._network, geometry))(x, tau, *collated, guidance)

    def _network(
        self, geometry: Geometry, x: Tensor, tau: Tensor, pooled: Tensor, sequence: Tensor, guidance: Tensor
    ) -> Tensor:
        text_ids, image_ids = self._ids.get(geometry) or self._position_ids(geometry, sequence.shape[1])
        self._exact.tau = tau
        try:
            return self.transformer(
                hidden_states=x,
                timestep=tau,
                guidance=guidance if self.transformer.config.guidance_embeds else None,
                pooled_projections=pooled,
                encoder_hidden_states=sequence,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
        finally:
            self._exact.tau = None

    def forward_kept(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        collated: tuple[Tensor, ...],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
    ) -> tuple[Float[Tensor, "row token channel"], Float[Tensor, "row token kept"]]:
        """`forward`, and what is kept of it; see `rollflow.models.caching`."""
        whole, inputs = self._forms.of(geometry)[0], (x, tau, *collated, guidance)
        with self._borrowed.lent():
            return whole(*inputs, self._positions(geometry, collated[1]))

    def forward_cached(
        self,
        x: Float[Tensor, "row token channel"],
        tau: Float[Tensor, " row"],
        collated: tuple[Tensor, ...],
        guidance: Float[Tensor, " row"],
        geometry: Geometry,
        kept: Float[Tensor, "row token kept"],
    ) -> Float[Tensor, "row token channel"]:
        """`forward` by the first block alone, and what was kept of other evaluations."""
        cached, inputs = self._forms.of(geometry)[1], (x, tau, *collated, guidance)
        with self._borrowed.lent():
            return cached(*inputs, self._positions(geometry, collated[1]), kept)

    def _positions(self, geometry: Geometry, sequence: Tensor) -> Tensor:
        return torch.cat(self._ids.get(geometry) or self._position_ids(geometry, sequence.shape[1]))

    def record(self, geometry: Geometry, conditioning: Conditioning) -> None:
        """Records transformer and decoders for an image size, for a CPU; see `rollflow.models.recorded`.

        With `geometry.kept` it is the forms of the transformer that keep, and none of the decoders.

        Compiled networks and quantized transformers stay as they are.
        """
        if geometry in self._recorded or geometry in self._forms.recorded:
            return
        self._position_ids(geometry, len(conditioning.sequence))  # made outside of any recording
        generator = torch.Generator().manual_seed(0)

        def inputs(rows: int) -> tuple[Tensor, ...]:
            x = torch.randn(rows, geometry.token, geometry.channel, generator=generator).to(self.dtype)
            collated = self.collate([conditioning] * rows)
            return x, torch.linspace(0.3, 1, rows), *collated, torch.full((rows,), 3.5)

        if geometry.kept:
            if self.loaded.plain:
                self._forms.record(geometry, inputs, self._positions(geometry, conditioning.sequence[None]))
            return

        def latents(rows: int) -> tuple[Tensor]:
            shape = (rows, self.layout.channels, geometry.latent_height, geometry.latent_width)
            z = torch.randn(shape, generator=generator).to(self.vae.dtype)
            return (z.to(memory_format=torch.channels_last),)

        network: Callable[..., Tensor] = partial(self._network, geometry)
        if self.loaded.plain:
            network = traced(network, self.transformer, inputs(3), inputs(5), "transformer")
        self._recorded[geometry] = network
        for decoder in (self.vae, self.light):
            if decoder is not None and not is_compiled(decoder):
                recorded = traced(partial(_decoded, decoder), decoder, latents(3), latents(5), "decoder")
                self._decoders[decoder, tuple(latents(1)[0].shape[1:])] = recorded

    def decode(self, latents: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row 3 h w"]:
        """See `FlowModel.decode`."""
        return self._decode(self.vae, latents)

    def state(self, image: Float[Tensor, "3 height width"], geometry: Geometry) -> Float[Tensor, "token channel"]:
        """The clean state of an image in [0, 1], for searches that start from one: the mode of the encoder's answer.

        Raises:
            ModelError: the autoencoder has no encoder.
        """
        encoder = getattr(self.vae, "encoder", None)
        if encoder is None:
            raise ModelError(f"a {type(self.vae).__name__} without an encoder: leave image out")
        pixels = (image[None] * 2 - 1).to(self.device, self.vae.dtype, memory_format=torch.channels_last)
        with torch.no_grad(), self._borrowed.lent():
            z = self.vae.encode(pixels).latent_dist.mode()
        return self.layout.pack(self.layout.normalise(z.float()))[0]

    def preview(self, latents: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row 3 h w"]:
        """`decode` by the light decoder."""
        assert self.light is not None, "previews are asked for only where they are declared"
        own = self.layout.normalise(latents)  # as the transformer has them
        return self._decode(self.light, own / self.light.config.scaling_factor + self.light.config.shift_factor)

    def _decode(self, decoder: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
        """In chunks; what comes in cells of n x n pixels (3 n^2 channels) is spread out."""
        latents = latents.to(decoder.dtype, memory_format=torch.channels_last)
        pixels = latents.shape[-2] * latents.shape[-1] * self.pipeline.vae_scale_factor**2
        chunk = 1 if recompute.active() else max(1, _DECODE_PIXELS[self.device.type == "cuda"] // pixels)
        recorded = None if torch.is_grad_enabled() else self._decoders.get((decoder, tuple(latents.shape[1:])))
        decode = recorded or partial(_decoded, decoder)
        ours = nullcontext() if is_compiled(decoder) else norms.fused(self.device)  # or compiled with them in it
        with self._borrowed.lent(), ours:
            images = torch.cat([decode(part) for part in latents.split(chunk)])
        if images.shape[1] > 3:
            images = torch.nn.functional.pixel_shuffle(images, math.isqrt(images.shape[1] // 3))
        return (images.float() / 2 + 0.5).clamp(0, 1)


def text_tokens_of(pipeline: FluxPipeline, asked: int | None = None) -> int:
    """How many tokens of a prompt a FLUX transformer reads: as asked, or as it was trained.

    That is 512 of those that embed their guidance, such as FLUX.1-dev, and 256 of others, such as FLUX.1-schnell; and
    no more than the tokenizer gives.

    Raises:
        RequestError: fewer than 1, or more than the tokenizer gives.
    """
    most = pipeline.tokenizer_2.model_max_length
    if asked is not None:
        return whole("text_tokens", asked, 1, most)
    return min(_TEXT_TOKENS[bool(pipeline.transformer.config.guidance_embeds)], most)


def _hooks(
    transformer: FluxTransformer2DModel, exact: threading.local, attention: str | None
) -> list[RemovableHandle | Pin]:
    pins = pin(transformer, attention, transformer.device)
    return [*pins, transformer.time_text_embed.register_forward_pre_hook(partial(_exact_time, exact))]


def _exact_time(exact: threading.local, module: torch.nn.Module, args: tuple) -> tuple | None:
    tau = getattr(exact, "tau", None)
    return None if tau is None else (tau * 1000, *args[1:])


def _decoded(decoder: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    return decoder.decode(latents, return_dict=False)[0]
