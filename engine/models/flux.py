"""The adapter of diffusers' `FluxPipeline` (FLUX.1 schnell and dev, and the built-in `shapes`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError, RequestError
from rollflow.models import BUILT_IN, Geometry, folder

# Pixels that the decoder takes at a time, on a CPU and on a GPU: a bound on its memory, and on a CPU a size whose
# activations are not handed back to the system after each batch (see `rollflow.engine`).
_DECODE_PIXELS = (2**17, 2**22)
_WORD_LEVEL = 1000  # vocabularies smaller than this are lists of words, and an unknown word is an error


class Conditioning(NamedTuple):
    """What the transformer needs of one prompt."""

    pooled: Float[Tensor, " pooled"]
    sequence: Float[Tensor, "text width"]


def load(name: str | Path, device: torch.device, dtype: torch.dtype) -> FluxPipeline:
    """A `FluxPipeline` from a built-in name, a local folder or a hub id.

    Raises:
        ModelError: nothing there, or something that is no FluxPipeline.
    """
    path = folder(str(name)) if str(name) in BUILT_IN else name
    try:
        pipeline = FluxPipeline.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{str(name)!r} is no FluxPipeline that can be loaded ({reason}): pass a built-in model "
            f"({', '.join(BUILT_IN)}), a folder that FluxPipeline.save_pretrained wrote, or a hub id"
        ) from error
    return pipeline.to(device)


class FluxModel:
    """Drives the parts of a `FluxPipeline` with rows of different prompts at different times.

    Args:
        pipeline: a complete FluxPipeline; its modules are used where they are, without gradients of their weights, and
            the autoencoder's weights are laid out channels last, in which a CPU convolves faster.

    Raises:
        ModelError: the object is no FluxPipeline, or parts of it are missing.
    """

    def __init__(self, pipeline: FluxPipeline):
        if not isinstance(pipeline, FluxPipeline):
            raise ModelError(f"a {type(pipeline).__name__} is no pipeline that rollflow knows: pass a FluxPipeline")
        missing = [
            name
            for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
            if getattr(pipeline, name, None) is None
        ]
        if missing:
            raise ModelError(f"the pipeline lacks {', '.join(missing)}: load it whole")
        self.pipeline = pipeline
        self.transformer = pipeline.transformer.eval().requires_grad_(False)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.vae.to(memory_format=torch.channels_last)
        self.device, self.dtype = self.transformer.device, self.transformer.dtype
        self.scaling, self.shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        self.text_tokens = min(512, pipeline.tokenizer_2.model_max_length)
        self._ids: dict[Geometry, tuple[Tensor, Tensor]] = {}

    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry:
        """See `FlowModel.geometry`; sizes are multiples of two latent pixels."""
        factor = self.pipeline.vae_scale_factor
        own = self.vae.config.sample_size
        height, width = own if height is None else height, own if width is None else width
        unit = 2 * factor
        if height % unit or width % unit or height < unit or width < unit:
            raise RequestError(f"size {height}x{width}: height and width must be multiples of {unit} pixels")
        rows, columns = height // factor, width // factor
        return Geometry(height, width, rows, columns, rows * columns // 4, self.transformer.config.in_channels)

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """See `FlowModel.encode`."""
        sequence, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.text_tokens
        )
        return [Conditioning(p.to(self.dtype), s.to(self.dtype)) for p, s in zip(pooled, sequence, strict=True)]

    def check_prompt(self, prompt: str) -> None:
        """See `FlowModel.check_prompt`."""
        tokenizer = self.pipeline.tokenizer_2
        ids = tokenizer(prompt).input_ids
        if len(tokenizer) < _WORD_LEVEL and tokenizer.unk_token_id in ids:
            known = sorted(word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens)
            strange = [word for word in dict.fromkeys(re.findall(r"\w+|[^\w\s]+", prompt.lower())) if word not in known]
            raise RequestError(
                f"the model does not know {', '.join(strange)} in {prompt!r}: its words are {' '.join(known)}"
            )
        if len(ids) > self.text_tokens:
            raise RequestError(
                f"the prompt has {len(ids)} tokens, the model reads {self.text_tokens}: shorten {prompt[:60]!r}..."
            )

    def _position_ids(self, geometry: Geometry, text: int) -> tuple[Tensor, Tensor]:
        if geometry not in self._ids:
            rows, columns = geometry.latent_height // 2, geometry.latent_width // 2
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
        sequence = torch.stack([c.sequence for c in conditioning])
        text_ids, image_ids = self._position_ids(geometry, sequence.shape[1])
        # The transformer rounds its timestep to the model's dtype, which merges neighbouring times in bfloat16: this
        # hook hands the embedding the exact one.
        exact = self.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: (tau * 1000, *args[1:]))
        with exact:
            return self.transformer(
                hidden_states=x,
                timestep=tau,
                guidance=guidance if self.transformer.config.guidance_embeds else None,
                pooled_projections=torch.stack([c.pooled for c in conditioning]),
                encoder_hidden_states=sequence,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]

    def decode(self, latents: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row 3 h w"]:
        """See `FlowModel.decode`."""
        latents = latents.to(self.vae.dtype, memory_format=torch.channels_last)
        pixels = latents.shape[-2] * latents.shape[-1] * self.pipeline.vae_scale_factor**2
        chunk = max(1, _DECODE_PIXELS[self.device.type == "cuda"] // pixels)
        images = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in latents.split(chunk)])
        return (images.float() / 2 + 0.5).clamp(0, 1)
