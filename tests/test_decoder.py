"""Decoders in graphs, where launches cost more than kernels, and their normalisations on our kernels."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rollflow.device.cuda_graphs import Captured
from rollflow.device.decoder import GRAPHED_PIXELS, Decoder
from rollflow.models import norms
from rollflow.models.norms import LEAST, FusedNorms, fused


class Capture:
    """Runs a function again at a replay; until then its output is poison."""

    def __init__(self, fails: bool = False) -> None:
        self.rows: list[int] = []
        self.replays, self.fails = 0, fails

    def __call__(self, function: Callable[[], Tensor], pool: object) -> Captured:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        output = function()
        self.rows.append(len(output))
        output.fill_(math.nan)

        def replay() -> None:
            self.replays += 1
            output.copy_(function())

        return Captured(replay, output, pool or object(), output.nbytes)


def of(pixels: int) -> Decoder:
    return Decoder(torch.tanh, torch.sigmoid, pixels)


def latents(rows: int) -> Tensor:
    return torch.randn(rows, 4, 2, 2, generator=torch.Generator().manual_seed(rows))


def batches(*sizes: int) -> dict[int, Tensor]:
    return {size: latents(size) for size in sizes}


def test_small_batches_are_captured_and_large_ones_are_not() -> None:
    capture, decoder = Capture(), of(pixels=GRAPHED_PIXELS // 4)
    decoder.record(False, batches(1, 2, 4, 8), capture)
    assert capture.rows == [4, 2, 1]  # the largest first
    assert decoder.total > 0
    with torch.no_grad():
        for rows in (1, 2, 4, 8):
            before, other = capture.replays, latents(rows) + 1  # not what was captured with
            assert torch.equal(decoder(other, False), other.tanh())
            assert capture.replays - before == (rows < 8)
            assert torch.equal(decoder(other, True), other.sigmoid())  # of which nothing was captured


def test_an_image_is_the_callers_to_keep() -> None:
    decoder = of(pixels=1)
    decoder.record(True, batches(2), Capture())
    with torch.no_grad():
        first = decoder(latents(2), True)
        kept = first.clone()
        decoder(latents(2) + 3, True)
    assert torch.equal(first, kept)


def test_gradients_flow_through_the_decoder_itself() -> None:
    capture, decoder = Capture(), of(pixels=1)
    decoder.record(False, batches(2), capture)
    z = latents(2).requires_grad_()
    decoder(z, False).sum().backward()
    assert capture.replays == 0 and z.grad is not None and z.grad.abs().min() > 0


def test_a_decoder_that_cannot_be_captured_runs_all_the_same() -> None:
    decoder = of(pixels=1)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: .*cannot be captured"):
        decoder.record(False, batches(2), Capture(fails=True))
    with torch.no_grad():
        assert torch.equal(decoder(latents(2), False), latents(2).tanh())


def block() -> ResnetBlock2D:
    torch.manual_seed(0)
    made = ResnetBlock2D(in_channels=16, out_channels=16, temb_channels=None, groups=4).eval()
    return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a SiLU was in it, of each launch of ours."""
    from rollflow.kernels import group_norm

    found, launch = [], group_norm.launch_group_norm

    def counted(*args: Any) -> None:
        found.append(args[5])
        launch(*args)

    monkeypatch.setattr(group_norm, "launch_group_norm", counted)
    monkeypatch.setattr(norms, "LEAST", 0)
    return found


@torch.no_grad()
def test_a_block_of_a_decoder_runs_on_our_kernels(launched: list[bool]) -> None:
    """Both normalisations, each with its SiLU; the convolutions between them see channels last."""
    net, x = block(), torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    expected = net(x, None)
    with FusedNorms():
        actual = net(x, None)
    assert launched == [True, True]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_whatever_reads_a_normalisation_finds_it_done(launched: list[bool]) -> None:
    x = torch.randn(1, 16, 4, 4).to(memory_format=torch.channels_last)
    norm, other = nn.GroupNorm(4, 16), torch.randn(4)
    expected = norm(x)
    with FusedNorms():
        y = norm(x)
        total = y.sum()  # no SiLU: launched alone
        gated = F.silu(norm(x))
        twice = F.silu(norm(x)) + F.silu(other)  # a SiLU of something else is one of its own
        last = norm(x)  # nothing follows: launched at the end
    assert launched == [False, True, True, False]
    torch.testing.assert_close(total, expected.sum())
    torch.testing.assert_close(gated, F.silu(expected))
    torch.testing.assert_close(twice, F.silu(expected) + F.silu(other))
    torch.testing.assert_close(last, expected)


@torch.no_grad()
def test_what_our_kernels_do_not_take_runs_as_ever(launched: list[bool]) -> None:
    x = torch.randn(1, 12, 4, 4).to(memory_format=torch.channels_last)
    with FusedNorms():
        y = F.silu(nn.GroupNorm(4, 12)(x))
    assert not launched
    torch.testing.assert_close(y, F.silu(F.group_norm(x, 4)))


@torch.no_grad()
def test_small_images_are_left_to_torch(launched: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "LEAST", LEAST)
    channels, side = 16, math.isqrt(LEAST // 16) // 2  # a quarter of it
    with FusedNorms():
        nn.GroupNorm(4, channels)(torch.randn(1, channels, side, side).to(memory_format=torch.channels_last))
    assert not launched


def test_a_cpu_and_gradients_keep_torchs_own() -> None:
    with torch.no_grad(), fused(torch.device("cpu")) as mode:
        assert mode is None
    with fused(torch.device("cuda")) as mode:
        assert mode is None  # gradients are on
    with torch.no_grad(), fused(torch.device("cuda")) as mode:
        assert isinstance(mode, FusedNorms)
