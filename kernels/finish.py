"""Triton kernel of `rollflow.kernels.finish` and `finish_flat`: keep velocities, form and unpack posterior means."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .operators import finish_flat_operator, finish_operator
from .philox import OPTIONS

PIXELS = 64  # contiguous latent pixels of a line that a program writes
ELEMENTS = 2048  # of a program: 16 a thread, whose loads in flight hide latency


@triton.jit
@no_type_check
def finish_kernel(
    u, x_pool, u_pool, slot, coefficients, scale, offset, latents,
    elements, channels, rows, columns,
    PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    # Program = (batch row, token row, tile of token columns, tile of channels). `rows` and `columns` count tokens.
    # A flat row has tokens of one channel. TABLE is what the tables hold a number for.
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

    # A latent channel's elements of a token lie side by side, [token, c, (dy, dx)].
    latents_of_tile: tl.constexpr = CHANNELS // (PATCH_Y * PATCH_X)
    if TABLE == "row":
        number = token_row
        known = number < rows
    elif TABLE == "column":
        number = column[:, None, None]
        known = number < columns
    elif TABLE == "channel":
        number = tl.reshape(channel, [1, latents_of_tile, PATCH_Y * PATCH_X])
        known = number < channels
    else:
        number = (channel_tile * latents_of_tile + tl.arange(0, latents_of_tile))[None, :, None]
        known = number < channels // (PATCH_Y * PATCH_X)
    factor = tl.load(scale + number, mask=known, other=0.0)
    shift = tl.where(live, tl.load(offset + number, mask=known, other=0.0), 0.0)
    value = tl.reshape(p * x + q * velocity, [COLUMNS, latents_of_tile, PATCH_Y * PATCH_X])
    value = (value * factor + shift).to(latents.dtype.element_ty)

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
    inverse_scaling: Float32[Tensor, " number"],
    shift: Float32[Tensor, " number"],
    latents: Float[Tensor, "row latent height width"],
    pixels: int = PIXELS,
) -> None:
    """Fill `latents` and the rows `slot` of `u_pool`."""
    channels, latent = u.shape[2], latents.shape[1]
    rows, columns = latents.shape[2] // patch_y, latents.shape[3] // patch_x
    table = "latent" if len(shift) == latent else "channel"
    tensors = (u, x_pool, u_pool, slot, coefficients, inverse_scaling, shift, latents)
    _launch(tensors, (channels, rows, columns), (patch_y, patch_x), tile(channels, patch_x, pixels), table)


def launch_finish_flat(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float32[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    scale: Float32[Tensor, " number"],
    offset: Float32[Tensor, " number"],
    latents: Float[Tensor, "row element"],
    block: int = ELEMENTS,
) -> None:
    """Fill `latents` and the rows `slot` of `u_pool`; elements that share a number are a row of one-channel tokens."""
    elements, numbers = latents.shape[1], len(scale)
    rows, table = (numbers, "row") if numbers < elements else (1, "column")
    columns = elements // rows
    sizes = {"CHANNELS": 1, "COLUMNS": min(block, triton.next_power_of_2(columns))}
    tensors = (u, x_pool, u_pool, slot, coefficients, scale, offset, latents)
    _launch(tensors, (1, rows, columns), (1, 1), sizes, table)


def _launch(
    tensors: tuple[Tensor, ...], shape: tuple[int, int, int], patch: tuple[int, int], sizes: dict[str, int], table: str
) -> None:
    """Run the kernel on states of `shape`, (channels, rows, columns) of tokens; a grid has room for 2^31 programs."""
    u, x_pool = tensors[:2]
    channels, rows, columns = shape
    grid = len(u) * rows * triton.cdiv(columns, sizes["COLUMNS"]) * triton.cdiv(channels, sizes["CHANNELS"])
    with torch.cuda.device_of(u):
        finish_kernel[(grid,)](
            *tensors, x_pool[0].numel(), *shape, PATCH_Y=patch[0], PATCH_X=patch[1], TABLE=table, **sizes, **OPTIONS
        )


@finish_operator.register_kernel("cuda")
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, height: int, width: int,
    patch_y: int, patch_x: int, inverse_scaling: Tensor, shift: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    latent = u.shape[2] // (patch_y * patch_x)
    latents = torch.empty(len(u), latent, height, width, dtype=dtype, device=u.device)
    launch_finish(u, x_pool, u_pool, slot, coefficients, patch_y, patch_x, inverse_scaling, shift, latents)
    return latents


@finish_flat_operator.register_kernel("cuda")
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, scale: Tensor, offset: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    latents = torch.empty(len(u), u.shape[1] * u.shape[2], dtype=dtype, device=u.device)
    launch_finish_flat(u, x_pool, u_pool, slot, coefficients, scale, offset, latents)
    return latents
