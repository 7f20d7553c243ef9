"""Philox4x32-10 and Box-Muller as Triton device functions, shared by every kernel that draws noise.

The stream itself is specified in `rollflow.kernels.reference`, which computes the same one in torch.

`no_type_check` on a Triton function keeps import hooks that check annotations (jaxtyping's) from wrapping it: Triton
reads a function's source and globals, which a wrapper hides.
"""

import math
from typing import no_type_check

import triton
import triton.language as tl

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)
UNIT = tl.constexpr(2.0**-32)
HALF_UNIT = tl.constexpr(2.0**-33)
RADIANS = tl.constexpr(math.pi * 2.0**-31)
EIGHTH_TURN = tl.constexpr(1 << 29)


@triton.jit
@no_type_check
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox4x32 (Salmon et al. 2011) over uint32 counters `c` and keys `k`, which broadcast."""
    for _ in tl.static_range(10):
        # Products of 64 bits: one multiplication (IMAD.WIDE) gives both words, where `umulhi` beside `mul` takes two.
        product_0 = tl.mul(c0.to(tl.uint64), tl.full(c0.shape, MULTIPLIER_0, tl.uint64), sanitize_overflow=False)
        product_1 = tl.mul(c2.to(tl.uint64), tl.full(c2.shape, MULTIPLIER_1, tl.uint64), sanitize_overflow=False)
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product_1.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
        k0 = tl.add(k0, tl.full(k0.shape, WEYL_0, tl.uint32), sanitize_overflow=False)
        k1 = tl.add(k1, tl.full(k1.shape, WEYL_1, tl.uint32), sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
@no_type_check
def box_muller(radius_bits, angle_bits):
    """Two independent normals from two uint32: the radius from a uniform in (0, 1], the angle from int32 half-turns.

    Sine and cosine reduce the angle exactly, in integers, and then need one short polynomial each (Cephes' sinf and
    cosf) where the library's would carry a slow path for large arguments.
    """
    uniform = radius_bits.to(tl.float32) * UNIT + HALF_UNIT
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    quadrant = tl.add(angle_bits, tl.full(angle_bits.shape, EIGHTH_TURN, tl.uint32), sanitize_overflow=False) >> 30
    remainder = tl.sub(angle_bits, quadrant << 30, sanitize_overflow=False).to(tl.int32, bitcast=True)
    y = remainder.to(tl.float32) * RADIANS  # in [-pi/4, pi/4]
    y2 = y * y
    sine = y + y * y2 * (-1.6666654611e-1 + y2 * (8.3321608736e-3 - y2 * 1.9515295891e-4))
    cosine = 1.0 - 0.5 * y2 + y2 * y2 * (4.1666645683e-2 + y2 * (-1.3887316255e-3 + y2 * 2.4433157118e-5))
    odd = (quadrant & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
@no_type_check
def normal_block(seed, key, block, BLOCK: tl.constexpr):
    """Standard normals for the elements `block * BLOCK + [0, BLOCK)` of a row; `seed` and `key` are int64 scalars."""
    quad = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    r0, r1, r2, r3 = philox4x32(
        quad,
        (key & 0xFFFFFFFF).to(tl.uint32),
        ((key >> 32) & 0xFFFFFFFF).to(tl.uint32),
        tl.full((), 0, tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])  # lanes side by side: quad by quad
