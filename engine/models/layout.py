"""Where a model's latents lie in its tokens, and what its autoencoder multiplies and adds: values, and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from rollflow.errors import ModelError, RequestError, shown

SIDES = (1, 2, 4, 8)  # of a patch, in latent pixels: what `rollflow.kernels.finish` can turn


@runtime_checkable
class LatentMap(Protocol):
    """The way from a state to what is decoded, which moves, scales and shifts elements. See also `FusedMap`."""

    def shape(self, geometry: Any) -> tuple[int, ...]:
        """Of what is decoded of a row."""
        ...

    def decodable(self, states: Float[Tensor, "row token channel"], geometry: Any) -> Float[Tensor, "row ..."]:
        """What is decoded of states; differentiable."""
        ...

    def stated(self, latents: Float[Tensor, "*latent"], geometry: Any) -> Float[Tensor, "token channel"]:
        """The elements of one row's latents where they lie in a state, neither scaled nor shifted."""
        ...

    def coarse(self, x: Float[Tensor, "token channel"], geometry: Any) -> Float[Tensor, "token channel"]:
        """The low band of a state: means over small patches in place of their elements."""
        ...


@dataclass(frozen=True)
class Fused:
    """The way to latents that `rollflow.kernels` goes in one pass over memory: elements put in place, scaled, shifted.

    Attributes:
        shape: of the latents, a row of it. With a patch, [channel, ..., width]: what lies between is one height.
        patch: (y, x), where tokens lie as those of a `Layout` do; None where elements lie in the order of the latents.
        scale: with a patch, a number for each latent channel, or for each channel of a token; without, each number
            stands for as many consecutive elements.
        offset: as many numbers.
        dtype: of the latents; None for that of the model.
    """

    shape: tuple[int, ...]
    patch: tuple[int, int] | None
    scale: Float32[Tensor, " number"]
    offset: Float32[Tensor, " number"]
    dtype: torch.dtype | None = None


@runtime_checkable
class FusedMap(LatentMap, Protocol):
    """A `LatentMap` that the kernels go by themselves, at least for some sizes."""

    def fused(self, geometry: Any, device: torch.device) -> Fused | None:
        """What `decodable` does, for the kernels; None where they cannot."""
        ...


@dataclass(frozen=True)
class Layout:
    """How tokens are made of latents, and how an autoencoder takes them.

    A token is a patch of every latent channel. Its channels are ordered (latent channel, dy, dx), as
    `FluxPipeline._pack_latents` of diffusers orders them; tokens are ordered (y, x). The decoder takes
    `latents / scaling + shift`, channel by channel.

    Attributes:
        patch: (t, y, x), latent pixels that a token covers; t is 1: a model of clips has a `LatentMap` of its own.
        scaling: the autoencoder's scaling factors, one a latent channel.
        shift: the autoencoder's shifts, one a latent channel.

    Raises:
        ModelError: a patch that no token can cover, or numbers that are not one a channel, finite, and for `scaling`
            other than 0.
    """

    patch: tuple[int, int, int]
    scaling: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("patch", "scaling", "shift"):
            given = getattr(self, name)
            if not isinstance(given, Sequence) or not all(isinstance(number, int | float) for number in given):
                raise ModelError(f"Layout({name}={shown(given)}): it must be a tuple of numbers")
            if not all(math.isfinite(number) for number in given):
                raise ModelError(f"Layout({name}={shown(given)}): its numbers must be finite")
        _check_patch(self.patch)
        if not self.scaling or len(self.scaling) != len(self.shift):
            raise ModelError(
                f"Layout with {len(self.scaling)} numbers in scaling and {len(self.shift)} in shift: each must hold "
                "one number a latent channel"
            )
        if not all(self.scaling):
            raise ModelError(
                f"Layout(scaling={shown(self.scaling)}): its numbers must not be 0, latents are divided by them"
            )
        object.__setattr__(self, "patch", tuple(self.patch))
        object.__setattr__(self, "scaling", tuple(map(float, self.scaling)))
        object.__setattr__(self, "shift", tuple(map(float, self.shift)))

    def shape(self, geometry: Any) -> tuple[int, int, int]:
        """See `LatentMap`."""
        return self.channels, geometry.latent_height, geometry.latent_width

    def decodable(
        self, states: Float[Tensor, "row token packed"], geometry: Any
    ) -> Float[Tensor, "row channel height width"]:
        """See `LatentMap`."""
        return self.denormalise(self.unpack(states, geometry.latent_height, geometry.latent_width))

    def stated(self, latents: Float[Tensor, "channel height width"], geometry: Any) -> Float[Tensor, "token packed"]:
        """See `LatentMap`."""
        return self.pack(latents[None])[0]

    def coarse(self, x: Float[Tensor, "token packed"], geometry: Any) -> Float[Tensor, "token packed"]:
        """See `LatentMap`."""
        return self.patch_means(x)

    def fused(self, geometry: Any, device: torch.device) -> Fused:
        """See `FusedMap`."""
        return Fused(self.shape(geometry), self.patch[1:], *self.affine(device))

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return len(self.scaling)

    @property
    def token_channels(self) -> int:
        """Channels of a token."""
        return self.channels * math.prod(self.patch)

    def tokens(self, height: int, width: int) -> int:
        """How many tokens a latent of this size has.

        Args:
            height: of the latent, in latent pixels.
            width: of the latent, in latent pixels.

        Raises:
            RequestError: patches do not cover this size without a rest.
        """
        _, y, x = self.patch
        if min(height, width) < 1 or height % y or width % x:
            raise RequestError(f"a latent of {height}x{width}: height must be a multiple of {y}, width one of {x}")
        return (height // y) * (width // x)

    def unpack(
        self, tokens: Float[Tensor, "row token packed"], height: int, width: int
    ) -> Float[Tensor, "row channel {height} {width}"]:
        """The latents that tokens are made of. Raises as `tokens` does."""
        self.tokens(height, width)
        _, y, x = self.patch
        patches = tokens.view(len(tokens), height // y, width // x, self.channels, y, x)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), self.channels, height, width)

    def pack(self, latents: Float[Tensor, "row channel height width"]) -> Float[Tensor, "row token packed"]:
        """The tokens of latents: the inverse of `unpack`. Raises as `tokens` does."""
        rows, channels, height, width = latents.shape
        count = self.tokens(height, width)
        _, y, x = self.patch
        patches = latents.reshape(rows, channels, height // y, y, width // x, x)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, count, self.token_channels).contiguous()

    def denormalise(
        self, latents: Float[Tensor, "*row channel height width"]
    ) -> Float[Tensor, "*row channel height width"]:
        """`latents / scaling + shift`: from what the model draws to what the decoder takes; shape and dtype stay."""
        return (latents / self._by_channel("scaling", latents) + self._by_channel("shift", latents)).to(latents.dtype)

    def normalise(
        self, latents: Float[Tensor, "*row channel height width"]
    ) -> Float[Tensor, "*row channel height width"]:
        """`(latents - shift) scaling`: the inverse of `denormalise`."""
        return ((latents - self._by_channel("shift", latents)) * self._by_channel("scaling", latents)).to(latents.dtype)

    def affine(self, device: torch.device) -> tuple[Float32[Tensor, " channel"], Float32[Tensor, " channel"]]:
        """`(1 / scaling, shift)` on a device, as `rollflow.kernels.finish` takes them.

        A CUDA graph keeps their addresses: whoever captures one holds on to them.
        """
        inverse = [1.0 / scaling for scaling in self.scaling]  # in double precision, rounded once
        inverses, shifts = (torch.tensor(v, dtype=torch.float32, device=device) for v in (inverse, self.shift))
        return inverses, shifts

    def patch_means(self, x: Float[Tensor, "token packed"]) -> Float[Tensor, "token packed"]:
        """The mean of each patch in place of its elements: the low band, or all there is for a patch of 1."""
        patches = x.view(len(x), self.channels, -1)
        return patches.mean(2, keepdim=True).expand_as(patches).reshape(x.shape)

    def _by_channel(self, name: str, like: Tensor) -> Tensor | float:
        """A field to compute with: a number where all channels share it, which takes no memory on the device."""
        values = getattr(self, name)
        return values[0] if len(set(values)) == 1 else _vector(values, like.device)


def patch_of(source: Int64[Tensor, " element"], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The patch (y, x) of the `Layout` that unpacks states to latents of a shape as `x[source]` does; None of none.

    Latents are [channel, ..., width]: tokens of clips lie frame by frame, so that frames are parts of one height.
    """
    if len(shape) < 2 or len(source) != math.prod(shape):
        return None
    channels, height, width = shape[0], math.prod(shape[1:-1]), shape[-1]
    elements = torch.arange(len(source), dtype=torch.float64, device=source.device)
    for y, x in product(SIDES, SIDES):
        if height % y == 0 and width % x == 0:
            layout = Layout((1, y, x), (1.0,) * channels, (0.0,) * channels)
            tokens = elements.view(1, -1, layout.token_channels)
            if torch.equal(layout.unpack(tokens, height, width).flatten().long(), source):
                return y, x
    return None


def _check_patch(patch: Sequence[float]) -> None:
    if len(patch) != 3:
        raise ModelError(f"Layout(patch={shown(patch)}): it must be three numbers, (t, y, x)")
    if patch[0] != 1:
        raise ModelError(f"Layout(patch={shown(patch)}): t must be 1; a model of clips has a LatentMap of its own")
    if not all(isinstance(side, int) and side in SIDES for side in patch):
        raise ModelError(f"Layout(patch={shown(patch)}): y and x must each be one of {', '.join(map(str, SIDES))}")


@cache
def _vector(values: tuple[float, ...], device: torch.device) -> Float32[Tensor, "channel 1 1"]:
    """Kept, because a transfer to the device at each use would wait for it."""
    with torch.inference_mode(False):  # it outlives this call, which may or may not need gradients
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
