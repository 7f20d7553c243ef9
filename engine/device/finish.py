"""The tail of a batch: keeps the velocities that a model gave, and makes its decoder's latents of posterior means."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from rollflow import kernels
from rollflow.device.storage import Storage
from rollflow.models import FlowModel, Geometry
from rollflow.models.layout import Fused, FusedMap


class Finish:
    """Finishes batches of one geometry, in one pass over memory where the model's layout is a `FusedMap`.

    Under another layout that pass gives the means as they lie in states, and `decodable` makes latents of them. Nothing
    waits for the device, and what it reads is held: a CUDA graph keeps the addresses.

    Args:
        model: whose layout and dtype count.
        geometry: of the batches.
    """

    def __init__(self, model: FlowModel, geometry: Geometry):
        self._layout, self._geometry, state = model.layout, geometry, (geometry.token, geometry.channel)
        known = model.layout.fused(geometry, model.device) if isinstance(model.layout, FusedMap) else None
        self._whole = known is not None
        if known is None:
            one = torch.ones(1, device=model.device)
            known = Fused(state, None, one, torch.zeros_like(one), torch.float32)
        self._shape, self._patch, self._tables = known.shape, known.patch, (known.scale, known.offset)
        self._dtype = known.dtype or model.dtype
        self._size = (math.prod(known.shape[1:-1]), known.shape[-1])
        channel = geometry.channel if known.patch is None else known.shape[0] * math.prod(known.patch)
        packed = math.prod(state) // channel, channel
        self._packed = None if packed == state else packed  # states of pipelines are flat, whatever their tokens

    def __call__(
        self,
        u: Float[Tensor, "bucket token channel"],
        storage: Storage,
        slots: Int64[Tensor, " bucket"],
        posterior: Float32[Tensor, "bucket 2"],
    ) -> Float[Tensor, "bucket ..."]:
        """Writes `u` to the slots, and returns latents of `p x + q u`.

        Args:
            u: what the model gave.
            storage: where particles are.
            slots: the rows' particles; a row of -1 is padding, and means nothing.
            posterior: `(p, q)` of each row.
        """
        u = storage.as_kept(u).contiguous()
        if self._patch is None:
            flat = kernels.finish_flat(u, storage.x, storage.u, slots, posterior, *self._tables, self._dtype)
            latents = flat.view(len(u), *self._shape)
            return latents if self._whole else self._layout.decodable(latents, self._geometry)
        x, kept = storage.x, storage.u
        if self._packed is not None:
            u, x, kept = (value.view(len(value), *self._packed) for value in (u, x, kept))
        latents = kernels.finish(u, x, kept, slots, posterior, *self._size, *self._patch, *self._tables, self._dtype)
        return latents.view(len(u), *self._shape)  # of clips, with their frames
