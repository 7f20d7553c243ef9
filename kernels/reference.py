"""The kernels' contract in plain torch (and numpy): what tests compare the Triton kernels with, and what runs on a CPU.

The noise stream. `z = f(seed, key, element)`: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) with the 64-bit `seed` as Philox key (low word, high word) and the counter
`(quad, key low, key high, 0)`. Element `e` of a row is lane `e % 4` of quad `e // 4`. The four words of a quad give
four normals by two Box-Muller pairs, words (0, 1) and words (2, 3): with `v = float32(word_0) 2^-32 + 2^-33` (rounded
to float32, so in (0, 1]) and `w = int32(word_1) 2^-31`, the pair is `sqrt(-2 ln v) (cos(pi w), sin(pi w))`. So
|z| < 6.8, and there is never a logarithm of 0.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt64
from torch import Tensor

WORD, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

UNIT, HALF_UNIT, RADIANS = np.float32(2.0**-32), np.float32(2.0**-33), np.float32(math.pi * 2.0**-31)

Words = UInt64[np.ndarray, "*#words"]
Normals = Float32[np.ndarray, "*#words"]


def philox4x32(counter: tuple[Words, ...], key: tuple[Words, ...]) -> tuple[Words, ...]:
    """Ten rounds of Philox4x32: four counter words and two key words, each 32 bits in a uint64, to four words.

    The arrays broadcast. In numpy, because torch has no unsigned shift, costs three times as much a call, and makes
    batches this small wait for its second thread where the cores are busy.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    shape = np.broadcast_shapes(*(word.shape for word in (*counter, *key)))
    c0, c2 = np.broadcast_to(c0, shape).copy(), np.broadcast_to(c2, shape).copy()
    for _ in range(10):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # c0, c2 = high words ^ c1, c3 ^ key. The low words keep their upper halves, which the next round's mask clears.
        for high, product, word, subkey in ((c0, product_1, c1, k0), (c2, product_0, c3, k1)):
            np.right_shift(product, SHIFT, out=high)
            high ^= word
            high ^= subkey
            high &= WORD
        c1, c3 = product_1, product_0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1 & WORD, c2, c3 & WORD


def box_muller(radius_word: Words, angle_word: Words) -> tuple[Normals, Normals]:
    """Two independent normals from two words."""
    radius = np.log(radius_word.astype(np.float32) * UNIT + HALF_UNIT)
    np.sqrt(np.multiply(radius, np.float32(-2.0), out=radius), out=radius)
    angle = angle_word.astype(np.uint32).view(np.int32).astype(np.float32) * RADIANS
    return radius * np.cos(angle), radius * np.sin(angle)


def noise(
    seed: Int64[Tensor, " row"], key: Int64[Tensor, " row"], token: int, channel: int
) -> Float32[Tensor, "row token channel"]:
    """Standard normal numbers of the stream above."""
    elements = token * channel
    quad = np.arange(-(-elements // 4), dtype=np.uint64)
    seeds, keys = (value.numpy().astype(np.uint64)[:, None] for value in (seed, key))
    counter = (quad, keys & WORD, keys >> SHIFT, np.zeros((1,), np.uint64))
    words = philox4x32(counter, (seeds & WORD, seeds >> SHIFT))
    z = np.empty((len(seeds), len(quad), 4), np.float32)
    for lane in (0, 2):
        z[:, :, lane], z[:, :, lane + 1] = box_muller(words[lane], words[lane + 1])
    rows = z.reshape(len(seeds), 4 * len(quad))[:, :elements]
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(len(seeds), token, channel))


def propose(
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    parent: Int64[Tensor, " row"],
    child: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 4"],
    seed: Int64[Tensor, " row"],
    key: Int64[Tensor, " row"],
    dtype: torch.dtype,
) -> Float[Tensor, "row token channel"]:
    """`x_pool[child] = a x_pool[parent] + b u_pool[parent] + k z`; returns it times `inverse scale`, in `dtype`."""
    a, b, k, inverse_scale = coefficients.unbind(1)
    live = child >= 0
    related = live & (parent >= 0)
    state = x_pool.new_zeros(len(parent), *x_pool.shape[1:])
    # A term with coefficient 0 is absent: its memory is not read (it may be uninitialised), its noise not drawn.
    for coefficient, pool in ((a, x_pool), (b, u_pool)):
        row = (related & (coefficient != 0)).nonzero().squeeze(1)
        state.index_add_(0, row, pool[parent[row]].float().mul_(coefficient[row, None, None]))
    row = (live & (k != 0)).nonzero().squeeze(1)
    if len(row):
        state.index_add_(0, row, noise(seed[row], key[row], *x_pool.shape[1:]).mul_(k[row, None, None]))
    x_pool.index_copy_(0, child[live], state[live])
    return state.mul_(torch.where(live, inverse_scale, 0.0)[:, None, None]).to(dtype)


def finish(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    height: int,
    width: int,
    patch_y: int,
    patch_x: int,
    inverse_scaling: Float32[Tensor, " number"],
    shift: Float32[Tensor, " number"],
    dtype: torch.dtype,
) -> Float[Tensor, "row latent height width"]:
    """`u_pool[slot] = u`; returns `(p x_pool[slot] + q u) inverse_scaling + shift`, unpacked to latents, in `dtype`."""
    latent = u.shape[2] // (patch_y * patch_x)
    x0_hat = _posterior_means(u, x_pool, u_pool, slot, coefficients)
    patches = x0_hat.view(-1, height // patch_y, width // patch_x, latent, patch_y, patch_x)
    unpacked = patches.permute(0, 3, 1, 4, 2, 5).contiguous()
    sides = (1, 1) if len(shift) == latent else (patch_y, patch_x)
    factor, offset = (table.view(latent, 1, sides[0], 1, sides[1]) for table in (inverse_scaling, shift))
    latents = u.new_zeros(len(u), latent, height, width, dtype=dtype)
    latents[slot >= 0] = unpacked.mul_(factor).add_(offset).view(-1, latent, height, width).to(dtype)
    return latents


def finish_flat(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    scale: Float32[Tensor, " number"],
    offset: Float32[Tensor, " number"],
    dtype: torch.dtype,
) -> Float[Tensor, "row element"]:
    """`u_pool[slot] = u`; returns `(p x_pool[slot] + q u) scale + offset`, flat, in `dtype`."""
    elements = u.shape[1] * u.shape[2]
    x0_hat = _posterior_means(u, x_pool, u_pool, slot, coefficients).view(-1, len(scale), elements // len(scale))
    latents = u.new_zeros(len(u), elements, dtype=dtype)
    latents[slot >= 0] = x0_hat.mul_(scale[:, None]).add_(offset[:, None]).view(-1, elements).to(dtype)
    return latents


def _posterior_means(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
) -> Float32[Tensor, "live token channel"]:
    """`p x_pool[slot] + q u` of the rows that have a slot; `u_pool[slot] = u`."""
    live = slot >= 0
    p, q = coefficients[live].unbind(1)
    u_pool.index_copy_(0, slot[live], u[live])
    velocity = u[live].float()
    return x_pool[slot[live]].mul_(p[:, None, None]).add_(velocity * q[:, None, None])
