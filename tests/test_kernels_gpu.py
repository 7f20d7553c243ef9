"""What only a CUDA device can show: half precision, graph capture, offsets beyond 2^31, and equality with the CPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from rollflow import kernels
from rollflow.kernels.group_norm import launch_group_norm
from rollflow.models.layout import Layout

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINGLE = {"rtol": 2e-6, "atol": 4e-6}  # what two roundings of libraries' functions may differ by


def assert_rounds_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Two roundings to one dtype of float32 results that are equal but for `SINGLE`.

    Where these lie to both sides of the middle between two numbers of a dtype of 16 bits, they become these two, one
    unit in the last place apart, in few elements. So close to 0 that `SINGLE` allows it they may be further apart.
    """
    assert actual.dtype == expected.dtype
    ours, theirs = actual.cpu().float(), expected.float()
    if expected.dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, **SINGLE)
        return
    unit = torch.finfo(expected.dtype).eps  # of the last place, of numbers from 1 to 2
    torch.testing.assert_close(ours, theirs, rtol=unit, atol=SINGLE["atol"])
    # How often a middle lies between two results is their distance in units, of numbers about 1: of 2 million sums of
    # three terms in float32 and in float64, 9e-5 differ in bfloat16 and 6e-4 in float16. This is three times as many.
    unequal = int((ours != theirs).sum())
    assert unequal <= 1 + theirs.numel() * 2e-6 / unit


def arguments(rows: int, token: int, channel: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A stochastic, a deterministic, a prior and a padding row in turn, on the CPU; velocities in a dtype."""
    generator = torch.Generator().manual_seed(rows * token)
    pools = torch.randn(2, 2 * rows, token, channel, generator=generator)
    row = torch.arange(rows)
    coefficients = torch.tensor([0.9, -0.2, 0.4, 1.1]).repeat(rows, 1)
    coefficients[1::4, 2] = 0
    return {
        "x_pool": pools[0].contiguous(),
        "u_pool": pools[1].to(dtype, copy=True),
        "parent": torch.where(row % 4 == 2, -1, row),
        "child": torch.where(row % 4 == 3, -1, row + rows),
        "coefficients": coefficients,
        "seed": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        "key": torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("token", "channel"), [(4096, 64), (16, 32), (7, 147), (1, 1)])
def test_propose_equals_cpu(token: int, channel: int, dtype: torch.dtype) -> None:
    on_cpu = arguments(8, token, channel, dtype)
    on_gpu = {name: value.cuda() for name, value in on_cpu.items()}
    expected = kernels.propose(**on_cpu, dtype=dtype)
    actual = kernels.propose(**on_gpu, dtype=dtype)
    assert_rounds_alike(actual, expected)
    torch.testing.assert_close(on_gpu["x_pool"].cpu(), on_cpu["x_pool"], **SINGLE)
    # The cast is the only difference that dtype makes, and it rounds to nearest even as torch does.
    again = {name: value.cuda() for name, value in arguments(8, token, channel, dtype).items()}
    single = kernels.propose(**again, dtype=torch.float32)
    assert torch.equal(actual, single.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("patch", "channel", "height", "width"),
    [
        ((1, 2, 2), 64, 128, 128),
        ((1, 2, 2), 64, 90, 160),
        ((1, 2, 2), 32, 8, 8),
        ((1, 2, 2), 12, 2, 6),
        ((1, 1, 1), 16, 63, 65),
        ((1, 1, 2), 10, 7, 14),
        ((1, 4, 4), 256, 64, 60),
        ((1, 8, 1), 8, 16, 3),
    ],
)
def test_finish_equals_cpu(
    patch: tuple[int, int, int], channel: int, height: int, width: int, dtype: torch.dtype
) -> None:
    channels = range(channel // (patch[1] * patch[2]))
    layout = Layout(patch, tuple(0.3611 + 0.05 * c for c in channels), tuple(0.1159 - 0.1 * c for c in channels))
    rows, token = 4, layout.tokens(height, width)
    generator = torch.Generator().manual_seed(token)
    x_pool = torch.randn(6, token, channel, generator=generator)
    u = torch.randn(rows, token, channel, generator=generator).to(dtype)
    slot = torch.tensor([5, -1, 0, 2])
    coefficients = torch.rand(rows, 2, generator=generator)
    pools = [torch.full_like(x_pool, math.nan, dtype=dtype) for _ in range(2)]
    size, cpu, gpu = (height, width, *patch[1:]), torch.device("cpu"), torch.device("cuda")
    expected = kernels.finish(u, x_pool, pools[0], slot, coefficients, *size, *layout.affine(cpu), dtype)
    u_pool = pools[1].cuda()
    moved = (u.cuda(), x_pool.cuda(), u_pool, slot.cuda(), coefficients.cuda())
    actual = kernels.finish(*moved, *size, *layout.affine(gpu), dtype).cpu()
    assert_rounds_alike(actual, expected)
    torch.testing.assert_close(u_pool.cpu(), pools[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("numbers", "elements"), [(1, 16 * 128 * 128), (16, 16 * 21 * 60 * 104), (3, 3 * 35), (12, 12 * 16), (4100, 4100)]
)
def test_finish_flat_equals_cpu(numbers: int, elements: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(elements)
    x_pool = torch.randn(4, 1, elements, generator=generator)
    u = torch.randn(3, 1, elements, generator=generator).to(dtype)
    slot, coefficients = torch.tensor([3, -1, 0]), torch.rand(3, 2, generator=generator)
    tables = [table.contiguous() for table in torch.rand(2, numbers, generator=generator).unbind(0)]
    pools = [torch.full_like(x_pool, math.nan, dtype=dtype) for _ in range(2)]
    expected = kernels.finish_flat(u, x_pool, pools[0], slot, coefficients, *tables, dtype)
    moved = [value.cuda() for value in (u, x_pool, pools[1], slot, coefficients, *tables)]
    actual = kernels.finish_flat(*moved, dtype).cpu()
    assert_rounds_alike(actual, expected)
    torch.testing.assert_close(moved[2].cpu(), pools[0], rtol=0, atol=0, equal_nan=True)


def test_finish_flat_waits_for_nothing_and_lives_in_a_cuda_graph() -> None:
    """A batch of padding captured; replays with rows, of other slots, write those and nothing else."""
    x_pool, u = torch.randn(2, 4, 1, 640, device="cuda").unbind(0)
    kept, slot = torch.full_like(x_pool, math.nan), torch.full((4,), -1, device="cuda")
    rest = [torch.rand(4, 2, device="cuda"), torch.rand(16, device="cuda"), torch.rand(16, device="cuda")]
    kernels.finish_flat(u, x_pool, kept, slot, *rest, torch.float32)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents = kernels.finish_flat(u, x_pool, kept, slot, *rest, torch.float32)
    slot.copy_(torch.tensor([2, -1, 0, -1]))
    graph.replay()
    assert torch.equal(kept[[2, 0]], u[[0, 2]]) and kept[[1, 3]].isnan().all()
    assert torch.equal(latents, kernels.finish_flat(u, x_pool, kept.clone(), slot, *rest, torch.float32))
    assert not latents[[1, 3]].any() and latents[[0, 2]].any()


def test_noise_equals_cpu() -> None:
    seed, key = torch.tensor([0, -1, 2**62]), torch.tensor([7, -(2**63), 2**33])
    for shape in ((4096, 64), (5, 205), (1, 3)):
        actual = kernels.noise(seed.cuda(), key.cuda(), *shape).cpu()
        torch.testing.assert_close(actual, kernels.noise(seed, key, *shape), rtol=0, atol=4e-6)


def test_propose_in_a_cuda_graph() -> None:
    """A replay reads the present contents of its arguments: new seeds, new coefficients, new slots."""
    static = {name: value.cuda() for name, value in arguments(8, 16, 32).items()}
    kernels.propose(**static, dtype=torch.bfloat16)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model_input = kernels.propose(**static, dtype=torch.bfloat16)
    for shift in (0, 1000):
        fresh = {name: value.cuda() for name, value in arguments(8, 16, 32).items()}
        fresh["seed"] += shift
        fresh["coefficients"] *= 1 + shift
        if shift:
            fresh["child"] = torch.tensor([-1, 12, 8, 15, 9, -1, 10, 11], device="cuda")
        for name, value in fresh.items():
            static[name].copy_(value)
        model_input.zero_()
        graph.replay()
        assert torch.equal(model_input, kernels.propose(**fresh, dtype=torch.bfloat16))
        assert torch.equal(static["x_pool"], fresh["x_pool"])


def test_offsets_beyond_31_bits() -> None:
    """Slots whose first element lies beyond 2^31 elements (a pool of 9 GB in each of two tensors)."""
    token, channel, slots = 4096, 64, 2**31 // (4096 * 64) + 8
    if torch.cuda.mem_get_info()[0] < 2 * slots * token * channel * 4 + 2**30:
        pytest.skip("needs 18 GB of free device memory")
    x_pool = torch.zeros(slots, token, channel, device="cuda")
    u_pool = torch.zeros_like(x_pool)
    small = arguments(1, token, channel)
    x_pool[-1], u_pool[-1] = small["x_pool"][0].cuda(), small["u_pool"][0].cuda()
    far = {name: value.cuda() for name, value in small.items()}
    far |= {"x_pool": x_pool, "u_pool": u_pool}
    far["parent"], far["child"] = torch.tensor([slots - 1], device="cuda"), torch.tensor([slots - 2], device="cuda")
    actual = kernels.propose(**far, dtype=torch.float32)
    expected = kernels.propose(**small, dtype=torch.float32)
    torch.testing.assert_close(actual.cpu(), expected, rtol=2e-6, atol=4e-6)
    assert torch.equal(x_pool[-2] * far["coefficients"][0, 3], actual[0])
    assert not x_pool[: slots - 2].any()
    one = torch.ones(1, 2, device="cuda")
    affine = torch.ones(16, device="cuda"), torch.zeros(16, device="cuda")
    kernels.finish(actual, x_pool, u_pool, far["child"], one, 128, 128, 2, 2, *affine, torch.float32)
    assert torch.equal(u_pool[-2], actual[0]) and not u_pool[: slots - 2].any()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128, 1024, 1024), (2, 512, 128, 96), (5, 16, 64, 64)])
def test_group_norm_is_as_exact_as_torchs(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    """Against float64; every element of the output is written."""
    generator = torch.Generator("cuda").manual_seed(shape[1])
    x = torch.randn(shape, device="cuda", generator=generator) + torch.randn(shape[1], 1, 1, device="cuda")
    x = x.to(dtype).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], device="cuda", generator=generator).to(dtype) for _ in range(2))
    groups, eps = min(32, shape[1] // 2), 1e-6
    out = torch.full_like(x, math.nan)
    launch_group_norm(x, groups, weight, bias, eps, silu, out)
    theirs = F.group_norm(x, groups, weight, bias, eps)
    truth = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)
    theirs, truth = (F.silu(theirs), F.silu(truth)) if silu else (theirs, truth)
    off, allowed = ((value.double() - truth).abs().max().item() for value in (out, theirs))
    assert off <= 2 * allowed + 4e-6
