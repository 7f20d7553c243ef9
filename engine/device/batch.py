"""A batch as the device sees it: two tables, padded to the bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rollflow.device import moves
from rollflow.device.storage import Storage
from rollflow.models.layout import LatentMap
from rollflow.row import NONE, Row


class Tables(NamedTuple):
    """What a batch tells the device of its rows, padded to the bucket, in two transfers.

    `integers` are parent and child slots, seeds and noise keys; `floats` the coefficients of propose (4 a row) and of
    the posterior mean (2), then linear times and guidance scales.
    """

    integers: Tensor
    floats: Tensor

    @property
    def rows(self) -> int:
        return self.integers.shape[1]

    @property
    def coefficients(self) -> Tensor:
        return self.floats[: 4 * self.rows].view(self.rows, 4)

    @property
    def posterior(self) -> Tensor:
        return self.floats[4 * self.rows : 6 * self.rows].view(self.rows, 2)

    @property
    def tau(self) -> Tensor:
        return self.floats[6 * self.rows : 7 * self.rows]

    @property
    def guidance(self) -> Tensor:
        return self.floats[7 * self.rows :]


def padding(bucket: int, device: torch.device) -> Tables:
    """Tables of padding alone."""
    tables = Tables(torch.full((4, bucket), NONE, device=device), torch.zeros(8 * bucket, device=device))
    tables.tau.fill_(1.0)
    return tables


def tables(
    rows: Sequence[Row], bucket: int, storage: Storage, layout: LatentMap, to_device: Callable[[Tensor], Tensor]
) -> tuple[Tables, list[Any]]:
    """The batch's tables and conditionings; states that are more than a step are written to the children's slots."""
    integers = np.full((4, bucket), NONE, dtype=np.int64)
    floats = np.zeros((bucket, 8), dtype=np.float32)
    floats[len(rows) :, 6] = 1.0  # the linear time of padding
    numbers: list[tuple[int, int, int, int]] = []
    steps: list[tuple[float, ...]] = []
    for row in rows:
        step, brief, parent, slot = row.step, row.brief, row.parent, row.slot
        way: tuple[float, ...] = (step.a, step.b, step.k)
        if (state := moves.prepared(row, storage, layout)) is not None:  # the child is there already, its own parent
            storage.x[slot].copy_(state)
            if row.cached:  # what was kept of the parent is looked for where the parent is
                storage.kept[slot].copy_(storage.kept[parent])
            parent, way = slot, (1.0, 0.0, 0.0)
        numbers.append((parent, slot, brief.seed, row.key))
        steps.append((*way, 1 / step.scale, step.p, step.q, step.tau, brief.guidance))
    integers[:, : len(rows)] = np.array(numbers, dtype=np.int64).T
    floats[: len(rows)] = steps
    parts = [floats[:, :4].ravel(), floats[:, 4:6].ravel(), floats[:, 6], floats[:, 7]]
    conditioning = [row.brief.conditioning for row in rows]
    conditioning += conditioning[:1] * (bucket - len(rows))
    return (
        Tables(to_device(torch.from_numpy(integers)), to_device(torch.from_numpy(np.concatenate(parts)))),
        conditioning,
    )
