"""Reads the bodies that the reward `http` writes, from senders that are not trusted; see `rollflow.rewards.http`."""

from __future__ import annotations

import base64
import binascii
import io
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from rollflow.errors import RollflowError, said, shown

JSON, SAFETENSORS = "application/json", "application/x-safetensors"
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of 8-bit PNG files


class Refused(RollflowError):
    """What a caller is told instead of scores.

    Attributes:
        status: of HTTP.
        seconds: after which it may work, where it may.
    """

    def __init__(self, status: int, message: str, seconds: float | None = None):
        super().__init__(message)
        self.status, self.seconds = status, seconds


@dataclass(frozen=True)
class Limits:
    """What one call may hold.

    Attributes:
        body: bytes.
        rows: images or clips.
        prompt: characters of each prompt.
        pixels: of all of its images together, frames included.
    """

    body: int = 64 << 20
    rows: int = 256
    prompt: int = 10_000
    pixels: int = 1 << 26


class Asked(NamedTuple):
    """One call: images, float32 in [0, 1], all of one size, and a prompt for each."""

    prompts: list[str]
    images: Float[Tensor, "row *frame 3 height width"]


def read(kind: str, body: bytes, limits: Limits) -> Asked:
    """The call that a body of a content type holds.

    Raises:
        Refused: it holds none, or more than it may; 4xx.
    """
    form = kind.partition(";")[0].strip().lower()
    if form == JSON:
        return _of_json(body, limits)
    if form == SAFETENSORS:
        return _of_safetensors(body, limits)
    raise Refused(415, f"the Content-Type is {shown(kind)}: it must be {JSON} or {SAFETENSORS}")


def _parsed(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError: also of bytes that are no UTF-8
        raise Refused(400, f"{what} is no JSON ({said(error)})") from error


def _of_json(body: bytes, limits: Limits) -> Asked:
    found = _parsed(body, "the body")
    if not isinstance(found, dict) or set(found) != {"prompts", "images"}:
        raise Refused(400, f'the body is {shown(found)}: it must be {{"prompts": [...], "images": [...]}}')
    prompts, rows = _prompts(found["prompts"], limits), found["images"]
    if not isinstance(rows, list) or len(rows) != len(prompts):
        raise Refused(400, f"there are {len(prompts)} prompts: images must be a list of as many, one for each")
    left, images = limits.pixels, list[Tensor]()
    for i, row in enumerate(rows):
        frames = row if isinstance(row, list) else [row]
        if not frames:
            raise Refused(400, f"images[{i}] is an empty list: a clip is the list of its frames")
        pictures = []
        for frame in frames:
            pictures.append(_picture(frame, f"images[{i}]", left, limits))
            left -= pictures[-1].shape[0] * pictures[-1].shape[1]
            if pictures[-1].shape != pictures[0].shape:
                raise Refused(422, f"images[{i}] has frames of several sizes: they must be of one")
        pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, -3).float() / 255
        images.append(pixels if isinstance(row, list) else pixels[0])
        if images[-1].shape != images[0].shape:
            raise Refused(
                422,
                f"images[0] has the shape {[*images[0].shape]} and images[{i}] {[*images[-1].shape]}: the images of a "
                "call must be of one size; send others in a call of their own",
            )
    return Asked(prompts, torch.stack(images))


def _picture(text: Any, place: str, left: int, limits: Limits) -> np.ndarray:
    """A PNG file in base64, as [height, width, 3] of 8 bits."""
    if not isinstance(text, str):
        raise Refused(400, f"{place} is {shown(text)}: it must be the base64 text of a PNG file, or a list of such")
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"{place} is no base64 text ({said(error)})") from error
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            size, mode = image.size, image.mode
            if size[0] * size[1] > left:  # before it is unpacked
                raise _too_many_pixels(limits)
            if mode not in MODES:
                raise Refused(422, f"{place} has the mode {mode}: it must be a PNG of 8 bits a channel")
            return np.array(image.convert("RGB"))
    except Refused:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound
        raise _too_many_pixels(limits) from error
    except UnidentifiedImageError as error:  # whose message has an address
        raise Refused(400, f"{place} is no PNG file") from error
    except Exception as error:  # Pillow raises many kinds for what is broken
        raise Refused(400, f"{place} is no PNG file ({said(error)})") from error


def _of_safetensors(body: bytes, limits: Limits) -> Asked:
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise Refused(400, f"the body is no safetensors file ({said(error)})") from error
    length = int.from_bytes(body[:8], "little")  # the library has checked it
    held = json.loads(body[8 : 8 + length]).get("__metadata__") or {}
    images = tensors.get("images")
    if set(tensors) != {"images"} or images is None or "prompts" not in held:
        raise Refused(400, 'the safetensors file must hold one tensor, "images", and the metadata "prompts"')
    prompts = _prompts(_parsed(held["prompts"], "the metadata prompts"), limits)
    if not images.is_floating_point() or images.ndim not in (4, 5) or images.shape[-3] != 3 or 0 in images.shape:
        raise Refused(
            422,
            f"images are {images.dtype} of shape {[*images.shape]}: they must be floating, [row, 3, height, width] or "
            "[row, frame, 3, height, width]",
        )
    if len(images) != len(prompts):
        raise Refused(400, f"there are {len(prompts)} prompts and {len(images)} images: there must be one for each")
    if images.numel() // 3 > limits.pixels:
        raise _too_many_pixels(limits)
    images = images.float()
    if not bool(((images >= 0) & (images <= 1)).all()):  # a NaN is neither
        raise Refused(422, "images have values outside of [0, 1]: clamp them before they are sent")
    return Asked(prompts, images)


def _prompts(found: Any, limits: Limits) -> list[str]:
    if not isinstance(found, list) or not found or not all(isinstance(prompt, str) for prompt in found):
        raise Refused(400, f"prompts is {shown(found)}: it must be a list of texts, at least one")
    if len(found) > limits.rows:
        raise Refused(413, f"there are {len(found)} prompts: at most {limits.rows} may be in a call; send several")
    for i, prompt in enumerate(found):
        if len(prompt) > limits.prompt:
            raise Refused(413, f"prompts[{i}] has {len(prompt)} characters: at most {limits.prompt} are allowed")
        if not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise Refused(400, f"prompts[{i}] holds half of a character ({said(error)})") from error
    return found


def _too_many_pixels(limits: Limits) -> Refused:
    return Refused(413, f"the images have more than {limits.pixels} pixels together: send fewer in a call")
