"""Writes images and clips to files, in the format that a suffix says."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from rollflow.errors import RequestError, said, shown

MOVING = (".gif", ".webp", ".apng")  # formats of Pillow's that move
VIDEO = (".mp4",)
FPS = 16


def check(path: Path) -> None:
    """Raises `RequestError` where no image or clip can be written to a file of this suffix, or not here."""
    suffix = path.suffix.lower()
    if suffix in VIDEO:
        if not (find_spec("imageio") and find_spec("imageio_ffmpeg")):
            raise RequestError(
                f"path={shown(str(path))}: an {suffix} takes imageio and imageio-ffmpeg (pip install imageio "
                "imageio-ffmpeg); or choose .gif"
            )
    elif Image.registered_extensions().get(suffix) not in Image.SAVE:  # the first call fills both
        raise RequestError(
            f"path={shown(str(path))}: its suffix must be that of an image (.png, .jpg, .webp), or of a clip (.gif, "
            ".webp, .mp4)"
        )


def save(frames: Sequence[Image.Image], still: Image.Image, path: Path, fps: float = FPS) -> Path:
    """See `rollflow.Result.save`."""
    check(path)
    suffix, clip = path.suffix.lower(), len(frames) > 1
    if not 0 < fps <= 1000:
        raise RequestError(f"fps={shown(fps)}: frames a second must be above 0 and at most 1000")
    try:
        if suffix in VIDEO:
            _video(frames, path, fps)
        elif clip and suffix in MOVING:
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
        else:
            still.save(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"path={shown(str(path))}: it cannot be written ({said(error)})") from error
    return path


def _video(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """H.264 in the usual colours of players; a side that is odd gets a copy of its last line, which H.264 needs."""
    import imageio
    import numpy as np

    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r}")
    options = {"fps": fps, "codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 1, "quality": 8}
    with imageio.get_writer(str(path), **options) as writer:
        for frame in frames:
            pixels = np.asarray(frame.convert("RGB"))
            height, width = pixels.shape[:2]
            writer.append_data(np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), "edge"))
