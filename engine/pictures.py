"""The files that results travel as."""

from __future__ import annotations

import io
import math
from typing import Any

from PIL import Image, features

from rollflow import methods
from rollflow.request import Result
from rollflow.saving import FPS

COMPRESSION = 1  # zlib's level: a worker's time is for its engine


def png(image: Image.Image) -> bytes:
    """An image as a PNG."""
    file = io.BytesIO()
    image.save(file, "png", compress_level=COMPRESSION)
    return file.getvalue()


def written(result: Result) -> tuple[str, bytes]:
    """A result's format, "png" or of a clip "webp" or "gif", and its file."""
    if result.pixels.ndim == 3:
        return "png", png(result.image)
    kind = "webp" if features.check("webp") else "gif"
    frames, file = result.frames, io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=round(1000 / FPS), loop=0)
    return kind, file.getvalue()


def described(result: Result, kind: str) -> dict[str, Any]:
    """What plain JSON can hold of a result: numbers that are not finite become null.

    Its fields are `rollflow.Result`'s (`nfe` is `committed_nfe`), the image's `width`, `height`, `frames` and `format`,
    and of the request `prompt`, `method` and `seed`.
    """
    height, width = result.pixels.shape[-2:]
    asked = result.request
    return {
        "reward": finite(result.reward),
        "terms": None if result.terms is None else {name: finite(term) for name, term in result.terms.items()},
        "held_out": finite(result.held_out),
        "nfe": result.committed_nfe,
        "cached_nfe": result.cached_nfe,
        "executed_nfe": result.executed_nfe,
        "invalid_rewards": result.invalid_rewards,
        "stopped": result.stopped,
        "seconds": result.seconds,
        "width": int(width),
        "height": int(height),
        "frames": len(result.pixels) if result.pixels.ndim == 4 else None,
        "format": kind,
        "prompt": asked.prompt,
        "method": methods.title(asked.method),
        "seed": int(asked.seed),
    }


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: they become null."""
    return value if value is not None and math.isfinite(value) else None
