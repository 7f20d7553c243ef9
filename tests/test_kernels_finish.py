"""`finish` and `finish_flat`: their Triton kernel (interpreted where there is no GPU) against torch, and operators."""

import inspect
import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from rollflow import kernels
from rollflow.kernels import reference
from rollflow.kernels.finish import launch_finish
from rollflow.kernels.finish_flat import launch_finish_flat
from rollflow.models.layout import Layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan


@dataclass
class Tail:
    """Arguments of `finish` and `finish_flat`: three particles and a padding row; NaN wherever nothing may be read."""

    u: Tensor
    x_pool: Tensor
    u_pool: Tensor
    slot: Tensor
    coefficients: Tensor

    def on(self, device: str) -> "Tail":
        return Tail(**{name: value.to(device, copy=True) for name, value in vars(self).items()})


def tail_of(layout: Layout, height: int, width: int) -> Tail:
    return tail(layout.tokens(height, width), layout.token_channels)


def tail(token: int, channel: int) -> Tail:
    generator = torch.Generator().manual_seed(token * channel)
    u = torch.randn(4, token, channel, generator=generator)
    u[3] = NAN
    x_pool = torch.full((6, token, channel), NAN)
    slot = torch.tensor([4, 0, 3, -1])
    x_pool[slot[:3]] = torch.randn(3, token, channel, generator=generator)
    coefficients = torch.tensor([[1.0, -0.9], [1.2, -0.5], [0.8, 0.1], [NAN, NAN]])
    return Tail(u, x_pool, torch.full_like(x_pool, NAN), slot, coefficients)


def means(t: Tail) -> Tensor:
    """`p x + q u` of the three particles, in double precision."""
    p, q = t.coefficients[:3].double()[:, :, None, None].unbind(1)
    return p * t.x_pool[t.slot[:3]].double() + q * t.u[:3].double()


def check(before: Tail, *results: tuple[Tensor, Tensor]) -> None:
    """Padding is zero, velocities are where they belong, and nothing else was written; for latents and pools."""
    for latents, u_pool in results:
        assert not latents[3].any()
        assert u_pool.dtype == before.u.dtype and torch.equal(u_pool[before.slot[:3]], before.u[:3])
        assert u_pool[[1, 2, 5]].isnan().all()


def assert_as_exact(actual: Tensor, expected: Tensor, truth: Tensor) -> None:
    """The kernel errs at most twice as much as torch, which errs by roundings of latents smaller than 16 alone."""
    rounding = torch.finfo(actual.dtype).eps
    theirs = (expected[:3] - truth).abs().max()
    assert theirs < 34 * rounding
    assert (actual[:3] - truth).abs().max() <= 2 * theirs + rounding


def tables(numbers: int) -> tuple[Tensor, Tensor]:
    """A factor and a shift of its own for each of so many channels."""
    layout = layout_of(1, 1, numbers)
    return layout.affine(torch.device("cpu"))


def layout_of(patch_y: int, patch_x: int, channels: int) -> Layout:
    """A scaling and a shift of its own for each channel; the first are FLUX's."""
    scaling = tuple((0.3611 + 0.05 * (c % 7)) * (-1) ** c for c in range(channels))
    return Layout((1, patch_y, patch_x), scaling, tuple(0.1159 - 0.3 * (c % 5) for c in range(channels)))


@pytest.mark.parametrize(
    ("patch", "channels", "height", "width"),
    [
        ((2, 2), 8, 8, 8),
        ((2, 2), 16, 4, 68),
        ((2, 2), 1, 2, 2),
        ((2, 2), 3, 2, 6),
        ((2, 2), 24, 6, 2),
        ((2, 2), 33, 2, 70),  # more channels than a tile
        ((1, 1), 1, 1, 1),
        ((1, 1), 16, 3, 67),
        ((1, 1), 35, 2, 5),
        ((1, 2), 5, 3, 10),
        ((2, 1), 4, 6, 5),
        ((4, 4), 3, 8, 72),
        ((4, 4), 9, 4, 4),
        ((8, 8), 2, 8, 24),
        ((8, 1), 2, 16, 3),
        ((1, 8), 17, 2, 16),
    ],
)
def test_finish_equals_reference_and_diffusers(patch: tuple[int, int], channels: int, height: int, width: int) -> None:
    layout = layout_of(*patch, channels)
    on_cpu = tail_of(layout, height, width)
    before, on_device = on_cpu.on("cpu"), on_cpu.on(DEVICE)
    inverse_scaling, shift = layout.affine(torch.device("cpu"))
    arguments = (height, width, *patch, inverse_scaling, shift, torch.float32)
    expected = reference.finish(*vars(on_cpu).values(), *arguments)
    latents = torch.full((4, channels, height, width), NAN, device=DEVICE)
    launch_finish(*vars(on_device).values(), *patch, *layout.affine(torch.device(DEVICE)), latents)
    actual = latents.cpu()
    operator = kernels.finish(*vars(before.on("cpu")).values(), *arguments)
    assert torch.equal(operator, expected)

    check(before, (expected, on_cpu.u_pool), (actual, on_device.u_pool.cpu()))
    truth = means(before)
    if patch == (2, 2):
        truth = FluxPipeline._unpack_latents(truth, height * 8, width * 8, vae_scale_factor=8)
    else:
        truth = layout.unpack(truth, height, width)
    scale, offset = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (layout.scaling, layout.shift))
    assert_as_exact(actual, expected, truth / scale + offset)


@pytest.mark.parametrize(
    ("patch", "channels", "height", "width"),
    [
        ((2, 2), 8, 8, 8),
        ((2, 2), 3, 2, 6),
        ((2, 2), 33, 2, 70),
        ((1, 2), 5, 3, 10),
        ((4, 4), 9, 4, 4),
        ((8, 1), 2, 16, 3),
    ],
)
def test_finish_with_a_number_for_each_channel_of_a_token(
    patch: tuple[int, int], channels: int, height: int, width: int
) -> None:
    """FLUX.2 normalises patches, not latents."""
    layout = layout_of(*patch, channels)
    scale, offset = tables(layout.token_channels)
    on_cpu = tail_of(layout, height, width)
    before, on_device = on_cpu.on("cpu"), on_cpu.on(DEVICE)
    expected = kernels.finish(*vars(on_cpu).values(), height, width, *patch, scale, offset, torch.float32)
    latents = torch.full((4, channels, height, width), NAN, device=DEVICE)
    launch_finish(*vars(on_device).values(), *patch, scale.to(DEVICE), offset.to(DEVICE), latents)
    actual = latents.cpu()
    check(before, (expected, on_cpu.u_pool), (actual, on_device.u_pool.cpu()))
    truth = layout.unpack(means(before) * scale.double() + offset.double(), height, width)
    assert_as_exact(actual, expected, truth)


def test_finish_computes_what_it_computed_with_one_number_for_all_channels() -> None:
    """2x2 patches, one scaling and one shift: the bits of `x0_hat.mul_(1 / scaling).add_(shift)` on tokens."""
    generator = torch.Generator().manual_seed(0)
    for scaling, shift in ((0.3611, 0.1159), (0.9785169963011986, -0.0389750674366951), (0.18215, 0.0)):
        layout = Layout((1, 2, 2), (scaling,) * 16, (shift,) * 16)
        x_pool, u = torch.randn(2, 3, 24, 64, generator=generator).unbind(0)
        p, q = torch.rand(2, 3, generator=generator).unbind(0)
        tokens = x_pool.mul(p[:, None, None]).add_(u * q[:, None, None]).mul_(1.0 / scaling).add_(shift)
        expected = tokens.view(3, 4, 6, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 16, 8, 12)
        affine = layout.affine(torch.device("cpu"))
        arguments = (torch.arange(3), torch.stack([p, q], 1), 8, 12, 2, 2, *affine)
        for dtype in (torch.float32, torch.bfloat16):
            actual = kernels.finish(u, x_pool, torch.empty_like(x_pool), *arguments, dtype)
            assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("patch", [(2, 2), (1, 1), (2, 4)])
def test_finish_bits_do_not_depend_on_the_tile(patch: tuple[int, int]) -> None:
    layout = layout_of(*patch, 4)
    on_device = tail_of(layout, 4, 24).on(DEVICE)
    results = []
    for units in (128, 32, 8):
        latents = torch.full((4, 4, 4, 24), NAN, device=DEVICE)
        affine = layout.affine(torch.device(DEVICE))
        launch_finish(*vars(on_device).values(), *patch, *affine, latents, units=units)
        results.append(latents)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((16, 8, 8), 1),  # one number, as of SD3
        ((16, 3, 5), 16),  # one a channel
        ((16, 2, 6, 10), 16),  # of a clip, as of Wan
        ((5, 7), 35),  # one an element
        ((2, 2049), 2),  # more elements of a channel than a program takes
        ((1, 4100), 4100),
        ((3, 1, 1), 3),  # channels of one element
        ((6, 5, 3), 2),  # a number for three channels
        ((1,), 1),
        ((1, 1, 4096), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finish_flat_equals_reference(shape: tuple[int, ...], numbers: int, dtype: torch.dtype) -> None:
    """States of one token, as pipelines have them, with velocities and latents in a dtype."""
    elements = math.prod(shape)
    scale, offset = tables(numbers)
    on_cpu = tail(1, elements)
    on_cpu.u, on_cpu.u_pool = on_cpu.u.to(dtype), on_cpu.u_pool.to(dtype)
    before, on_device = on_cpu.on("cpu"), on_cpu.on(DEVICE)
    expected = reference.finish_flat(*vars(on_cpu).values(), scale, offset, dtype)
    latents = torch.full((4, elements), NAN, dtype=dtype, device=DEVICE)
    launch_finish_flat(*vars(on_device).values(), scale.to(DEVICE), offset.to(DEVICE), latents)
    actual = latents.cpu()
    operator = kernels.finish_flat(*vars(before.on("cpu")).values(), scale, offset, dtype)
    assert operator.dtype == dtype and torch.equal(operator, expected)
    check(before, (expected, on_cpu.u_pool), (actual, on_device.u_pool.cpu()))
    channel = torch.arange(elements) // (elements // numbers)
    truth = means(before)[:, 0] * scale.double()[channel] + offset.double()[channel]
    assert_as_exact(actual, expected, truth)


def test_finish_flat_is_finish_where_patches_move_nothing() -> None:
    """One latent channel of 1x1 patches lies in the order of its tokens: the same bits on either path."""
    layout, size = layout_of(1, 1, 1), (5, 67)
    affine = [table.to(DEVICE) for table in tables(1)]
    results = []
    for launch, patch, shape in ((launch_finish, (1, 1), (1, *size)), (launch_finish_flat, (), (335,))):
        latents = torch.full((4, *shape), NAN, device=DEVICE)
        launch(*vars(tail_of(layout, *size).on(DEVICE)).values(), *patch, *affine, latents)
        results.append(latents.flatten())
    assert torch.equal(*results)


@pytest.mark.parametrize("numbers", [1, 7, 735])
def test_finish_flat_bits_do_not_depend_on_the_tile_or_the_tokens(numbers: int) -> None:
    affine, results = [table.to(DEVICE) for table in tables(numbers)], []
    for token, block in ((1, 2048), (1, 128), (5, 512)):
        t = tail(1, 735).on(DEVICE)
        for name in ("u", "x_pool", "u_pool"):
            setattr(t, name, getattr(t, name).view(-1, token, 735 // token))
        latents = torch.full((4, 735), NAN, device=DEVICE)
        launch_finish_flat(*vars(t).values(), *affine, latents, block=block)
        results.append(latents)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_half_precision_on_the_operator() -> None:
    """Velocities are kept in their dtype, in which they came; what goes to the decoder is rounded once."""
    for dtype in (torch.bfloat16, torch.float16):
        layout = layout_of(2, 2, 8)
        half, single = tail_of(layout, 8, 8), tail_of(layout, 8, 8)
        half.u, half.u_pool = half.u.to(dtype), half.u_pool.to(dtype)
        single.u = half.u.float()
        affine = layout.affine(torch.device("cpu"))
        latents = kernels.finish(*vars(half).values(), 8, 8, 2, 2, *affine, dtype)
        assert latents.dtype == dtype
        assert torch.equal(
            latents, kernels.finish(*vars(single).values(), 8, 8, 2, 2, *affine, torch.float32).to(dtype)
        )
        assert torch.equal(half.u_pool[half.slot[:3]], half.u[:3])


def test_no_rows() -> None:
    """A batch of padding alone writes nothing and gives zeros; an empty one gives nothing."""
    scale, offset = tables(4)
    padding, none = (tail(8, 4) for _ in range(2))
    padding.slot = torch.full((4,), -1)
    for name in ("u", "slot", "coefficients"):
        setattr(none, name, getattr(none, name)[:0])
    for t, rows in ((padding, 4), (none, 0)):
        found = (
            kernels.finish(*vars(t).values(), 2, 4, 1, 1, scale, offset, torch.float32).flatten(1),
            kernels.finish_flat(*vars(t).values(), scale, offset, torch.float32),
        )
        for latents in found:
            assert latents.shape == (rows, 32) and not latents.any()
        assert t.u_pool.isnan().all()


def test_opcheck() -> None:
    layout = layout_of(2, 4, 2)
    t = Tail(**{name: value.nan_to_num(0.5) for name, value in vars(tail_of(layout, 4, 4)).items()})
    for numbers in (2, 16):
        rest = (4, 4, 2, 4, *tables(numbers), torch.float32)
        torch.library.opcheck(torch.ops.rollflow.finish.default, (*vars(t).values(), *rest))
        rest = (*tables(numbers), torch.bfloat16)
        torch.library.opcheck(torch.ops.rollflow.finish_flat.default, (*vars(t).values(), *rest))


def test_errors_say_what_was_given() -> None:
    finish, flat = (inspect.unwrap(f) for f in (kernels.finish, kernels.finish_flat))
    layout = layout_of(2, 2, 2)
    sizes = {"height": 4, "width": 6, "patch_y": 2, "patch_x": 2, "dtype": torch.float32}
    affine = dict(zip(("inverse_scaling", "shift"), layout.affine(torch.device("cpu")), strict=True))
    good = vars(tail_of(layout, 4, 6)) | sizes | affine
    for change, message in (
        ({"height": 3, "width": 8}, "height 3 and width 8 with 6 tokens; expected 6 patches of 2x2 latent pixels"),
        ({"height": 4, "width": 8}, "height 4 and width 8 with 6 tokens"),
        ({"height": -4, "width": -6}, "height -4 and width -6"),
        (
            {"x_pool": torch.zeros(6, 6, 6), "u_pool": torch.zeros(6, 6, 6)},
            "6 channels; a token is a 2x2 patch: .* of 4",
        ),
        ({"u": good["u"][:, :5]}, r"u has shape \(4, 5, 8\); expected \(4, 6, 8\)"),
        ({"patch_x": 3}, "a patch of 2x3; allowed sides: 1, 2, 4, 8"),
        ({"patch_y": 1}, "height 4 and width 6 with 6 tokens; expected 6 patches of 1x2"),
        ({"shift": torch.zeros(8)}, r"shift has shape \(8,\); expected \(2,\)"),
        ({"inverse_scaling": torch.ones(8)}, r"shift has shape \(2,\); expected \(8,\)"),
        ({"inverse_scaling": torch.ones(4)}, r"inverse_scaling has shape \(4,\); expected \(2,\)"),
        (
            {"inverse_scaling": torch.ones(2).double()},
            "inverse_scaling has dtype torch.float64; allowed: torch.float32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            finish(**(good | change))
    good = vars(tail(6, 8)) | dict(zip(("scale", "offset"), tables(8), strict=True)) | {"dtype": torch.float32}
    for change, message in (
        ({"u": good["u"][:3]}, r"u has shape \(3, 6, 8\); expected \(4, 6, 8\)"),
        ({"scale": torch.ones(5)}, "scale has 5 numbers; expected a divisor of 48 elements"),
        ({"scale": torch.ones(0)}, "scale has 0 numbers"),
        ({"scale": torch.ones(8, 1)}, r"scale has shape \(8, 1\); expected \(8,\)"),
        ({"offset": torch.ones(1)}, r"offset has shape \(1,\); expected \(8,\)"),
        ({"offset": torch.ones(8).half()}, "offset has dtype torch.float16; allowed: torch.float32"),
        ({"dtype": torch.float64}, "dtype is torch.float64; allowed: torch.float32, torch.bfloat16, torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            flat(**(good | change))
