"""Triton kernel of `rollflow.kernels.finish_flat`: `finish` of elements that lie where the latents have them."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from .launch import TABLES, block_of, launch, warps_of
from .operators import finish_flat_operator

LEAST_RUN = 128  # elements that share a number, for programs that have a single number each
MOST_RUNS = 65535  # the second side of a grid


@triton.jit(do_not_specialize_on_alignment=TABLES)
@no_type_check
def finish_flat_kernel(
    u, x_pool, u_pool, slot, coefficients, scale, offset, latents, elements, run,
    BLOCK: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """A program finishes `BLOCK` consecutive elements of one row; see `rollflow.kernels.finish_flat` for the equation.

    `run` elements share a number of `scale` and `offset`. TABLE is what a program has: a "run" or a part of one, so
    that one number is its, or a "block" of any, each element with its number.
    """
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    place = tl.max_contiguous(first + tl.arange(0, BLOCK), 4)  # four a thread of every tensor: nothing changes threads
    if TABLE == "run":
        end = run
        start = tl.program_id(1) * run
        number = tl.program_id(1)
        factor = tl.load(scale + number)
        shift = tl.load(offset + number)
    else:
        end = elements
        start = 0
        number = place // run
        factor = tl.load(scale + number, mask=place < elements, other=0.0)
        shift = tl.load(offset + number, mask=place < elements, other=0.0)
    element = start + place

    source = tl.load(slot + row)
    live = source >= 0
    # What a padding row has for coefficients is read and dropped: a load that waits for no other is worth more.
    p = tl.where(live, tl.load(coefficients + 2 * row), 0.0)
    q = tl.where(live, tl.load(coefficients + 2 * row + 1), 0.0)
    shift = tl.where(live, shift, 0.0)

    read = place < tl.where(live, end, 0)
    velocity = tl.load(u + row * elements + element, mask=read, other=0.0)
    x = tl.load(x_pool + source * elements + element, mask=read, other=0.0)
    tl.store(u_pool + source * elements + element, velocity, mask=read)
    value = (p * x + q * velocity.to(tl.float32)) * factor + shift
    tl.store(latents + row * elements + element, value.to(latents.dtype.element_ty), mask=place < end)


def launch_finish_flat(
    u: Float[Tensor, "row token channel"],
    x_pool: Float32[Tensor, "slot token channel"],
    u_pool: Float[Tensor, "slot token channel"],
    slot: Int64[Tensor, " row"],
    coefficients: Float32[Tensor, "row 2"],
    scale: Float32[Tensor, " number"],
    offset: Float32[Tensor, " number"],
    latents: Float[Tensor, "row element"],
    block: int | None = None,
) -> None:
    """Fill `latents` and the rows `slot` of `u_pool`, by programs of `block` elements (by default `block_of`)."""
    (rows, elements), numbers = latents.shape, len(scale)
    run = elements // numbers
    whole = run >= LEAST_RUN and numbers <= MOST_RUNS
    span, across = (run, numbers) if whole else (elements, 1)
    block = block or block_of(rows * across, span)
    arguments: dict[str, Tensor | int] = {
        "u": u, "x_pool": x_pool, "u_pool": u_pool, "slot": slot, "coefficients": coefficients,
        "scale": scale, "offset": offset, "latents": latents, "elements": elements, "run": run,
    }  # fmt: skip
    constants = {"BLOCK": block, "TABLE": "run" if whole else "block"}
    launch(finish_flat_kernel, (triton.cdiv(span, block), across, rows), arguments, constants, warps_of(block))


@finish_flat_operator.register_kernel("cuda")
def _(
    u: Tensor, x_pool: Tensor, u_pool: Tensor, slot: Tensor, coefficients: Tensor, scale: Tensor, offset: Tensor,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    latents = torch.empty(len(u), u.shape[1] * u.shape[2], dtype=dtype, device=u.device)
    launch_finish_flat(u, x_pool, u_pool, slot, coefficients, scale, offset, latents)
    return latents
