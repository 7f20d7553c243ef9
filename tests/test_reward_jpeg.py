"""The rewards `jpeg` and `movement`, and how a reward of images judges a clip."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rollflow import RequestError, rewards

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(64, 64), (33, 50), (40, 160)]


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def rough(rows, height, width):
    """Images from smooth to noise."""
    ramp = torch.linspace(0, 1, width).expand(rows, 3, height, width)
    share = torch.linspace(0, 1, rows).view(rows, 1, 1, 1)
    return (1 - share) * ramp + share * noise(rows, 3, height, width)


def kilobytes(image, quality=95):
    file = io.BytesIO()
    Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "JPEG", quality=quality)
    return len(file.getvalue()) / 1000


# jpeg.


@pytest.mark.parametrize("size", SIZES)
def test_jpeg_is_minus_the_size_of_the_file(size):
    images = rough(4, *size)
    scores = rewards.make("jpeg")(images, ["a", "b", "c", "d"])
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([-kilobytes(image) for image in images])
    assert (scores.diff() < 0).all()  # the rougher, the larger
    alone = [rewards.make("jpeg")(image[None], ["a"]).item() for image in images]
    assert scores.tolist() == alone


def test_the_sign_and_the_quality_of_jpeg():
    images = rough(2, 48, 48)
    large = rewards.make("jpeg:quality=50,sign=-1")(images, ["a", "a"])
    assert large.tolist() == pytest.approx([kilobytes(image, 50) for image in images])
    assert torch.equal(rewards.make("jpeg:sign=-1")(images, ["a"] * 2), -rewards.make("jpeg")(images, ["a"] * 2))
    assert not rewards.differentiable(rewards.make("jpeg")) and rewards.concurrent(rewards.make("jpeg"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_jpeg_takes_any_dtype_and_what_lies_outside_of_the_range(dtype):
    images = rough(2, 32, 32).to(dtype) * 1.5 - 0.2
    expected = [-kilobytes(image) for image in images.float().clamp(0, 1)]
    assert rewards.make("jpeg")(images, ["a", "a"]).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("jpeg:quality=0", ["quality=0", "1 to 100"]),
        ("jpeg:sign=2", ["sign=2", "-1"]),
        ("jpeg:frames=some", ["'some'", "ends"]),
        ("movement:grid=0", ["grid=0"]),
    ],
)
def test_options_that_cannot_be(spec, parts):
    with pytest.raises(RequestError) as caught:
        rewards.make(spec)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts)


# A clip is judged by its frames.


@pytest.mark.parametrize(
    ("frames", "of"),
    [
        ("mean", lambda each: each.mean(1)),
        ("min", lambda each: each.amin(1)),
        ("first", lambda each: each[:, 0]),
        ("last", lambda each: each[:, -1]),
        ("ends", lambda each: (each[:, 0] + each[:, -1]) / 2),
    ],
)
def test_the_frames_of_a_clip(frames, of):
    clips = rough(10, 24, 40)[torch.randperm(10, generator=torch.Generator().manual_seed(1))].view(2, 5, 3, 24, 40)
    each = rewards.make("jpeg")(clips.flatten(0, 1), ["a"] * 10).view(2, 5)
    scores = rewards.make(f"jpeg:frames={frames}")(clips, ["a", "b"])
    torch.testing.assert_close(scores, of(each))
    assert len({*each.flatten().tolist()}) == 10  # or it would not matter which


# movement.


def moving(step, frames=6, size=64):
    """A soft blob that goes to the right by `step` pixels a frame."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    shots = [torch.exp(-((x - 10 - step * f) ** 2 + (y - 32) ** 2) / 60) for f in range(frames)]
    return torch.stack(shots)[:, None].expand(-1, 3, -1, -1)


def test_movement_is_the_mean_change_of_low_passed_luma():
    clips = noise(3, 4, 3, 64, 96)
    luma = (clips * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(2)
    cells = luma.view(3, 4, 32, 2, 48, 2).mean((3, 5))
    scores = rewards.make("movement")(clips, ["a", "b", "c"])
    torch.testing.assert_close(scores, cells.diff(dim=1).abs().mean((1, 2, 3)))
    alone = torch.cat([rewards.make("movement")(clip[None], ["a"]) for clip in clips])
    torch.testing.assert_close(scores, alone)


def test_movement_grows_with_speed_and_ignores_grain():
    score = rewards.make("movement")
    frozen, slow, fast = (score(moving(step)[None], ["a"]).item() for step in (0, 1, 4))
    assert frozen == 0 < slow < fast < 1
    grain = 0.1 * noise(6, 3, 256, 256)
    pixels = grain.mean(1).diff(dim=0).abs().mean()
    assert score(grain[None], ["a"]).item() < pixels / 5
    flicker = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1, 1).expand(1, 3, 3, 50, 70)
    assert score(flicker, ["a"]).item() == pytest.approx(1)


def test_movement_is_about_the_same_at_every_size():
    small = moving(3)[None]
    large = torch.nn.functional.interpolate(small[0], scale_factor=3.5, mode="bilinear")[None]
    score = rewards.make("movement")
    assert score(large, ["a"]).item() == pytest.approx(score(small, ["a"]).item(), rel=0.05)


@pytest.mark.parametrize("size", [(40, 70), (16, 16)])
def test_the_gradient_of_movement(size):
    clip = noise(1, 3, 3, *size).double().requires_grad_()
    score = rewards.make("movement")
    assert rewards.differentiable(score)
    (gradient,) = torch.autograd.grad(score(clip, ["a"]).sum(), clip)
    for place in [(0, 0, 0, 3, 4), (0, 1, 1, 7, 15), (0, 2, 2, 15, 0), (0, 2, 1, 8, 8)]:
        shift = torch.zeros_like(clip)
        shift[place] = 1e-6
        with torch.no_grad():
            slope = (score(clip + shift, ["a"]) - score(clip - shift, ["a"])) / 2e-6
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-9)
    assert (gradient != 0).float().mean() > 0.3  # of a frame between others it may be 0


@pytest.mark.parametrize(("shape", "what"), [((2, 3, 8, 8), "images"), ((2, 1, 3, 8, 8), "clips of one frame")])
def test_movement_refuses_what_cannot_move(shape, what):
    with pytest.raises(RequestError, match=f"these are {what}") as caught:
        rewards.make("movement")(noise(*shape), ["a", "b"])
    assert "\n" not in str(caught.value)


def test_both_in_one_expression():
    clips = noise(2, 3, 3, 32, 32)
    prompts = ["a", "b"]
    both = rewards.make("0.01*jpeg:frames=min + min(movement, 0.05)")(clips, prompts)
    small, moves = rewards.make("jpeg:frames=min")(clips, prompts), rewards.make("movement")(clips, prompts)
    assert (moves > 0.05).all()
    np.testing.assert_allclose(both, 0.01 * small + 0.05, rtol=1e-6)
