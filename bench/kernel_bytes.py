"""The sizes that kernels are measured at, and the bytes that a call must move, whatever a cache saves or adds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

STEP = (0.9, -0.1, 0.3, 1.1)  # (a, b, k, inverse scale) of a stochastic step: every term is there
PATCH = (1, 2, 2)  # of FLUX's tokens


class Size(NamedTuple):
    """Rows of a batch, tokens of a row (a square number) and channels of a token (a multiple of 4)."""

    rows: int
    token: int
    channel: int


SIZES = tuple(  # the built-in model, FLUX at 512 x 512 and at 1024 x 1024 pixels
    Size(rows, token, channel)
    for token, channel, batches in ((16, 32, (16, 64, 256)), (1024, 64, (4, 16, 64)), (4096, 64, (1, 8, 32, 64)))
    for rows in batches
)
QUICK = tuple(next(size for size in SIZES if size.token == token) for token in (16, 1024, 4096))


def propose_bytes(
    parent: Int64[Tensor, " row"],
    child: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 4"],
    elements: int,
    dtype: torch.dtype,
) -> int:
    """Bytes that `rollflow.kernels.propose` must move for rows of `elements` elements, u and input of `dtype`.

    It reads the parent's x where a is not 0 and its u where b is not 0, writes the child's x unless the row is padding,
    and writes every row of the model's input. The row's indices and coefficients, 48 bytes, are not counted.
    """
    related = (child >= 0) & (parent >= 0)
    x, u = (int((related & (coefficients[:, term] != 0)).sum()) for term in (0, 1))
    written = int((child >= 0).sum())
    return elements * (4 * (x + written) + dtype.itemsize * (u + len(parent)))


def finish_bytes(slot: Int64[Tensor, " row"], elements: int, dtype: torch.dtype) -> int:
    """Bytes that `rollflow.kernels.finish` must move for rows of `elements` elements, all but x of `dtype`.

    It reads u and x and writes the pool's u unless the row is padding, and writes every row of the latents. The row's
    slot and coefficients, 16 bytes, are not counted, nor are scaling and shift, which all rows share.
    """
    live = int((slot >= 0).sum())
    return elements * (live * (2 * dtype.itemsize + 4) + len(slot) * dtype.itemsize)


def noise_bytes(rows: int, elements: int) -> int:
    """Bytes that `rollflow.kernels.noise` must write for rows of `elements` elements; it reads none that count."""
    return 4 * rows * elements
