"""Triton kernel of `rollflow.kernels.propose`: gather, affine step, noise, scatter and cast in one pass over memory."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .operators import propose_operator
from .philox import OPTIONS, normal_block

BLOCK = 2048  # 16 elements a thread: fewer share the cost of the indices, and the loads in flight hide latency


@triton.jit
@no_type_check
def propose_kernel(
    x_pool, u_pool, parent, child, coefficients, seed, key, model_input, elements, blocks, BLOCK: tl.constexpr
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    offset = block * BLOCK + tl.arange(0, BLOCK)

    source = tl.load(parent + row)
    target = tl.load(child + row)
    live = target >= 0
    a = tl.load(coefficients + 4 * row, mask=live & (source >= 0), other=0.0)
    b = tl.load(coefficients + 4 * row + 1, mask=live & (source >= 0), other=0.0)
    k = tl.load(coefficients + 4 * row + 2, mask=live, other=0.0)
    inverse_scale = tl.load(coefficients + 4 * row + 3, mask=live, other=0.0)

    # A term with coefficient 0 is absent: its memory is not read (it may be uninitialised), its noise not drawn.
    # An absent row or term is one that ends at element 0; the interpreter cannot broadcast a scalar truth value.
    x = tl.load(x_pool + source * elements + offset, mask=offset < tl.where(a != 0.0, elements, 0), other=0.0)
    u = tl.load(u_pool + source * elements + offset, mask=offset < tl.where(b != 0.0, elements, 0), other=0.0)
    state = a * x + b * u
    if k != 0.0:
        state += k * normal_block(tl.load(seed + row), tl.load(key + row), block, BLOCK)

    tl.store(x_pool + target * elements + offset, state, mask=offset < tl.where(live, elements, 0))
    scaled = (state * inverse_scale).to(model_input.dtype.element_ty)
    tl.store(model_input + row * elements + offset, scaled, mask=offset < elements)


def launch_propose(
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float32[Tensor, "slot token channel"],
    parent: Int64[Tensor, " row"],
    child: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 4"],
    seed: Int64[Tensor, " row"],
    key: Int64[Tensor, " row"],
    model_input: Float[Tensor, "row token channel"],
    block: int = BLOCK,
) -> None:
    """Write the children into `x_pool` and `model_input`. The one-dimensional grid has room for 2^31 programs."""
    elements = x_pool[0].numel()
    blocks = triton.cdiv(elements, block)
    with torch.cuda.device_of(x_pool):
        propose_kernel[(len(parent) * blocks,)](
            x_pool, u_pool, parent, child, coefficients, seed, key, model_input, elements, blocks,
            BLOCK=block, **OPTIONS,
        )  # fmt: skip


@propose_operator.register_kernel("cuda")
def _(
    x_pool: Tensor, u_pool: Tensor, parent: Tensor, child: Tensor, coefficients: Tensor, seed: Tensor, key: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    model_input = torch.empty(len(parent), *x_pool.shape[1:], dtype=dtype, device=x_pool.device)
    launch_propose(x_pool, u_pool, parent, child, coefficients, seed, key, model_input)
    return model_input
