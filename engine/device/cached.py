"""The forward of a batch of requests with a cache: it keeps what later evaluations take, or takes what was kept.

Rows of one batch are either all evaluated in full or all from the cache, as `rollflow.schedule.scheduler` packs them:
each kind is one function of tensors alone, which a CUDA graph can hold.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from rollflow.device.batch import Tables
from rollflow.device.storage import Storage
from rollflow.models import Geometry


def forward(
    model: Any,
    storage: Storage,
    tables: Tables,
    x: Float[Tensor, "bucket token channel"],
    collated: tuple[Tensor, ...],
    geometry: Geometry,
    cached: bool,
) -> Float[Tensor, "bucket token channel"]:
    """The velocities of a batch; see `rollflow.models.Capabilities.caches`.

    Args:
        model: one that caches.
        storage: what was kept of parents, and where that of children goes.
        tables: the batch.
        x: what `propose` gave.
        collated: the conditionings.
        geometry: of the batch.
        cached: whether the rows take what was kept of their parents; otherwise what is kept of them is written.
    """
    parent, child = tables.integers[:2]
    given = x, tables.tau, collated, tables.guidance, geometry
    if cached:
        return model.forward_cached(*given, storage.kept[parent])
    u, kept = model.forward_kept(*given)
    storage.kept[child] = kept  # the last entry is that of padding
    return u
