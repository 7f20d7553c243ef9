"""`propose`: the Triton kernel (interpreted where there is no GPU) against torch, and what holds for all operators."""

import inspect
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rollflow import kernels
from rollflow.kernels import reference
from rollflow.kernels.propose import launch_propose

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


def test_half_precision_on_the_operator() -> None:
    """The state stays float32; only what goes to the model is rounded, once."""
    for dtype in (torch.bfloat16, torch.float16):
        half, single = step(16, 32), step(16, 32)
        model_input = kernels.propose(**vars(half), dtype=dtype)
        assert model_input.dtype == dtype
        assert torch.equal(model_input, kernels.propose(**vars(single), dtype=torch.float32).to(dtype))
        assert torch.equal(half.x_pool[WRITTEN], single.x_pool[WRITTEN])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocities_are_read_in_the_dtype_that_they_are_kept_in(dtype: torch.dtype) -> None:
    """The step is one in float32, of velocities as they are: nothing is rounded on the way, on either path."""
    half, single = step(3, 8), step(3, 8)
    half.u_pool = half.u_pool.to(dtype)
    single.u_pool = half.u_pool.float()
    on_device = half.on(DEVICE)
    expected = single.reference()
    assert torch.equal(half.reference(), expected) and torch.equal(half.x_pool[WRITTEN], single.x_pool[WRITTEN])
    torch.testing.assert_close(on_device.triton().cpu(), expected, rtol=1e-6, atol=4e-6)


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
    noise, propose = (inspect.unwrap(f) for f in (kernels.noise, kernels.propose))
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
