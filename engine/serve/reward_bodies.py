"""Reads the bodies that the reward `http` writes, from senders that are not trusted; see `rollflow.rewards.http`."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Callable
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
PIXEL = 24  # bytes of a pixel: as three float32, once while it waits and once in a batch that is judged
SIGNATURE, HEAD = b"\x89PNG\r\n\x1a\n", 24  # of a PNG file: how it begins, bytes until its width and height are known
MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of 8-bit PNG files


SCHEMA = {  # for OpenAPI
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["prompts", "images"],
                    "properties": {
                        "prompts": {"type": "array", "items": {"type": "string"}},
                        "images": {
                            "type": "array",
                            "description": "base64 texts of PNG files; a clip is the list of its frames",
                            "items": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
                        },
                    },
                }
            },
            "application/x-safetensors": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


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
        frames: images, those of clips included.
        prompt: characters of each prompt.
        pixels: of all of its images together, frames included.
    """

    body: int = 64 << 20
    rows: int = 256
    prompt: int = 10_000
    pixels: int = 1 << 26
    frames: int = 1 << 14


class Asked(NamedTuple):
    """One call: images, float32 in [0, 1], all of one size, and a prompt for each."""

    prompts: list[str]
    images: Float[Tensor, "row *frame 3 height width"]


class Sent(NamedTuple):
    """A body that was looked through, but not unpacked.

    Attributes:
        prompts: a text a row.
        size: height and width of the images.
        bytes: that the images will take.
        unpack: makes the call, or raises `Refused`.
    """

    prompts: list[str]
    size: tuple[int, int]
    bytes: int
    unpack: Callable[[], Asked]


def cost(kind: str, body: bytes) -> int:
    """Bytes that it takes to look through a body, at most; what allows that is checked by `look`."""
    if _form(kind) == JSON:
        return len(body) * (2 if body.isascii() else 5)  # a text of up to four bytes a character, and its parts
    return len(body) + 8 * len(_head(body))


def look(kind: str, body: bytes, limits: Limits) -> Sent:
    """What a body of a content type holds.

    Raises:
        Refused: no call, or more than it may; 4xx.
    """
    form = _form(kind)
    if form == JSON:
        return _of_json(body, limits)
    if form == SAFETENSORS:
        return _of_safetensors(body, limits)
    raise Refused(415, f"the Content-Type is {shown(kind)}: it must be {JSON} or {SAFETENSORS}")


def _form(kind: str) -> str:
    return kind.partition(";")[0].strip().lower()


def _parsed(text: bytes | str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError: also of bytes that are no UTF-8
        raise Refused(400, f"{what} is no JSON ({said(error)})") from error


def _check_marks(text: bytes, limits: Limits) -> None:
    """Refuses JSON of so many small things that they would take many times its bytes."""
    most = 100 + limits.frames + limits.rows * (2 + limits.prompt // 8)
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > most:
        raise Refused(413, f"the body has more than {most} lists, objects and commas: send fewer images in a call")


def _of_json(body: bytes, limits: Limits) -> Sent:
    _check_marks(body, limits)
    found = _parsed(body, "the body")
    if not isinstance(found, dict) or set(found) != {"prompts", "images"}:
        raise Refused(400, f'the body is {shown(found)}: it must be {{"prompts": [...], "images": [...]}}')
    prompts, rows = _prompts(found["prompts"], limits), found["images"]
    if not isinstance(rows, list) or len(rows) != len(prompts):
        raise Refused(400, f"there are {len(prompts)} prompts: images must be a list of as many, one for each")
    frames = [
        (frame, f"images[{i}]") for i, row in enumerate(rows) for frame in (row if isinstance(row, list) else [row])
    ]
    if len(frames) > limits.frames:
        raise Refused(413, f"there are {len(frames)} frames: at most {limits.frames} may be in a call; send several")
    shapes = [_shape(row, f"images[{i}]") for i, row in enumerate(rows)]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise Refused(
                422,
                f"images[0] has the shape {[*shapes[0]]} and images[{i}] {[*shape]}: the images of a call must be of "
                "one size; send others in a call of their own",
            )
    height, width = shapes[0][-2:]
    if len(frames) * height * width > limits.pixels:  # before any is unpacked
        raise _too_many_pixels(limits)

    def unpack() -> Asked:
        images = torch.empty(len(rows), *shapes[0])
        for place, (frame, name) in zip(images.view(-1, 3, height, width), frames, strict=True):
            place.copy_(torch.from_numpy(_picture(frame, name, (width, height))).movedim(-1, 0))
        return Asked(prompts, images.div_(255))

    return Sent(prompts, (height, width), PIXEL * len(frames) * height * width, unpack)


def _shape(row: Any, place: str) -> tuple[int, ...]:
    """The shape of an image or a clip, by the heads of its files."""
    if not isinstance(row, list):
        return 3, *_size(row, place)
    if not row:
        raise Refused(400, f"{place} is an empty list: a clip is the list of its frames")
    sizes = {_size(frame, place) for frame in row}
    if len(sizes) > 1:
        raise Refused(422, f"{place} has frames of several sizes: they must be of one")
    return len(row), 3, *sizes.pop()


def _size(text: Any, place: str) -> tuple[int, int]:
    """Height and width of a PNG file in base64."""
    if not isinstance(text, str):
        raise Refused(400, f"{place} is {shown(text)}: it must be the base64 text of a PNG file, or a list of such")
    head = _decoded(text[: HEAD * 4 // 3], place)
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    if not head.startswith(SIGNATURE) or head[12:16] != b"IHDR" or width < 1 or height < 1:
        raise Refused(400, f"{place} is no PNG file")
    return height, width


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(400, f"{place} is no base64 text ({said(error)})") from error


def _picture(text: str, place: str, size: tuple[int, int]) -> np.ndarray:
    """A PNG file in base64 of a width and a height, as [height, width, 3] of 8 bits."""
    file = _decoded(text, place)
    try:
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            if image.size != size:  # a second head: it would take more than was allowed
                raise Refused(400, f"{place} is no PNG file (its size is {image.size} and {size})")
            if image.mode not in MODES:
                raise Refused(422, f"{place} has the mode {image.mode}: it must be a PNG of 8 bits a channel")
            return np.array(image.convert("RGB"))
    except Refused:
        raise
    except UnidentifiedImageError as error:  # whose message has an address
        raise Refused(400, f"{place} is no PNG file") from error
    except Exception as error:  # Pillow raises many kinds for what is broken
        raise Refused(400, f"{place} is no PNG file ({said(error)})") from error


def _head(body: bytes) -> bytes:
    """The JSON of a safetensors file, if it is one."""
    return body[8 : 8 + int.from_bytes(body[:8], "little")]


def _of_safetensors(body: bytes, limits: Limits) -> Sent:
    _check_marks(_head(body), limits)
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise Refused(400, f"the body is no safetensors file ({said(error)})") from error
    held = json.loads(_head(body)).get("__metadata__") or {}  # the library has checked it
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
    pixels = images.numel() // 3
    if pixels > limits.pixels:
        raise _too_many_pixels(limits)
    if images.ndim == 5 and len(images) * images.shape[1] > limits.frames:
        raise Refused(413, f"there are more than {limits.frames} frames: send fewer in a call")

    def unpack() -> Asked:
        made = images.float()
        low, high = made.aminmax()
        if not (low >= 0 and high <= 1):  # a NaN is neither
            raise Refused(422, "images have values outside of [0, 1]: clamp them before they are sent")
        return Asked(prompts, made)

    return Sent(prompts, (images.shape[-2], images.shape[-1]), PIXEL * pixels, unpack)


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
