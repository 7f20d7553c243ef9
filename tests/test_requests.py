"""Frames of a clip as what a search starts from, and results as they are shown."""

import jaxtyping
import pytest
import torch
from PIL import Image

from rollflow import Request, RequestError, Result, checks

FRAMES = [Image.new("RGB", (6, 4), (60 * i, 0, 255)) for i in range(3)]


def result(pixels, **changes):
    image = Image.new("RGB", (pixels.shape[-1], pixels.shape[-2]))
    given = {"reward": -0.123456, "held_out": None, "committed_nfe": 40, "executed_nfe": 48, "invalid_rewards": 0}
    return Result(image, pixels, history=[], seconds=1.0, request=Request("two red circles"), **{**given, **changes})


@pytest.mark.parametrize("kind", [list, tuple])
def test_frames_are_a_clip(kind):
    asked = Request("a cat", image=kind(FRAMES))
    assert isinstance(asked.image, torch.Tensor) and asked.image.shape == (3, 3, 4, 6)
    torch.testing.assert_close(asked.image[:, :, 0, 0], torch.tensor([[60.0 * i, 0, 255] for i in range(3)]) / 255)
    assert torch.equal(checks.request(asked).image, asked.image)


def test_frames_of_a_result_are_where_the_next_search_starts():
    clip = torch.rand(3, 3, 4, 6)
    torch.testing.assert_close(Request("a cat", image=result(clip).frames).image, clip, atol=0.5 / 255 + 1e-6, rtol=0)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ([FRAMES[0], Image.new("RGB", (6, 6))], "a list of images of 6x4 pixels and images of 6x6 pixels"),
        ([FRAMES[0], "x.png"], "a list of images of 6x4 pixels and strs"),
        ((1, 2), "a list of ints"),
        ([], "a list of nothing"),
    ],
)
def test_a_list_that_is_no_clip_is_told_what_it_holds(image, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as a caller would do it
    with pytest.raises(RequestError) as caught:
        checks.request(Request("a cat", image=image))
    assert str(caught.value) == f"image={said}: the frames of a clip must be PIL images of one size"


def test_a_frame_that_cannot_be_read_is_told(tmp_path):
    path = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with Image.open(path) as cut, pytest.raises(RequestError, match=r"^image=.*: it cannot be read"):
        Request("a cat", image=[cut])


def test_a_mask_is_one_image(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(RequestError, match="mask=a list of images of 6x4 pixels: it must be one image"):
        checks.request(Request("a cat", image=FRAMES[0], mask=FRAMES))


def test_a_result_is_shown_in_a_line():
    assert repr(result(torch.rand(3, 4, 6))) == (
        "Result(prompt='two red circles', reward=-0.1235, nfe=40, stopped='budget', size=4x6)"
    )
    shown = repr(result(torch.rand(9, 3, 4, 6), reward=float("nan"), stopped="seconds"))
    assert shown == "Result(prompt='two red circles', reward=nan, nfe=40, stopped='seconds', size=4x6, frames=9)"
