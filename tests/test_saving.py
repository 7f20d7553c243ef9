"""Images and clips in files: the format follows the suffix, and what cannot be written is an error of one line."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

from rollflow import saving
from rollflow.errors import RequestError

COLOURS = ((220, 30, 30), (30, 160, 40), (40, 60, 200), (240, 200, 20), (20, 20, 20))
FRAMES = [Image.new("RGB", (33, 17), colour) for colour in COLOURS]


def saved(path, frames=FRAMES, **options):
    assert saving.save(frames, frames[len(frames) // 2], path, **options) == path
    return Image.open(path)


def colours(image):
    """The colour in the middle of each frame."""
    found = []
    for i in range(getattr(image, "n_frames", 1)):
        image.seek(i)
        found.append(image.convert("RGB").getpixel((16, 8)))
    return found


@pytest.mark.parametrize(("suffix", "tolerance"), [("gif", 8), ("webp", 12), ("apng", 0)])
def test_a_clip_moves(tmp_path, suffix, tolerance):
    image = saved(tmp_path / f"clip.{suffix}", fps=10)
    assert image.n_frames == len(FRAMES) and image.size == (33, 17) and image.info.get("loop") == 0
    np.testing.assert_allclose(colours(image), COLOURS, atol=tolerance)
    image.seek(1)
    image.load()
    assert image.info["duration"] == 100  # milliseconds


@pytest.mark.parametrize("suffix", ["png", "bmp", "PNG"])
def test_a_format_of_still_images_has_the_middle_frame(tmp_path, suffix):
    assert colours(saved(tmp_path / f"clip.{suffix}")) == [COLOURS[2]]


@pytest.mark.parametrize("suffix", ["png", "gif", "webp"])
def test_an_image_is_one_frame(tmp_path, suffix):
    assert getattr(saved(tmp_path / f"image.{suffix}", FRAMES[:1]), "n_frames", 1) == 1


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("clip.avi", {}, ["clip.avi", ".gif", ".mp4"]),
        ("clip", {}, ["clip", ".png"]),
        ("nowhere/clip.gif", {}, ["nowhere/clip.gif", "No such file"]),
        ("clip.gif", {"fps": 0}, ["fps=0", "above 0"]),
    ],
)
def test_what_cannot_be_written(tmp_path, name, options, parts):
    with pytest.raises(RequestError) as caught:
        saving.save(FRAMES, FRAMES[0], tmp_path / name, **options)
    assert all(part in str(caught.value) for part in parts)


def test_without_the_packages_an_mp4_is_refused_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(saving, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"takes imageio and imageio-ffmpeg .* or choose .gif"):
        saving.check(tmp_path / "clip.mp4")
    saving.check(tmp_path / "clip.gif")


@pytest.mark.skipif(
    not (importlib.util.find_spec("imageio") and importlib.util.find_spec("imageio_ffmpeg")),
    reason="needs imageio and imageio-ffmpeg",
)
def test_an_mp4_has_every_frame_and_even_sides(tmp_path):
    import imageio

    path = tmp_path / "clip.mp4"
    saving.save(FRAMES, FRAMES[2], path, fps=5)
    with imageio.get_reader(path) as reader:
        frames, fps = [*reader.iter_data()], reader.get_meta_data()["fps"]
    assert len(frames) == len(FRAMES) and frames[0].shape == (18, 34, 3) and fps == 5
    np.testing.assert_allclose([frame[8, 16] for frame in frames], COLOURS, atol=20)
    with pytest.raises(RequestError, match="there is no folder"):
        saving.save(FRAMES, FRAMES[2], tmp_path / "nowhere" / "clip.mp4")
