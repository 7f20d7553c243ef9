"""`group_norm`: its kernels (interpreted where there is no GPU) against torch's and against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rollflow.kernels import group_norm as module
from rollflow.kernels.group_norm import group_norm, launch_group_norm, supported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16] if torch.cuda.is_available() else []  # the interpreter rounds otherwise


def images(*shape: int, mean: float = 0.0) -> Tensor:
    """Channels last, each channel with a mean and a scale of its own."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = torch.randn(shape, generator=generator) * (0.5 + torch.rand(per_channel, generator=generator))
    x = x + mean + torch.randn(per_channel, generator=generator)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def weights(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(channels)
    weight, bias = torch.randn(2, channels, generator=generator)
    return weight, bias


def exact(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    y = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)
    return F.silu(y) if silu else y


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 16, 8, 8), 8),
        ((1, 32, 7, 13), 32),  # a channel a group, odd sizes
        ((3, 64, 1, 1), 8),
        ((2, 128, 5, 67), 32),
        ((1, 512, 9, 31), 32),
        ((1, 16, 3, 17, 5), 4),  # a clip
        ((2, 4096 // 64, 65), 1),
    ],
)
def test_it_is_torchs_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool) -> None:
    """Off by at most twice what torch is off by, and a floor; every element of the output is written."""
    x, (weight, bias) = images(*shape).to(DEVICE, dtype), (w.to(DEVICE, dtype) for w in weights(shape[1]))
    assert supported(x, groups, weight, bias)
    out = torch.full_like(x, math.nan)
    launch_group_norm(x, groups, weight, bias, 1e-6, silu, out)
    theirs = F.group_norm(x, groups, weight, bias, 1e-6)
    theirs = F.silu(theirs) if silu else theirs
    truth = exact(x, groups, weight, bias, 1e-6, silu)
    off, allowed = (out - truth).abs().max().item(), (theirs - truth).abs().max().item()
    assert off <= 2 * allowed + 4e-6
    assert out.stride() == x.stride()


def test_a_mean_far_from_zero_does_not_eat_the_variance() -> None:
    """Many chunks, of a mean of 100 standard deviations; sums of squares over all would be off by a per cent."""
    x, (weight, bias) = images(1, 8, 96, 96, mean=100.0).to(DEVICE), (w.to(DEVICE) for w in weights(8))
    out = group_norm(x, 8, weight, bias, 1e-6, False)
    truth = exact(x, 8, weight, bias, 1e-6, False)
    assert (out - truth).abs().max() < 4e-3


def test_an_image_does_not_depend_on_the_others() -> None:
    x, (weight, bias) = images(3, 16, 9, 11).to(DEVICE), (w.to(DEVICE) for w in weights(16))
    together = group_norm(x, 4, weight, bias, 1e-6, True)
    for i in range(3):
        alone = group_norm(x[i : i + 1].clone(memory_format=torch.preserve_format), 4, weight, bias, 1e-6, True)
        assert torch.equal(together[i : i + 1], alone)


def test_what_it_does_not_take() -> None:
    x, (weight, bias) = images(2, 16, 4, 4), weights(16)
    assert supported(x, 4, weight, bias)
    assert not supported(x.contiguous(), 4, weight, bias)  # channels outermost
    assert not supported(x, 4, None, None)
    assert not supported(x.double(), 4, weight, bias)
    assert not supported(images(2, 12, 4, 4), 4, *weights(12))
    assert not supported(x[:, :, :0], 4, weight, bias)


def test_the_chunks_of_an_image_bound_what_the_second_launch_reads() -> None:
    for pixels in (1, 63, 64 * 512, 64 * 512 + 1, 1024 * 1024, 2048 * 2048 + 7):
        chunk = module.chunk_of(pixels)
        assert -(-pixels // chunk) <= module.CHUNKS and chunk >= module.LEAST
