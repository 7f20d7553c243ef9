"""Triton kernel of `rollflow.kernels.propose`: gather, affine step, noise, scatter and cast in one pass over memory."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .launch import TABLES, block_of, launch, warps_of
from .operators import propose_operator
from .philox import normal_block


@triton.jit(do_not_specialize_on_alignment=TABLES)
@no_type_check
def propose_kernel(
    x_pool, u_pool, parent, child, coefficients, seed, key, model_input, elements, BLOCK: tl.constexpr
):  # fmt: skip
    """A program steps `BLOCK` consecutive elements of one row; see `rollflow.kernels.propose` for the equation.

    Every thread has four elements in a row of every tensor, those of one quad of the noise: nothing changes threads.
    """
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    offset = tl.max_contiguous(block * BLOCK + tl.arange(0, BLOCK), 4)

    source = tl.load(parent + row)
    target = tl.load(child + row)
    live = target >= 0
    related = live & (source >= 0)
    # What a padding row has for coefficients is read and dropped: a load that waits for no other is worth more.
    a = tl.where(related, tl.load(coefficients + 4 * row), 0.0)
    b = tl.where(related, tl.load(coefficients + 4 * row + 1), 0.0)
    k = tl.where(live, tl.load(coefficients + 4 * row + 2), 0.0)
    inverse_scale = tl.where(live, tl.load(coefficients + 4 * row + 3), 0.0)
    row_seed = tl.load(seed + row)
    row_key = tl.load(key + row)

    # A term with coefficient 0 is absent: its memory is not read (it may be uninitialised), its noise not drawn.
    # An absent row or term is one that ends at element 0; the interpreter cannot broadcast a scalar truth value.
    x = tl.load(x_pool + source * elements + offset, mask=offset < tl.where(a != 0.0, elements, 0), other=0.0)
    u = tl.load(u_pool + source * elements + offset, mask=offset < tl.where(b != 0.0, elements, 0), other=0.0)
    state = a * x + b * u.to(tl.float32)
    if k != 0.0:
        state += k * normal_block(row_seed, row_key, block, BLOCK)

    tl.store(x_pool + target * elements + offset, state, mask=offset < tl.where(live, elements, 0))
    scaled = (state * inverse_scale).to(model_input.dtype.element_ty)
    tl.store(model_input + row * elements + offset, scaled, mask=offset < elements)


def launch_propose(
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    parent: Int64[Tensor, " row"],
    child: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 4"],
    seed: Int64[Tensor, " row"],
    key: Int64[Tensor, " row"],
    model_input: Float[Tensor, "row token channel"],
    block: int | None = None,
) -> None:
    """Write the children into `x_pool` and `model_input`, by programs of `block` elements (by default `block_of`)."""
    rows, elements = len(parent), x_pool[0].numel()
    block = block or block_of(rows, elements)
    arguments: dict[str, Tensor | int] = {
        "x_pool": x_pool, "u_pool": u_pool, "parent": parent, "child": child, "coefficients": coefficients,
        "seed": seed, "key": key, "model_input": model_input, "elements": elements,
    }  # fmt: skip
    launch(propose_kernel, (triton.cdiv(elements, block), rows), arguments, {"BLOCK": block}, warps_of(block))


@propose_operator.register_kernel("cuda")
def _(
    x_pool: Tensor, u_pool: Tensor, parent: Tensor, child: Tensor, coefficients: Tensor, seed: Tensor, key: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    model_input = torch.empty(len(parent), *x_pool.shape[1:], dtype=dtype, device=x_pool.device)
    launch_propose(x_pool, u_pool, parent, child, coefficients, seed, key, model_input)
    return model_input
