"""Triton kernel of `rollflow.kernels.noise`."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64
from torch import Tensor

from .launch import TABLES, block_of, launch, warps_of
from .operators import noise_operator
from .philox import normal_block


@triton.jit(do_not_specialize_on_alignment=TABLES)
@no_type_check
def noise_kernel(seed, key, out, elements, BLOCK: tl.constexpr):
    """A program draws `BLOCK` consecutive elements of one row; see `rollflow.kernels.reference` for the stream."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    z = normal_block(tl.load(seed + row), tl.load(key + row), block, BLOCK)
    tl.store(out + row * elements + offset, z, mask=offset < elements)


def launch_noise(
    seed: Int64[Tensor, " row"],
    key: Int64[Tensor, " row"],
    out: Float32[Tensor, "row token channel"],
    block: int | None = None,
) -> None:
    """Fill `out`, by programs of `block` elements (by default `block_of`)."""
    rows, elements = len(out), out[0].numel()
    block = block or block_of(rows, elements)
    arguments: dict[str, Tensor | int] = {"seed": seed, "key": key, "out": out, "elements": elements}
    launch(noise_kernel, (triton.cdiv(elements, block), rows), arguments, {"BLOCK": block}, warps_of(block))


@noise_operator.register_kernel("cuda")
def _(seed: Tensor, key: Tensor, token: int, channel: int) -> Tensor:
    out = torch.empty(len(seed), token, channel, dtype=torch.float32, device=seed.device)
    launch_noise(seed, key, out)
    return out
