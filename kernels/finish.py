"""Triton kernel of `rollflow.kernels.finish`: keep the velocity, form the posterior mean, unpack its patches."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .operators import finish_operator
from .philox import OPTIONS

PIXELS = 64  # contiguous latent pixels of a line that a program writes
ELEMENTS = 2048  # of a program: 16 a thread, whose loads in flight hide latency


@triton.jit
@no_type_check
def finish_kernel(
    u, x_pool, u_pool, slot, coefficients, inverse_scaling, shift, latents,
    elements, channels, rows, columns,
    PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
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

    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    channel = channel_tile * CHANNELS + tl.arange(0, CHANNELS)
    packed = (token_row * columns + column)[:, None] * channels + channel[None, :]
    inside = (column < tl.where(live, columns, 0))[:, None] & (channel < channels)[None, :]
    velocity = tl.load(u + row * elements + packed, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_pool + source * elements + packed, mask=inside, other=0.0)
    tl.store(u_pool + source * elements + packed, velocity, mask=inside)

    # A latent channel's elements of a token lie side by side, [token, c, (dy, dx)], and share a factor and an offset.
    latents_of_tile: tl.constexpr = CHANNELS // (PATCH_Y * PATCH_X)
    latent = channel_tile * latents_of_tile + tl.arange(0, latents_of_tile)
    known = latent < channels // (PATCH_Y * PATCH_X)
    factor = tl.load(inverse_scaling + latent, mask=known, other=0.0)
    offset = tl.where(live, tl.load(shift + latent, mask=known, other=0.0), 0.0)
    value = tl.reshape(p * x + q * velocity, [COLUMNS, latents_of_tile, PATCH_Y * PATCH_X])
    value = (value * factor[None, :, None] + offset[None, :, None]).to(latents.dtype.element_ty)

    # [token, (c, dy), dx] -> [(c, dy), (token, dx)]: contiguous pixels of one line of one latent channel.
    value = tl.reshape(value, [COLUMNS, CHANNELS // PATCH_X, PATCH_X])
    value = tl.reshape(tl.permute(value, [1, 0, 2]), [CHANNELS // PATCH_X, PATCH_X * COLUMNS])
    line = channel_tile * (CHANNELS // PATCH_X) + tl.arange(0, CHANNELS // PATCH_X)
    pixel = column_tile * (PATCH_X * COLUMNS) + tl.arange(0, PATCH_X * COLUMNS)
    width = PATCH_X * columns
    above = (line // PATCH_Y) * (PATCH_Y * rows) + PATCH_Y * token_row + line % PATCH_Y
    unpacked = above[:, None] * width + pixel[None, :]
    inside = (line < channels // PATCH_X)[:, None] & (pixel < width)[None, :]
    tl.store(latents + row * elements + unpacked, value, mask=inside)


def tile(channels: int, patch_x: int, pixels: int = PIXELS) -> dict[str, int]:
    """The constants of a program's tile: token columns that make `pixels` pixels, and channels that fill it."""
    columns = pixels // patch_x
    return {"CHANNELS": min(ELEMENTS // columns, triton.next_power_of_2(channels)), "COLUMNS": columns}


def launch_finish(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float32[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    patch_y: int,
    patch_x: int,
    inverse_scaling: Float32[Tensor, " latent"],
    shift: Float32[Tensor, " latent"],
    latents: Float[Tensor, "row latent height width"],
    pixels: int = PIXELS,
) -> None:
    """Fill `latents` and the rows `slot` of `u_pool`. The one-dimensional grid has room for 2^31 programs."""
    channels = u.shape[2]
    rows, columns = latents.shape[2] // patch_y, latents.shape[3] // patch_x
    sizes = tile(channels, patch_x, pixels)
    grid = len(u) * rows * triton.cdiv(columns, sizes["COLUMNS"]) * triton.cdiv(channels, sizes["CHANNELS"])
    with torch.cuda.device_of(u):
        finish_kernel[(grid,)](
            u, x_pool, u_pool, slot, coefficients, inverse_scaling, shift, latents,
            x_pool[0].numel(), channels, rows, columns,
            PATCH_Y=patch_y, PATCH_X=patch_x, **sizes, **OPTIONS,
        )  # fmt: skip


@finish_operator.register_kernel("cuda")
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, height: int, width: int,
    patch_y: int, patch_x: int, inverse_scaling: Tensor, shift: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    latents = torch.empty(len(u), len(shift), height, width, dtype=dtype, device=u.device)
    launch_finish(u, x_pool, u_pool, slot, coefficients, patch_y, patch_x, inverse_scaling, shift, latents)
    return latents
