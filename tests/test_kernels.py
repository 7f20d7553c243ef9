"""`propose` and `finish`: the Triton kernels (interpreted where there is no GPU) against torch, and the operators."""

import inspect
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from rollflow import kernels
from rollflow.kernels import reference
from rollflow.kernels.finish import launch_finish
from rollflow.kernels.propose import launch_propose
from rollflow.models.layout import Layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = math.nan


@dataclass
class Step:
    """Arguments of `propose`, one row of every kind; slots that no row may read hold NaN."""

    x_pool: Tensor
    u_pool: Tensor
    parent: Tensor
    child: Tensor
    coefficients: Tensor
    seed: Tensor
    key: Tensor

    def on(self, device: str) -> "Step":
        return Step(**{name: value.to(device, copy=True) for name, value in vars(self).items()})

    def take(self, rows: list[int]) -> "Step":
        kept = {name: getattr(self, name)[rows] for name in ("parent", "child", "coefficients", "seed", "key")}
        return Step(self.x_pool.clone(), self.u_pool.clone(), **kept)

    def reference(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return reference.propose(**vars(self), dtype=dtype)

    def triton(self, dtype: torch.dtype = torch.float32, **options: int) -> Tensor:
        shape = (len(self.parent), *self.x_pool.shape[1:])
        model_input = torch.full(shape, NAN, dtype=dtype, device=self.x_pool.device)
        launch_propose(**vars(self), model_input=model_input, **options)
        return model_input


ROWS = (  # parent, child, (a, b, k, inverse scale)
    (0, 5, (0.9, -0.1, 0.3, 1.25)),  # a stochastic step
    (0, 6, (0.8, 0.2, 0.4, 1.0)),  # another child of the same parent
    (1, 7, (1.0, -0.05, 0.0, 0.5)),  # a deterministic step: no noise
    (2, 8, (0.7, 0.0, 0.6, 1.0)),  # no velocity yet (slot 2 of u is NaN): explicit latents
    (-1, 9, (0.3, 0.4, 1.0, 1.0)),  # a sample of the prior: a and b have nothing to multiply
    (3, 3, (0.5, 0.5, 0.1, 2.0)),  # in place
    (-1, -1, (NAN, NAN, NAN, NAN)),  # padding
    (0, -1, (1.0, 1.0, 1.0, 1.0)),  # padding with left-over arguments
    (4, 10, (0.0, 1.0, 0.0, 1.0)),  # no state (slot 4 of x is NaN)
)
WRITTEN = [5, 6, 7, 8, 9, 3, 10]


def step(token: int, channel: int) -> Step:
    generator = torch.Generator().manual_seed(token * 1000 + channel)
    x_pool, u_pool = torch.randn(2, 12, token, channel, generator=generator).unbind(0)
    x_pool, u_pool = x_pool.contiguous(), u_pool.contiguous()
    x_pool[4:] = u_pool[5:] = NAN
    u_pool[2] = NAN
    rows = len(ROWS)
    return Step(
        x_pool,
        u_pool,
        parent=torch.tensor([row[0] for row in ROWS]),
        child=torch.tensor([row[1] for row in ROWS]),
        coefficients=torch.tensor([row[2] for row in ROWS]),
        seed=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        key=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
    )


@pytest.mark.parametrize(("token", "channel"), [(16, 32), (1, 1), (1, 3), (3, 5), (7, 147), (1, 2049)])
def test_propose_equals_reference(token: int, channel: int) -> None:
    """Every kind of row, with every slot that must not be read poisoned, and each error measured against float64."""
    on_cpu = step(token, channel)
    before = on_cpu.on("cpu")
    on_device = on_cpu.on(DEVICE)
    expected, actual = on_cpu.reference(), on_device.triton().cpu()
    x_pool = on_device.x_pool.cpu()

    assert actual.isfinite().all() and expected.isfinite().all()
    for padding in (6, 7):
        assert not actual[padding].any() and not expected[padding].any()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(x_pool[WRITTEN], on_cpu.x_pool[WRITTEN], rtol=1e-6, atol=4e-6)
    untouched = [slot for slot in range(12) if slot not in WRITTEN]
    for pool in (x_pool, on_cpu.x_pool):
        torch.testing.assert_close(pool[untouched], before.x_pool[untouched], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(on_device.u_pool.cpu(), before.u_pool, rtol=0, atol=0, equal_nan=True)

    z = reference.noise(before.seed, before.key, token, channel).double()
    for row, (parent, child, coefficients) in enumerate(ROWS):
        if child < 0:
            continue
        a, b, k, inverse_scale = (float(torch.tensor(c)) for c in coefficients)
        truth = k * z[row] if k else torch.zeros_like(z[row])
        if parent >= 0:
            truth = truth + (a * before.x_pool[parent].double() if a else 0)
            truth = truth + (b * before.u_pool[parent].double() if b else 0)
        for got, want in ((x_pool[child], truth), (actual[row], truth * inverse_scale)):
            ours = (got - want).abs().max()
            theirs = ((on_cpu.x_pool[child] if want is truth else expected[row]) - want).abs().max()
            assert ours <= 2 * theirs + 2e-6  # the floor: a few roundings of a noise of length up to 6.8


def test_propose_bits_do_not_depend_on_rows_or_blocks() -> None:
    whole = step(5, 147).on(DEVICE)
    expected = whole.triton()
    for block in (128, 512):
        again = step(5, 147).on(DEVICE)
        assert torch.equal(again.triton(block=block), expected)
        assert torch.equal(again.x_pool[WRITTEN], whole.x_pool[WRITTEN])
    for order in ([8, 3, 7, 0, 6, 2, 5, 1, 4], [0], [4], [5]):
        some = step(5, 147).take(order).on(DEVICE)
        assert torch.equal(some.triton(), expected[order])


def test_propose_noise_is_the_noise_operator() -> None:
    """A row of the prior is `k z`, bit for bit, on either path."""
    pool = torch.full((1, 4, 33), NAN)
    none, seed, key = torch.tensor([-1]), torch.tensor([11]), torch.tensor([12])
    prior = Step(pool, pool.clone(), none, torch.tensor([0]), torch.tensor([[NAN, NAN, 1.0, 1.0]]), seed, key)
    assert torch.equal(prior.on("cpu").reference(), kernels.noise(seed, key, 4, 33))
    noise = kernels.noise(seed.to(DEVICE), key.to(DEVICE), 4, 33)
    torch.testing.assert_close(prior.on(DEVICE).triton(), noise, rtol=0, atol=4e-6)


@dataclass
class Tail:
    """Arguments of `finish`: three particles and a padding row."""

    u: Tensor
    x_pool: Tensor
    u_pool: Tensor
    slot: Tensor
    coefficients: Tensor

    def on(self, device: str) -> "Tail":
        return Tail(**{name: value.to(device, copy=True) for name, value in vars(self).items()})


def tail(layout: Layout, height: int, width: int) -> Tail:
    generator = torch.Generator().manual_seed(layout.token_channels * height * width)
    token, channel = layout.tokens(height, width), layout.token_channels
    u = torch.randn(4, token, channel, generator=generator)
    u[3] = NAN
    x_pool = torch.full((6, token, channel), NAN)
    slot = torch.tensor([4, 0, 3, -1])
    x_pool[slot[:3]] = torch.randn(3, token, channel, generator=generator)
    coefficients = torch.tensor([[1.0, -0.9], [1.2, -0.5], [0.8, 0.1], [NAN, NAN]])
    return Tail(u, x_pool, torch.full_like(x_pool, NAN), slot, coefficients)


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
    on_cpu = tail(layout, height, width)
    before, on_device = on_cpu.on("cpu"), on_cpu.on(DEVICE)
    inverse_scaling, shift = layout.affine(torch.device("cpu"))
    arguments = (height, width, *patch, inverse_scaling, shift, torch.float32)
    expected = reference.finish(*vars(on_cpu).values(), *arguments)
    latents = torch.full((4, channels, height, width), NAN, device=DEVICE)
    launch_finish(*vars(on_device).values(), *patch, *layout.affine(torch.device(DEVICE)), latents)
    actual = latents.cpu()
    operator = kernels.finish(*vars(before.on("cpu")).values(), *arguments)
    assert torch.equal(operator, expected)

    for got, u_pool in ((expected, on_cpu.u_pool), (actual, on_device.u_pool.cpu())):
        assert not got[3].any()
        assert torch.equal(u_pool[before.slot[:3]], before.u[:3])
        assert u_pool[[1, 2, 5]].isnan().all()
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=4e-6)

    p, q = before.coefficients[:3].double().unbind(1)
    truth = p[:, None, None] * before.x_pool[before.slot[:3]].double() + q[:, None, None] * before.u[:3].double()
    if patch == (2, 2):
        truth = FluxPipeline._unpack_latents(truth, height * 8, width * 8, vae_scale_factor=8)
    else:
        truth = layout.unpack(truth, height, width)
    scale, offset = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (layout.scaling, layout.shift))
    truth = truth / scale + offset
    theirs = (expected[:3] - truth).abs().max()
    assert theirs < 4e-6
    assert (actual[:3] - truth).abs().max() <= 2 * theirs + 2**-23


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
    layout = layout_of(*patch, 16)
    on_device = tail(layout, 4, 68).on(DEVICE)
    results = []
    for pixels in (32, 64, 128):
        latents = torch.full((4, 16, 4, 68), NAN, device=DEVICE)
        affine = layout.affine(torch.device(DEVICE))
        launch_finish(*vars(on_device).values(), *patch, *affine, latents, pixels=pixels)
        results.append(latents)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_half_precision_on_the_operators() -> None:
    """The state stays float32; only what goes to the model and the decoder is rounded, once."""
    for dtype in (torch.bfloat16, torch.float16):
        half, single = step(16, 32), step(16, 32)
        model_input = kernels.propose(**vars(half), dtype=dtype)
        assert model_input.dtype == dtype
        assert torch.equal(model_input, kernels.propose(**vars(single), dtype=torch.float32).to(dtype))
        assert torch.equal(half.x_pool[WRITTEN], single.x_pool[WRITTEN])
        layout = layout_of(2, 2, 8)
        t = tail(layout, 8, 8)
        t.u = t.u.to(dtype)
        latents = kernels.finish(*vars(t).values(), 8, 8, 2, 2, *layout.affine(torch.device("cpu")), dtype)
        assert latents.dtype == dtype
        assert torch.equal(t.u_pool[t.slot[:3]], t.u[:3].float())


def test_no_rows() -> None:
    empty = step(4, 8).take([])
    before = empty.x_pool.clone()
    assert empty.reference().shape == (0, 4, 8)
    torch.testing.assert_close(empty.x_pool, before, equal_nan=True)
    none = torch.zeros(0, dtype=torch.int64)
    assert kernels.noise(none, none, 4, 8).shape == (0, 4, 8)


def finite_step() -> Step:
    clean = step(4, 8)
    return Step(**{name: value.nan_to_num(0.5) for name, value in vars(clean).items()})


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.rollflow.noise.default, (torch.arange(3), torch.arange(3), 4, 8))
    torch.library.opcheck(torch.ops.rollflow.propose.default, (*vars(finite_step()).values(), torch.bfloat16))
    layout = layout_of(2, 4, 2)
    t = Tail(**{name: value.nan_to_num(0.5) for name, value in vars(tail(layout, 4, 4)).items()})
    rest = (4, 4, 2, 4, *layout.affine(torch.device("cpu")), torch.float32)
    torch.library.opcheck(torch.ops.rollflow.finish.default, (*vars(t).values(), *rest))


COMPILE = """
import torch
from rollflow import kernels

def backend(graph, inputs):
    print(*(node.target for node in graph.graph.nodes if node.op == "call_function"))
    return graph

def propose(x_pool, u_pool, parent, child, coefficients):
    return kernels.propose(x_pool, u_pool, parent, child, coefficients, parent, child, torch.float32)

def arguments():
    x_pool, u_pool = torch.arange(2 * 6 * 4 * 8, dtype=torch.float32).view(2, 6, 4, 8).clone()
    return x_pool, u_pool, torch.tensor([0, -1, 2]), torch.tensor([3, 4, 5]), torch.full((3, 4), 0.5)

eager = arguments()
expected = propose(*eager)
for compiler in (backend, "aot_eager"):
    torch._dynamo.reset()
    compiled = arguments()
    actual = torch.compile(propose, fullgraph=True, backend=compiler)(*compiled)
    assert torch.equal(actual, expected) and torch.equal(compiled[0], eager[0])
"""


def test_compile_sees_one_operator() -> None:
    """In a process of its own: the test run's annotation checks are no part of what users compile."""
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["rollflow.propose"]


def test_errors_say_what_was_given() -> None:
    noise, propose, finish = (inspect.unwrap(f) for f in (kernels.noise, kernels.propose, kernels.finish))
    index = torch.arange(3)
    for arguments, message in (
        ((index, index[:2], 4, 8), r"key has shape \(2,\); expected \(3,\)"),
        ((index.int(), index, 4, 8), "seed has dtype torch.int32; allowed: torch.int64"),
        ((index, index, 0, 8), "a row of 0 tokens x 8 channels"),
        ((index, index, 2**20, 2**11), "a row of 1048576 tokens x 2048 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            noise(*arguments)
    good = vars(step(4, 8))
    for change, message in (
        ({"x_pool": good["x_pool"].double()}, "x_pool has dtype torch.float64; allowed: torch.float32"),
        ({"x_pool": good["x_pool"][0]}, r"x_pool has shape \(4, 8\); expected \(slot, token, channel\)"),
        ({"u_pool": good["u_pool"][:3]}, r"u_pool has shape \(3, 4, 8\); expected \(12, 4, 8\)"),
        ({"u_pool": good["u_pool"].mT.contiguous().mT}, "u_pool has strides .* contiguous"),
        ({"child": good["child"].to("meta")}, "child is on meta; expected cpu"),
        ({"coefficients": good["coefficients"][:, :3]}, r"coefficients has shape \(9, 3\); expected \(9, 4\)"),
        ({"dtype": torch.float64}, "dtype is torch.float64; allowed: torch.float32, torch.bfloat16, torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            propose(**({"dtype": torch.float32} | good | change))
    layout = layout_of(2, 2, 2)
    sizes = {"height": 4, "width": 6, "patch_y": 2, "patch_x": 2, "dtype": torch.float32}
    affine = dict(zip(("inverse_scaling", "shift"), layout.affine(torch.device("cpu")), strict=True))
    good = vars(tail(layout, 4, 6)) | sizes | affine
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
        (
            {"inverse_scaling": torch.ones(2).double()},
            "inverse_scaling has dtype torch.float64; allowed: torch.float32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            finish(**(good | change))
