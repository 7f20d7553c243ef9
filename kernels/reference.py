"""The kernels' contract in plain torch: what tests compare the Triton kernels with, and what runs on a CPU.

The noise stream. `z = f(seed, key, element)`: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as
easy as 1, 2, 3", SC 2011) with the 64-bit `seed` as Philox key (low word, high word) and the counter
`(quad, key low, key high, 0)`. Element `e` of a row is lane `e % 4` of quad `e // 4`. The four words of a quad give four
normals by two Box-Muller pairs, words (0, 1) and words (2, 3): with `v = (word_0 + 1/2) / 2^32` in (0, 1] and
`w = int32(word_1) / 2^31`, the pair is `sqrt(-2 ln v) (cos(pi w), sin(pi w))`; so |z| < 6.8 and never a logarithm of 0.
"""

import math

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 tensors, which broadcast.

    An int64 product wraps modulo 2^64, so its low word is right as it stands and its high word after a shift and a mask.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # The low words keep their upper halves: the mask after the next exclusive-or clears them.
        c0, c1 = _mixed(product_1, c1, k0), product_1
        c2, c3 = _mixed(product_0, c3, k1), product_0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1 & WORD, c2, c3 & WORD


def _mixed(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """`high(product) ^ word ^ key`, in place as soon as the operands have grown to their common shape."""
    high = product >> 32
    high = high.bitwise_xor_(word) if high.shape == torch.broadcast_shapes(high.shape, word.shape) else high ^ word
    high = high.bitwise_xor_(key) if high.shape == torch.broadcast_shapes(high.shape, key.shape) else high ^ key
    return high.bitwise_and_(WORD)


def noise(
    seed: Int64[Tensor, " row"], key: Int64[Tensor, " row"], token: int, channel: int
) -> Float32[Tensor, "row token channel"]:
    """Standard normal numbers of the stream above."""
    elements = token * channel
    quads = -(-elements // 4)
    quad = torch.arange(quads, device=seed.device)
    seed, key = seed[:, None], key[:, None]
    zero = quad.new_zeros(())
    words = philox4x32((quad, key & WORD, (key >> 32) & WORD, zero), (seed & WORD, (seed >> 32) & WORD))
    z = torch.empty(len(seed), quads, 4, dtype=torch.float32, device=seed.device)
    for lane in (0, 2):
        radius = words[lane].to(torch.float32).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
        angle = words[lane + 1].to(torch.int32).to(torch.float32).mul_(math.pi * 2.0**-31)
        torch.mul(radius, angle.cos(), out=z[:, :, lane])
        torch.mul(radius, angle.sin_(), out=z[:, :, lane + 1])
    return z.view(len(seed), -1)[:, :elements].contiguous().view(-1, token, channel)


def propose(
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float32[Tensor, "slot token channel"],
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
        state.index_add_(0, row, pool[parent[row]].mul_(coefficient[row, None, None]))
    row = (live & (k != 0)).nonzero().squeeze(1)
    if len(row):
        state.index_add_(0, row, noise(seed[row], key[row], *x_pool.shape[1:]).mul_(k[row, None, None]))
    x_pool.index_copy_(0, child[live], state[live])
    return state.mul_(torch.where(live, inverse_scale, 0.0)[:, None, None]).to(dtype)


def finish(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float32[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    height: int,
    width: int,
    scaling: float,
    shift: float,
    dtype: torch.dtype,
) -> Float[Tensor, "row latent height width"]:
    """`u_pool[slot] = u`; returns `(p x_pool[slot] + q u) / scaling + shift`, its 2x2 patches unpacked, in `dtype`."""
    live = slot >= 0
    p, q = coefficients[live].unbind(1)
    velocity = u[live].to(torch.float32)
    u_pool.index_copy_(0, slot[live], velocity)
    x0_hat = x_pool[slot[live]].mul_(p[:, None, None]).add_(velocity * q[:, None, None])
    x0_hat = x0_hat.mul_(1.0 / scaling).add_(shift)
    patches = x0_hat.view(-1, height // 2, width // 2, u.shape[2] // 4, 2, 2)
    latents = u.new_zeros(len(u), u.shape[2] // 4, height, width, dtype=dtype)
    latents[live] = patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, *latents.shape[1:]).to(dtype)
    return latents
