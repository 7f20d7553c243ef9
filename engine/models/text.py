"""What a model is asked: a text, and the size of what it is to make."""

from __future__ import annotations

from typing import NamedTuple


class Text(NamedTuple):
    """A prompt, and what guidance leads away from: None for the model's own, which mostly is the empty text."""

    prompt: str
    negative: str | None = None


class Size(NamedTuple):
    """Pixels, and frames of a clip; None where the model's own is wanted."""

    height: int | None = None
    width: int | None = None
    frames: int | None = None
