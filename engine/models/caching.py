"""First-block caching of a FLUX transformer: what the blocks after the first add is kept of one evaluation for others.

An evaluation is `u = out(h1 + r)`, with `h1` the image's hidden states after the first block and `r` what all later
blocks add to them. Along a trajectory `r` changes slowly, so that a child may take that of its parent: the first block
then runs alone, and sees the child's own state, time and prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float
from torch import Tensor

from rollflow.models import Geometry
from rollflow.models.recorded import Function, traced


class Entered(NamedTuple):
    """What the blocks after the first are given.

    Attributes:
        image, text: hidden states, `[row, token, width]`.
        time: the embedding of time, guidance and pooled prompt.
        rotary: of the positions.
    """

    image: Float[Tensor, "row token width"]
    text: Float[Tensor, "row text width"]
    time: Float[Tensor, "row width"]
    rotary: Any


def width(transformer: FluxTransformer2DModel) -> int:
    """Channels of a token's hidden state."""
    return int(transformer.config.num_attention_heads * transformer.config.attention_head_dim)


class Forms:
    """The two forms of a transformer's forward: one that keeps, and one that takes what was kept.

    Both are functions of `(x, tau, pooled, sequence, guidance, positions)`, see `entered`, the second of what was kept
    besides.

    Args:
        transformer: the network.

    Attributes:
        recorded: by image size, the forms that were recorded for a CPU; see `rollflow.models.recorded`.
    """

    def __init__(self, transformer: FluxTransformer2DModel):
        self._plain = partial(_whole, transformer), partial(_cached, transformer)
        self._transformer = transformer
        self.recorded: dict[Geometry, tuple[Function, Function]] = {}

    def of(self, geometry: Geometry) -> tuple[Function, Function]:
        """Both for an image size."""
        return self.recorded.get(geometry, self._plain)

    def record(self, geometry: Geometry, inputs: Callable[[int], tuple[Tensor, ...]], positions: Tensor) -> None:
        """Records both.

        Args:
            geometry: of the batches.
            inputs: of a batch of so many rows, without positions.
            positions: of text and image tokens.
        """
        one, other = ((*inputs(rows), positions) for rows in (3, 5))
        kept = [torch.randn(*batch[0].shape[:2], geometry.kept).to(batch[0]) for batch in (one, other)]
        (whole, cached), network = self._plain, self._transformer
        self.recorded[geometry] = (
            traced(whole, network, one, other, "transformer"),
            traced(cached, network, (*one, kept[0]), (*other, kept[1]), "transformer's first block"),
        )


def entered(
    transformer: FluxTransformer2DModel, x: Tensor, tau: Tensor, pooled: Tensor, sequence: Tensor, guidance: Tensor,
    positions: Tensor,
) -> Entered:  # fmt: skip
    """Embeds a batch and runs the first block.

    Args:
        transformer: the network.
        x: states as the network takes them, `[row, token, channel]`.
        tau: linear times, of which the embedding is given the exact ones, whatever the network's dtype.
        pooled, sequence: of the prompts.
        guidance: embedded guidance scales; not used by networks that embed none.
        positions: of text and image tokens.
    """
    scales = (guidance.to(x.dtype) * 1000,) if transformer.config.guidance_embeds else ()
    time = transformer.time_text_embed(tau * 1000, *scales, pooled)
    rotary = transformer.pos_embed(positions)
    text, image = _block(
        transformer.transformer_blocks[0], transformer.context_embedder(sequence), transformer.x_embedder(x), time,
        rotary,
    )  # fmt: skip
    return Entered(image, text, time, rotary)


def whole(transformer: FluxTransformer2DModel, first: Entered) -> tuple[Tensor, Tensor]:
    """The velocity, by all blocks, and what those after the first add to the image's hidden states."""
    text, image = first.text, first.image
    for block in (*transformer.transformer_blocks[1:], *transformer.single_transformer_blocks):
        text, image = _block(block, text, image, first.time, first.rotary)
    return _out(transformer, image, first.time), image - first.image


def cached(
    transformer: FluxTransformer2DModel, first: Entered, kept: Float[Tensor, "row token width"]
) -> Float[Tensor, "row token channel"]:
    """The velocity by the first block alone, and what was kept of the others."""
    return _out(transformer, first.image + kept, first.time)


def _whole(transformer: FluxTransformer2DModel, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    return whole(transformer, entered(transformer, *inputs))


def _cached(transformer: FluxTransformer2DModel, *inputs: Tensor) -> Tensor:
    *given, kept = inputs
    return cached(transformer, entered(transformer, *given), kept)


def _block(block: Any, text: Tensor, image: Tensor, time: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
    return block(
        hidden_states=image, encoder_hidden_states=text, temb=time, image_rotary_emb=rotary,
        joint_attention_kwargs=None,
    )  # fmt: skip


def _out(transformer: FluxTransformer2DModel, image: Tensor, time: Tensor) -> Tensor:
    return transformer.proj_out(transformer.norm_out(image, time))
