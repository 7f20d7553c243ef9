"""Triton kernel of `rollflow.kernels.noise`."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64
from torch import Tensor

from .operators import noise_operator
from .philox import OPTIONS, normal_block

BLOCK = 2048


@triton.jit
@no_type_check
def noise_kernel(seed, key, out, elements, blocks, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    offset = block * BLOCK + tl.arange(0, BLOCK)
    z = normal_block(tl.load(seed + row), tl.load(key + row), block, BLOCK)
    tl.store(out + row * elements + offset, z, mask=offset < elements)


def launch_noise(
    seed: Int64[Tensor, " row"],
    key: Int64[Tensor, " row"],
    out: Float32[Tensor, "row token channel"],
    block: int = BLOCK,
) -> None:
    """Fill `out`. The one-dimensional grid has room for 2^31 programs."""
    elements = out[0].numel()
    blocks = triton.cdiv(elements, block)
    with torch.cuda.device_of(out):
        noise_kernel[(len(out) * blocks,)](seed, key, out, elements, blocks, BLOCK=block, **OPTIONS)


@noise_operator.register_kernel("cuda")
def _(seed: Tensor, key: Tensor, token: int, channel: int) -> Tensor:
    out = torch.empty(len(seed), token, channel, dtype=torch.float32, device=seed.device)
    launch_noise(seed, key, out)
    return out
