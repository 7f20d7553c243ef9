"""Learns what a pipeline hands to its autoencoder, and what it makes of the pixels."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from rollflow.errors import ModelError
from rollflow.models import Geometry
from rollflow.models.layout import Fused, patch_of
from rollflow.models.pipeline.drive import SCALES, Driver
from rollflow.models.pipeline.learn import TIMES, Learned
from rollflow.models.pipeline.outputs import random_outputs
from rollflow.models.pipeline.recording import Decode, Recording, Script
from rollflow.models.text import Size, Text

TOLERANCE = {True: 1e-3, False: 0.2}  # of a pixel, where all is computed in 32 bits, and where something is in 16
AVERAGED = 2  # random states, and as many of the other sign, over which the rounding of 16 bits is averaged
DIGITS = {True: 64, False: 8}  # how many numbers 32 bits and 16 bits tell apart with certainty


@dataclass(frozen=True)
class Decoding:
    """`z = offset + scale x[source]`, what is decoded of a state, and the decoder's further arguments.

    Attributes:
        source: for each element of z the element of the state; None where they are in the same order.
        scale, offset: one for each element of z, or one number for all.
        shape: of z, a row of it.
        args, kwargs: of `vae.decode`, besides z.
        dtype: of z.
        fused: the same for the kernels, on any device; None where they cannot.
    """

    source: Int64[Tensor, " element"] | None
    scale: Float[Tensor, " *element"]
    offset: Float[Tensor, " *element"]
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    fused: Fused | None

    def latents(self, x: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        """z of states, differentiable, in float32."""
        flat = x.flatten(1)
        chosen = flat if self.source is None else flat[:, self.source]
        return (chosen * self.scale + self.offset).view(len(x), *self.shape)


class Decodings:
    """The decodings of a model, by size; see `rollflow.models.layout.FusedMap`."""

    def __init__(self) -> None:
        self.of: dict[Geometry, Decoding] = {}

    def shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Of what is decoded of a row."""
        return self.of[geometry].shape

    def decodable(self, states: Float[Tensor, "row token channel"], geometry: Geometry) -> Float[Tensor, "row ..."]:
        """What is decoded of states."""
        return self.of[geometry].latents(states)

    def fused(self, geometry: Geometry, device: torch.device) -> Fused | None:
        """What is decoded of states, for the kernels."""
        known = self.of[geometry].fused
        return known and replace(known, scale=known.scale.to(device), offset=known.offset.to(device))

    def stated(self, latents: Float[Tensor, "*latent"], geometry: Geometry) -> Float[Tensor, "token channel"]:
        """The elements of one row's latents where they lie in a state."""
        source, flat = self.of[geometry].source, latents.reshape(-1)
        state = flat if source is None else torch.zeros_like(flat).index_copy(0, source, flat)
        return state.view(geometry.token, geometry.channel)

    def coarse(self, x: Float[Tensor, "token channel"], geometry: Geometry) -> Float[Tensor, "token channel"]:
        """Means over 2 x 2 latent pixels in place of their elements."""
        decoding = self.of[geometry]
        flat = x.reshape(-1)
        z = (flat if decoding.source is None else flat[decoding.source]).view(-1, 1, *decoding.shape[-2:])
        means = torch.nn.functional.avg_pool2d(z, 2, ceil_mode=True, count_include_pad=False)
        wide = means.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., : z.shape[-2], : z.shape[-1]].reshape(-1)
        low = wide if decoding.source is None else torch.zeros_like(flat).index_copy(0, decoding.source, wide)
        return low.view_as(x)


def learn_decoding(driver: Driver, size: Size, text: Text, learned: Learned) -> Decoding:
    """Learns the way from a state to the decoder's door, which must be one that moves, scales and shifts elements.

    Raises:
        ModelError: it is another one.
    """
    kind, shape = driver.name, learned.shape
    time, outputs = TIMES[driver.exact][0] * driver.clock.span, random_outputs(learned.real)
    numel = math.prod(shape)
    dtype = next(driver.pipeline.vae.parameters()).dtype
    precise = driver.exact and dtype in (torch.float32, torch.float64)
    base = DIGITS[precise]
    index = torch.arange(numel, dtype=torch.float32)
    count = max(1, math.ceil(math.log(numel, base))) if numel > 1 else 1
    probes = [torch.zeros(numel), torch.ones(numel)]
    probes += [torch.div(index, base**k, rounding_mode="floor") % base for k in range(count)]
    if not precise:
        generator = torch.Generator().manual_seed(3)
        many = [(1 + torch.rand(numel, generator=generator)).bfloat16().float() for _ in range(AVERAGED)]
        probes += [*many, *(-x for x in many)]

    def z_of(states: Tensor) -> Decode:
        script = Script([time], lambda i, x: states.to(x), outputs, decode=None)
        decodes = driver.run([text] * len(states), size, SCALES[0], script).decodes
        if not decodes:
            raise ModelError(f"the pipeline {kind} does not hand its latents to the `decode` of its `vae`")
        return decodes[0]

    found = z_of(torch.stack(probes).view(-1, *shape))
    z = found.latents.float()
    if len(z) != len(probes):  # image by image
        z = torch.cat([z_of(probe.view(1, *shape)).latents.float() for probe in probes])
    z = z.cpu().flatten(1)
    offset, factor = z[0], z[1] - z[0]
    if bool((factor.abs() < 1e-6).any()):
        raise ModelError(f"the pipeline {kind} decodes latents that do not depend on the state")
    source = torch.zeros_like(offset, dtype=torch.int64)
    for k in range(count):
        digit = (z[2 + k] - offset) / factor
        if bool((digit - digit.round()).abs().max() > 0.2):
            raise ModelError(f"the pipeline {kind} mixes the elements of its latents before they are decoded")
        source += digit.round().long() * base**k
    if bool((source < 0).any() or (source >= numel).any()):
        raise ModelError(f"the pipeline {kind} does more to its latents than to move, scale and shift them")
    if not precise:
        last = slice(-2 * AVERAGED, None)
        factor = _averaged(factor, offset, torch.stack(probes[last])[:, source], z[last])
    like, in_order = found.latents, len(source) == numel and torch.equal(source, torch.arange(numel))
    row = tuple(like.shape[1:])
    fused = _fused(None if in_order else source, factor, offset, row, like.dtype) if len(source) == numel else None
    if bool((factor == factor[0]).all() and (offset == offset[0]).all()):
        factor, offset = factor[0], offset[0]
    order = None if in_order else source.to(like.device)
    args = tuple(_one_row(value, like) for value in found.args)
    kwargs = {key: _one_row(value, like) for key, value in found.kwargs.items() if key != "return_dict"}
    return Decoding(order, factor.to(like.device), offset.to(like.device), row, args, kwargs, like.dtype, fused)


def _fused(
    source: Int64[Tensor, " element"] | None, scale: Float[Tensor, " element"], offset: Float[Tensor, " element"],
    shape: tuple[int, ...], dtype: torch.dtype,
) -> Fused | None:  # fmt: skip
    """A decoding of all elements of a state, for the kernels; None where they lie in no patches of a `Layout`."""
    tables, tokens, patch = torch.stack([scale, offset]), 1, None  # [2, element of z]
    counts: tuple[int, ...] = (1, shape[0], len(scale))
    if source is not None:
        if (patch := patch_of(source, shape)) is None:
            return None
        tables = torch.empty_like(tables).index_copy_(1, source, tables)  # [2, element of x]
        counts = (shape[0], shape[0] * math.prod(patch))
        tokens = len(scale) // counts[1]
    for count in counts:  # numbers of each table, from few to many
        shared = tables.view(2, tokens, count, -1).transpose(1, 2).flatten(2)
        if torch.equal(shared, shared[:, :, :1].expand_as(shared)):
            few = shared[:, :, 0].contiguous()
            return Fused(shape, patch, few[0], few[1], torch.float32 if dtype == torch.float64 else dtype)
    return None


def _averaged(
    factor: Float[Tensor, " element"], offset: Float[Tensor, " element"], x: Float[Tensor, "probe element"],
    z: Float[Tensor, "probe element"],
) -> Float[Tensor, " element"]:  # fmt: skip
    """Scales by least squares, over all elements for which what was rounded is the same; probes have a mean of 0."""
    pairs, group = torch.unique(torch.stack([factor, offset]), dim=1, return_inverse=True)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(pairs.shape[1], dtype=torch.float64).index_add_(0, group, values.sum(0))

    x = x.double()
    return (total(x * z) / total(x.square())).float()[group]


def _one_row(value: Any, latents: Tensor) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == len(latents):
        return value[:1].clone()
    return value


def decoded(vae: Any, decoding: Decoding, z: Float[Tensor, "row ..."], clip: bool) -> Tensor:
    """Images [row, 3, height, width] or clips [row, frame, 3, height, width], float32 in [0, 1]."""

    def spread(value: Any) -> Any:
        return value.expand(len(z), *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else value

    args, kwargs = map(spread, decoding.args), {key: spread(value) for key, value in decoding.kwargs.items()}
    made = apart(vae).decode(z.to(decoding.dtype), *args, return_dict=False, **kwargs)[0]
    if made.ndim == 5:  # [row, 3, frame, height, width]
        made = made.transpose(1, 2) if clip else made[:, :, 0]
    return (made.float() / 2 + 0.5).clamp(0, 1)


def apart(vae: Any) -> Any:
    """The autoencoder, for one call of one thread: those of Wan and Qwen-Image keep a cache of frames in attributes.

    Such a one is copied without its networks, so that lanes do not write into one another's cache.
    """
    return copy.copy(vae) if hasattr(vae, "clear_cache") else vae


def images_of(recording: Recording, clip: bool) -> Tensor:
    """What a pipeline returned, as `decoded` has it."""
    given = recording.images
    pixels = torch.as_tensor(given if isinstance(given, Tensor) else _stacked(given)).float()
    if pixels.ndim == 5 and not clip:
        pixels = pixels[:, 0]
    return pixels.movedim(-1, -3) if pixels.shape[-1] == 3 and pixels.shape[-3] != 3 else pixels


def _stacked(given: Any) -> Any:
    if isinstance(given, list):
        return torch.stack([torch.as_tensor(one) for one in given])
    return torch.as_tensor(given)
