"""From an image to the state that a search starts from: the autoencoder's encoder, and `Decoding` backwards."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow.errors import ModelError
from rollflow.models.pipeline.decoding import Decoding, apart


def state_of(vae: Any, decoding: Decoding, image: Float[Tensor, "... 3 height width"]) -> Float[Tensor, " element"]:
    """The clean state of an image [3, height, width] or clip [frame, 3, height, width] in [0, 1], flat, float32.

    It is the mode of the encoder's distribution, not a sample of it: a search adds noise of its own.

    Raises:
        ModelError: the autoencoder cannot encode, or not to what is decoded.
    """
    kind, weight = type(vae).__name__, next(vae.parameters())
    pixels = (image * 2 - 1).to(weight)
    frames = pixels if pixels.ndim == 4 else pixels[None]  # [frame, 3, height, width]
    given = frames.transpose(0, 1)[None] if len(decoding.shape) == 4 else frames
    with torch.no_grad():
        try:
            encoded = apart(vae).encode(given)
        except (NotImplementedError, AttributeError) as error:
            raise ModelError(f"a {kind} does not encode images: leave image out") from error
    z = latents_of(encoded)
    if z is None or tuple(z.shape[1:]) != decoding.shape:
        shape = None if z is None else list(z.shape[1:])
        raise ModelError(f"a {kind} encodes to {shape}, and what is decoded is {list(decoding.shape)}: leave image out")
    flat = (z[0].reshape(-1).float() - decoding.offset) / decoding.scale
    return flat if decoding.source is None else torch.zeros_like(flat).index_copy(0, decoding.source, flat)


def latents_of(encoded: Any) -> Tensor | None:
    """The latents of what `vae.encode` gave: the mode where it is a distribution."""
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    found = (getattr(encoded, name, None) for name in ("latents", "latent"))
    return next((one for one in found if one is not None), None)
