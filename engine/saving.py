"""Writes images and clips to files, in the format that a suffix says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from rollflow.errors import RequestError, said, shown

MOVING = (".gif", ".webp", ".apng")  # formats of Pillow's that move


def save(frames: Sequence[Image.Image], still: Image.Image, path: Path, fps: int) -> Path:
    """See `rollflow.Result.save`."""
    suffix, clip = path.suffix.lower(), len(frames) > 1
    if suffix == ".mp4":
        _video(frames, path, fps)
        return path
    if suffix not in Image.registered_extensions():
        raise RequestError(
            f"path={shown(str(path))}: its suffix must be that of an image (.png, .jpg, .webp), or of a clip (.gif, "
            ".webp, .mp4)"
        )
    try:
        if clip and suffix in MOVING:
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
        else:
            still.save(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"path={shown(str(path))}: it cannot be written ({said(error)})") from error
    return path


def _video(frames: Sequence[Image.Image], path: Path, fps: int) -> None:
    from diffusers.utils import export_to_video

    if not path.parent.is_dir():
        raise RequestError(f"path={shown(str(path))}: there is no folder {shown(str(path.parent))}")
    try:
        export_to_video([*frames], str(path), fps=fps)
    except ImportError as error:
        raise RequestError(
            f"path={shown(str(path))}: an .mp4 takes imageio and imageio-ffmpeg (pip install imageio imageio-ffmpeg); "
            "or choose .gif"
        ) from error
