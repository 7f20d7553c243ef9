"""Triton kernel of `rollflow.kernels.finish`: keep the velocity, form the posterior mean, unpack its 2x2 patches."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .operators import finish_operator
from .philox import OPTIONS

COLUMNS = 32  # tokens of one token row that a program turns into 64 contiguous latent pixels


@triton.jit
@no_type_check
def finish_kernel(
    u, x_pool, u_pool, slot, coefficients, latents,
    elements, channels, rows, columns, inverse_scaling, shift,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Program = (batch row, token row, tile of token columns, tile of channels). `rows` and `columns` count tokens.
    program = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    channel_tile = program % channel_tiles
    column_tile = (program // channel_tiles) % column_tiles
    token_row = (program // (channel_tiles * column_tiles)) % rows
    row = (program // (channel_tiles * column_tiles * rows)).to(tl.int64)

    source = tl.load(slot + row)
    live = source >= 0
    p = tl.load(coefficients + 2 * row, mask=live, other=0.0)
    q = tl.load(coefficients + 2 * row + 1, mask=live, other=0.0)
    # Scalars may arrive as float64 under a compiler: cast, so that no arithmetic below is promoted.
    factor = tl.full((), inverse_scaling, tl.float32)
    offset = tl.where(live, tl.full((), shift, tl.float32), 0.0)

    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    channel = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    packed = (token_row * columns + column)[:, None] * channels + channel[None, :]
    inside = (column < tl.where(live, columns, 0))[:, None] & (channel < channels)[None, :]
    velocity = tl.load(u + row * elements + packed, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_pool + source * elements + packed, mask=inside, other=0.0)
    tl.store(u_pool + source * elements + packed, velocity, mask=inside)
    value = ((p * x + q * velocity) * factor + offset).to(latents.dtype.element_ty)

    # [token, (c, dy), dx] -> [(c, dy), (token, dx)]: contiguous pixels of one line of one latent channel.
    value = tl.reshape(value, [COLUMNS, CHANNELS // 2, 2])
    value = tl.reshape(tl.permute(value, [1, 0, 2]), [CHANNELS // 2, 2 * COLUMNS])
    line = channel_tile * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2)
    pixel = column_tile * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
    width = 2 * columns
    unpacked = ((line // 2) * (2 * rows) + 2 * token_row + line % 2)[:, None] * width + pixel[None, :]
    inside = (line < channels // 2)[:, None] & (pixel < width)[None, :]
    tl.store(latents + row * elements + unpacked, value, mask=inside)


def launch_finish(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float32[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    scaling: float,
    shift: float,
    latents: Float[Tensor, "row latent height width"],
    columns_per_program: int = COLUMNS,
) -> None:
    """Fill `latents` and the rows `slot` of `u_pool`. The one-dimensional grid has room for 2^31 programs."""
    channels = u.shape[2]
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    channel_block = min(64, triton.next_power_of_2(channels))
    grid = len(u) * rows * triton.cdiv(columns, columns_per_program) * triton.cdiv(channels, channel_block)
    with torch.cuda.device_of(u):
        finish_kernel[(grid,)](
            u, x_pool, u_pool, slot, coefficients, latents,
            x_pool[0].numel(), channels, rows, columns, 1.0 / scaling, shift,
            CHANNELS=channel_block, COLUMNS=columns_per_program, **OPTIONS,
        )  # fmt: skip


@finish_operator.register_kernel("cuda")
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, height: int, width: int,
    scaling: float, shift: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    latents = torch.empty(len(u), u.shape[2] // 4, height, width, dtype=dtype, device=u.device)
    launch_finish(u, x_pool, u_pool, slot, coefficients, scaling, shift, latents)
    return latents
