"""`group_norm`: group normalisation of channels-last images, with SiLU, for autoencoders' decoders.

torch's own takes a program for each image and group to read it all, 32 for an image of 1024 x 1024 pixels, and works on
contiguous channels: what a convolution laid out channels last is copied there and back. On an H100 that was 103 of 143
ms of FLUX's decoder. Here many programs read an image, in three launches: moments of chunks of pixels, their sums as a
factor and a shift of each channel, and what is returned.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launch import launch

CHUNKS = 512  # programs that read an image, of which the next launch adds the moments
LEAST = 64  # pixels of a chunk
TILE = 4096  # elements that a program holds at a time
MERGED = 64  # chunks whose moments are added at a time
LARGEST = 2048  # channels
WARPS = 4  # of a program
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
@no_type_check
def moments_kernel(x, moments, pixels, chunk, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """Means, and sums of squares about them, of each chunk's groups."""
    # Program = (chunk, image). Sums of the values and of their squares, by group; float32 holds those of a chunk.
    place, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel, line = tl.arange(0, CHANNELS), tl.arange(0, PIXELS)
    first = place * chunk
    last = tl.minimum(first + chunk, pixels)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for start in range(first, last, PIXELS):
        pixel = start + line
        offset = (image * pixels + pixel)[:, None] * CHANNELS + channel[None, :]
        value = tl.load(x + offset, mask=(pixel < last)[:, None], other=0.0).to(tl.float32)
        total += value
        squares += value * value
    count = (last - first) * (CHANNELS // GROUPS)
    total = tl.sum(tl.reshape(tl.sum(total, 0), [GROUPS, CHANNELS // GROUPS]), 1)
    squares = tl.sum(tl.reshape(tl.sum(squares, 0), [GROUPS, CHANNELS // GROUPS]), 1)
    mean = total / count
    out = moments + (image * tl.num_programs(0) + place) * 2 * GROUPS + tl.arange(0, GROUPS)
    tl.store(out, mean)
    tl.store(out + GROUPS, tl.maximum(squares - mean * total, 0.0))


@triton.jit
@no_type_check
def affine_kernel(
    moments, weight, bias, affine, pixels, chunk, chunks,
    EPS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """A factor and a shift of each channel, of the moments of all chunks."""
    # Program = (group, image). Moments about the mean of all, whose differences are exact where chunks agree.
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    width: tl.constexpr = CHANNELS // GROUPS
    own = moments + image * chunks * 2 * GROUPS + group
    lane = tl.arange(0, MERGED)
    total = tl.zeros([MERGED], tl.float32)
    for start in range(0, chunks, MERGED):
        place = start + lane
        count = tl.minimum(chunk, pixels - place * chunk) * 1.0
        total += tl.load(own + place * 2 * GROUPS, mask=place < chunks, other=0.0) * count
    mean = tl.sum(total, 0) / pixels
    within = tl.zeros([MERGED], tl.float32)
    for start in range(0, chunks, MERGED):
        place = start + lane
        known = place < chunks
        count = tl.minimum(chunk, pixels - place * chunk) * 1.0
        difference = tl.load(own + place * 2 * GROUPS, mask=known, other=0.0) - mean
        squares = tl.load(own + place * 2 * GROUPS + GROUPS, mask=known, other=0.0)
        within += squares + tl.where(known, count * difference * difference, 0.0) * width
    scale = 1.0 / tl.sqrt_rn(tl.sum(within, 0) / (pixels * 1.0 * width) + EPS)
    channel = group * width + tl.arange(0, width)
    factor = tl.load(weight + channel).to(tl.float32) * scale
    out = affine + image * 2 * CHANNELS + channel
    tl.store(out, factor)
    tl.store(out + CHANNELS, tl.load(bias + channel).to(tl.float32) - mean * factor)


@triton.jit
@no_type_check
def apply_kernel(x, affine, out, pixels, SILU: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """What is returned, of factors and shifts."""
    # Program = (tile of pixels, image).
    image, channel = tl.program_id(1).to(tl.int64), tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    offset = (image * pixels + pixel)[:, None] * CHANNELS + channel[None, :]
    inside = (pixel < pixels)[:, None]
    factor = tl.load(affine + image * 2 * CHANNELS + channel)[None, :]
    shift = tl.load(affine + image * 2 * CHANNELS + CHANNELS + channel)[None, :]
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) * factor + shift
    if SILU:
        value = value.to(out.dtype.element_ty).to(tl.float32)  # torch rounds what it normalised
        value = value / (1.0 + tl.exp(-value))
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=inside)


def supported(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `group_norm` takes these: channels innermost, and powers of two of them and of groups."""
    if weight is None or bias is None or x.ndim < 3 or x.dtype not in DTYPES or not x.numel():
        return False
    channels = x.shape[1]
    powers = all(n & (n - 1) == 0 for n in (channels, groups)) and 1 <= groups <= channels <= LARGEST
    return powers and x[0].numel() < 2**31 and x.movedim(1, -1).is_contiguous()


def group_norm(
    x: Float[Tensor, "image channel ..."],
    groups: int,
    weight: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"],
    eps: float,
    silu: bool,
) -> Float[Tensor, "image channel ..."]:
    """`torch.nn.functional.group_norm`, followed by SiLU where `silu` is set, of images whose channels lie innermost.

    Moments and products are in float32, and rounded where torch rounds. An image's result is the same whatever other
    images there are. Launches kernels, waits for nothing, and can be captured in a CUDA graph.

    Args:
        x: images of any number of dimensions, for which `supported` holds.
        groups: of channels that share mean and variance.
        weight, bias: of a channel, in any of the dtypes of `x`.
        eps: added to variances.
        silu: return `y sigmoid(y)` of what was normalised.

    Returns:
        A new tensor of the strides of `x`.
    """
    out = torch.empty_like(x)
    launch_group_norm(x, groups, weight, bias, eps, silu, out)
    return out


def chunk_of(pixels: int) -> int:
    """How many pixels of an image of so many a program adds the moments of."""
    return max(LEAST, triton.cdiv(pixels, CHUNKS))


def launch_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, out: Tensor
) -> None:
    """Fills `out`, of the strides of `x`; see `group_norm`."""
    images, channels = x.shape[:2]
    pixels = x[0, 0].numel()
    chunk = chunk_of(pixels)
    chunks, lines = triton.cdiv(pixels, chunk), tile(channels)
    moments = torch.empty(images, chunks, 2, groups, dtype=torch.float32, device=x.device)
    affine = torch.empty(images, 2, channels, dtype=torch.float32, device=x.device)
    known, sizes = {"pixels": pixels, "chunk": chunk}, {"GROUPS": groups, "CHANNELS": channels}
    launch(moments_kernel, (chunks, images), {"x": x, "moments": moments, **known}, {**sizes, "PIXELS": lines}, WARPS)
    launch(
        affine_kernel, (groups, images),
        {"moments": moments, "weight": weight, "bias": bias, "affine": affine, **known, "chunks": chunks},
        {"EPS": eps, **sizes, "MERGED": MERGED}, WARPS,
    )  # fmt: skip
    launch(
        apply_kernel, (triton.cdiv(pixels, lines), images), {"x": x, "affine": affine, "out": out, "pixels": pixels},
        {"SILU": silu, "CHANNELS": channels, "PIXELS": lines}, WARPS,
    )  # fmt: skip


def tile(channels: int) -> int:
    """Pixels of so many channels that a program holds at a time."""
    return max(1, TILE // channels)
