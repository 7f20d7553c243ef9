"""A batch as the device sees it: two tables, padded to the bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rollflow.device import moves
from rollflow.device.storage import Storage
from rollflow.models.layout import Layout
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
    rows: Sequence[Row], bucket: int, storage: Storage, layout: Layout, to_device: Callable[[Tensor], Tensor]
) -> tuple[Tables, list[Any]]:
    """The batch's tables and conditionings; states that are more than a step are written to the children's slots."""
    parents: list[int] = []
    steps: list[float] = []
    for row in rows:
        state = moves.prepared(row, storage, layout)
        if state is None:
            parents.append(row.parent)
            steps += (row.step.a, row.step.b, row.step.k, 1 / row.step.scale)
        else:  # the child is there already, and its own parent
            storage.x[row.slot].copy_(state)
            parents.append(row.slot)
            steps += (1.0, 0.0, 0.0, 1 / row.step.scale)
    missing = bucket - len(rows)
    filler = [NONE] * missing
    integers = [
        [*parents, *filler],
        [*(row.slot for row in rows), *filler],
        [*(row.brief.seed for row in rows), *filler],
        [*(row.key for row in rows), *filler],
    ]
    floats = steps + [0.0] * 4 * missing
    floats += [value for row in rows for value in (row.step.p, row.step.q)] + [0.0] * 2 * missing
    floats += [row.step.tau for row in rows] + [1.0] * missing
    floats += [row.brief.guidance for row in rows] + [0.0] * missing
    conditioning = [row.brief.conditioning for row in rows]
    conditioning += conditioning[:1] * missing
    return Tables(to_device(torch.tensor(integers)), to_device(torch.tensor(floats))), conditioning
