"""Triton kernel of `rollflow.kernels.finish`: keep velocities, form and unpack posterior means.

A thread has a unit: tokens side by side, and of each some channels, which are pixels of one or more lines. It reads
each token's channels, turns the unit in its registers and writes each line's pixels, 16 bytes at a time where the sizes
allow. No element changes threads, so there is no shared memory and no barrier.
"""

import math
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .launch import TABLES, launch
from .operators import finish_operator

UNITS = 128  # of a program, one a thread
WIDEST = 16  # bytes of a load or store
PLAIN = ("rows", "column_groups", "channel_groups")  # counts, whose factors are constants: one variant serves all


@triton.jit
@no_type_check
def _load(at, step, mask, COUNT: tl.constexpr):
    """`COUNT` tensors, `step` elements apart, joined to [..., 2, 2]: a tensor's number is the last axes' bits."""
    if COUNT == 1:
        value = tl.load(at, mask=mask, other=0.0)
    else:
        even = _load(at, 2 * step, mask, COUNT // 2)
        value = tl.join(even, _load(at + step, 2 * step, mask, COUNT // 2))
    return value


@triton.jit
@no_type_check
def _store(at, step, mask, value, COUNT: tl.constexpr):
    """The inverse of `_load`."""
    if COUNT == 1:
        tl.store(at, value, mask=mask)
    else:
        even, odd = tl.split(value)
        _store(at, 2 * step, mask, even, COUNT // 2)
        _store(at + step, 2 * step, mask, odd, COUNT // 2)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=TABLES)
@no_type_check
def finish_kernel(
    u, x_pool, u_pool, slot, coefficients, scale, offset, latents, rows, column_groups, channel_groups,
    PATCH_Y: tl.constexpr, PATCH_X: tl.constexpr, TABLE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, TILE_CHANNELS: tl.constexpr, CHANNEL_TILES: tl.constexpr,
):  # fmt: skip
    """A program finishes a tile of one row, see `rollflow.kernels.finish` for the equation and `Tile` for the sizes.

    `rows` counts lines of tokens, the groups the units of a line and of a token. TABLE is what `scale` and `offset`
    hold a number for: "latent" channels or the "channel"s of a token.
    """
    row = tl.program_id(2).to(tl.int64)
    channel_tile = tl.program_id(1) % CHANNEL_TILES
    column_tile = tl.program_id(1) // CHANNEL_TILES
    # A warp's threads read at least 64 bytes side by side of a token, and write as much of a line.
    UNITS: tl.constexpr = TILE_ROWS * TILE_COLUMNS * TILE_CHANNELS
    ALONG: tl.constexpr = min(TILE_CHANNELS, 8 if TOKENS > 1 else 4)
    unit = tl.arange(0, UNITS)
    along = unit // (ALONG * TILE_COLUMNS) % (TILE_CHANNELS // ALONG) * ALONG + unit % ALONG
    channel_group = channel_tile * TILE_CHANNELS + along
    column_group = column_tile * TILE_COLUMNS + unit // ALONG % TILE_COLUMNS
    token_row = tl.program_id(0) * TILE_ROWS + unit // (TILE_COLUMNS * TILE_CHANNELS)
    inside = (token_row < rows) & (column_group < column_groups) & (channel_group < channel_groups)

    source = tl.load(slot + row)
    live = source >= 0
    # What a padding row has for coefficients is read and dropped: a load that waits for no other is worth more.
    p = tl.where(live, tl.load(coefficients + 2 * row), 0.0)
    q = tl.where(live, tl.load(coefficients + 2 * row + 1), 0.0)
    channel = (CHANNELS * channel_group)[:, None] + tl.arange(0, CHANNELS)[None, :]
    if TABLE == "channel":
        number = channel
        known = (channel_group < channel_groups)[:, None]
    elif PATCH_Y * PATCH_X % CHANNELS == 0:  # all of a unit's channels are of one latent channel
        number = (CHANNELS * channel_group // (PATCH_Y * PATCH_X))[:, None]
        known = (channel_group < channel_groups)[:, None]
    else:
        number = channel // (PATCH_Y * PATCH_X)
        known = (channel_group < channel_groups)[:, None]
    factor = tl.load(scale + number, mask=known, other=0.0)
    shift = tl.where(live, tl.load(offset + number, mask=known, other=0.0), 0.0)

    channels = CHANNELS * channel_groups
    columns = TOKENS * column_groups
    packed = ((token_row * columns + TOKENS * column_group) * channels)[:, None] + channel
    elements = rows * columns * channels
    mask = (inside & (token_row < tl.where(live, rows, 0)))[:, None]
    velocity = _load(u + row * elements + packed, channels, mask, TOKENS)
    x = _load(x_pool + source * elements + packed, channels, mask, TOKENS)
    _store(u_pool + source * elements + packed, channels, mask, velocity, TOKENS)
    for _ in tl.static_range(tl.constexpr(TOKENS.bit_length() - 1)):
        factor = tl.expand_dims(factor, -1)
        shift = tl.expand_dims(shift, -1)
    value = ((p * x + q * velocity.to(tl.float32)) * factor + shift).to(latents.dtype.element_ty)

    # [unit, (line, dx), token] -> [unit, (token, dx), line]
    RUN: tl.constexpr = min(PATCH_X, CHANNELS)  # pixels of a token side by side
    LINES: tl.constexpr = CHANNELS // RUN
    value = tl.permute(tl.reshape(value, [UNITS, LINES, RUN, TOKENS]), [0, 3, 2, 1])
    if LINES == 4:
        value = tl.reshape(value, [UNITS, TOKENS * RUN, 2, 2])
    elif LINES == 2:
        value = tl.reshape(value, [UNITS, TOKENS * RUN, 2])
    else:
        value = tl.reshape(value, [UNITS, TOKENS * RUN])
    line = CHANNELS * channel_group // PATCH_X
    above = (line // PATCH_Y) * (PATCH_Y * rows) + PATCH_Y * token_row + line % PATCH_Y
    width = PATCH_X * columns
    first = PATCH_X * TOKENS * column_group
    if CHANNELS < PATCH_X:  # a part of a patch's line
        first += CHANNELS * channel_group % PATCH_X
    pixel = first[:, None] + tl.arange(0, TOKENS * RUN)[None, :]
    step = width * (rows if PATCH_Y == 1 else 1)  # from line to line of a unit: to the next latent channel, or down
    _store(latents + row * elements + (above * width)[:, None] + pixel, step, inside[:, None], value, LINES)


class Tile(NamedTuple):
    """The constants of the kernel that follow from the sizes.

    Attributes:
        TOKENS: of a unit, a divisor of a line's tokens.
        CHANNELS: of a unit, a divisor of a token's channels.
        TILE_ROWS, TILE_COLUMNS, TILE_CHANNELS: units of a program, powers of two.
        CHANNEL_TILES: programs that share a token.
    """

    TOKENS: int
    CHANNELS: int
    TILE_ROWS: int
    TILE_COLUMNS: int
    TILE_CHANNELS: int
    CHANNEL_TILES: int

    @property
    def warps(self) -> int:
        """Of a program: as many as its units fill."""
        return max(1, self.TILE_ROWS * self.TILE_COLUMNS * self.TILE_CHANNELS // 32)


def tile_of(
    channels: int, rows: int, columns: int, patch_y: int, patch_x: int, itemsize: int, units: int = UNITS
) -> Tile:
    """The tile for tokens of so many channels, in so many rows and columns, and latents of a size in bytes.

    The same for every number of batch rows: what one batch has compiled serves all.
    """
    tokens = math.gcd(columns, max(1, WIDEST // itemsize // patch_x))
    # Four float32 make a widest load. Of patches of 2x1 the third line would lie at another distance than the second.
    wanted = math.gcd(channels, 2 if (patch_y, patch_x) == (2, 1) else 4)
    unit_channels = max(min(patch_x, WIDEST // itemsize), wanted)
    column_groups, channel_groups = columns // tokens, channels // unit_channels
    tile_channels = min(16, units, triton.next_power_of_2(channel_groups))
    tile_columns = min(units // tile_channels, triton.next_power_of_2(column_groups))
    tile_rows = min(units // tile_channels // tile_columns, triton.next_power_of_2(rows))
    tiles = triton.cdiv(channel_groups, tile_channels)
    return Tile(tokens, unit_channels, tile_rows, tile_columns, tile_channels, tiles)


def launch_finish(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    patch_y: int,
    patch_x: int,
    inverse_scaling: Float32[Tensor, " number"],
    shift: Float32[Tensor, " number"],
    latents: Float[Tensor, "row latent height width"],
    units: int = UNITS,
) -> None:
    """Fill `latents` and the rows `slot` of `u_pool`, by programs of at most `units` threads."""
    channels, latent = u.shape[2], latents.shape[1]
    rows, columns = latents.shape[2] // patch_y, latents.shape[3] // patch_x
    tile = tile_of(channels, rows, columns, patch_y, patch_x, latents.dtype.itemsize, units)
    column_groups, channel_groups = columns // tile.TOKENS, channels // tile.CHANNELS
    across = triton.cdiv(column_groups, tile.TILE_COLUMNS) * tile.CHANNEL_TILES
    arguments: dict[str, Tensor | int] = {
        "u": u, "x_pool": x_pool, "u_pool": u_pool, "slot": slot, "coefficients": coefficients,
        "scale": inverse_scaling, "offset": shift, "latents": latents,
        "rows": rows, "column_groups": column_groups, "channel_groups": channel_groups,
    }  # fmt: skip
    table = "latent" if len(shift) == latent else "channel"
    constants = {"PATCH_Y": patch_y, "PATCH_X": patch_x, "TABLE": table, **tile._asdict()}
    grid = (triton.cdiv(rows, tile.TILE_ROWS), across, len(u))
    launch(finish_kernel, grid, arguments, constants, tile.warps, PLAIN)


@finish_operator.register_kernel("cuda")
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, height: int, width: int,
    patch_y: int, patch_x: int, inverse_scaling: Tensor, shift: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    latent = u.shape[2] // (patch_y * patch_x)
    latents = torch.empty(len(u), latent, height, width, dtype=dtype, device=u.device)
    launch_finish(u, x_pool, u_pool, slot, coefficients, patch_y, patch_x, inverse_scaling, shift, latents)
    return latents
