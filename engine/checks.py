"""What every field of a request must be, checked at the door: a request whose numbers are plain ones, or an error."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image

from rollflow import sde
from rollflow.errors import RequestError, line, said, shown
from rollflow.models.text import Size
from rollflow.request import Request, pixels_of
from rollflow.values import flag, number, plain, whole

MOST_NFE = 2**20  # what a noise key numbers
MOST_STEPS = 10_000  # of a grid and of a finish: their coefficients are computed before anything runs
MOST_PIXELS = 2**16  # of a side
MOST_FRAMES = 2**16
MOST_SECONDS = 1e9
MOST_GUIDANCE = 1e6
MOST_NOISE = 1e4  # of an element of given noise, whose variance should be 1
# What `methods.make` and `holds` are given beside options.
_RESERVED = ("name", "method", "nfe", "steps", "finish", "seed", "again")


def request(asked: Request) -> Request:
    """The request with plain values, and 100 evaluations where it says nothing of a budget.

    The path, the reward and the method are not looked at; `None` stays where it stands for a default.

    Raises:
        RequestError: what was given, what is allowed.
    """
    nfe = 100 if asked.nfe is None else whole("nfe", asked.nfe, 1, MOST_NFE)
    seed = whole("seed", asked.seed, -(2**63))
    if seed >= 2**63:
        raise RequestError(f"seed={shown(asked.seed)}: it must be a whole number of 64 bits, below 2^63")
    optional: dict[str, Any] = {
        "steps": lambda value: whole("steps", value, 1, MOST_STEPS),
        "finalists": lambda value: whole("finalists", value, 1, MOST_NFE),
        "stop_at": lambda value: number("stop_at", value),
        "seconds": _seconds,
        "deadline": lambda value: number("deadline", value, MOST_SECONDS * 1000),
        "height": lambda value: whole("height", value, 1, MOST_PIXELS),
        "width": lambda value: whole("width", value, 1, MOST_PIXELS),
        "frames": lambda value: whole("frames", value, 1, MOST_FRAMES),
        "guidance": lambda value: number("guidance", value, MOST_GUIDANCE),
        "negative": negative,
        "times": _times,
        "latents": _latents,
        "image": _image,
        "strength": strength,
        "mask": _mask,
    }
    given = {name: check(value) for name, check in optional.items() if (value := getattr(asked, name)) is not None}
    return replace(
        asked,
        prompt=prompt(asked.prompt),
        nfe=nfe,
        seed=seed,
        finish=whole("finish", asked.finish, 0, MOST_STEPS),
        cache=flag("cache", asked.cache),
        priority=whole("priority", asked.priority, -(2**63), 2**63),
        shift=number("shift", asked.shift),
        solver=_solver(asked.solver),
        judge_all=flag("judge_all", asked.judge_all),
        options=options(asked.options, own=isinstance(asked.method, str)),
        **given,
    )


def prompt(given: object) -> str:
    """A prompt, as a plain string.

    Raises:
        RequestError: it is no string, blank, or holds what is no text: control characters, halves of surrogate pairs.
    """
    if not isinstance(given, str) or not str.__str__(given).strip():
        raise RequestError(f"prompt={shown(given)}: it must be a sentence")
    return _text("prompt", given)


def negative(given: object) -> str:
    """A negative prompt, which may be empty; raises as `prompt` does."""
    if not isinstance(given, str):
        raise RequestError(f"negative={shown(given)}: it must be a text, or None for the model's own")
    return _text("negative", given)


def _text(name: str, given: str) -> str:
    text = str.__str__(given)
    strange = None
    if not text.isprintable():
        kinds = ((one, unicodedata.category(one)) for one in text if one not in "\t\n\r")
        strange = next((one for one, kind in kinds if kind in ("Cc", "Cs")), None)
    if strange is not None:
        raise RequestError(f"{name}={shown(text)}: the character {strange!r} in it is no text: leave it out")
    return text


def prompts(given: object, what: str = "prompts") -> list[str]:
    """A prompt or several, each checked."""
    if isinstance(given, str):
        return [prompt(given)]
    return [prompt(one) for one in listed(given, what)]


def listed(given: object, what: str) -> list[Any]:
    """The members of a list, or of what is like one.

    Raises:
        RequestError: it is none: a string, bytes, a mapping, or no iterable at all; or it cannot be gone through.
    """
    if isinstance(given, str | bytes | bytearray | Mapping):
        raise RequestError(f"{what}={shown(given)}: they must be a list")
    try:
        return list(given)  # type: ignore[call-overload]
    except Exception as error:
        raise RequestError(f"{what}={shown(given)}: they must be a list") from error


def options(given: object, own: bool = False) -> dict[str, Any]:
    """A method's options by name, scalars of NumPy's and torch's as those of Python.

    Args:
        given: the options.
        own: whether they are for one of our own methods, whose whole numbers count what a budget pays for.

    Raises:
        RequestError: it is no mapping of names to values, a name is one of the request's own fields, or a count is
            beyond every budget.
    """
    try:
        pairs = [*given.items()] if isinstance(given, Mapping) else None
    except Exception as error:
        raise RequestError(f"options={shown(given)}: they cannot be read") from error
    if pairs is None or not all(isinstance(name, str) for name, _ in pairs):
        raise RequestError(
            f"options={shown(given)}: they must be a mapping of the method's option names to values, such as "
            '{"initial": 25}'
        )
    for name, _ in pairs:
        if name in _RESERVED:
            raise RequestError(f"options={shown(given)}: {name!r} is no option of a method; see rollflow.Request")
    found = {str.__str__(name): plain(value) for name, value in pairs}
    for name, value in found.items():
        if own and type(value) is int and abs(value) > MOST_NFE:
            raise RequestError(f"{line(name, 60)}={shown(value)}: it must be a number of at most {MOST_NFE}")
    return found


def size(height: object, width: object, frames: object = None) -> Size:
    """Height and width in pixels, and frames, None where it is the model's own."""
    return Size(
        None if height is None else whole("height", height, 1, MOST_PIXELS),
        None if width is None else whole("width", width, 1, MOST_PIXELS),
        None if frames is None else whole("frames", frames, 1, MOST_FRAMES),
    )


def _seconds(given: object) -> float:
    seconds = number("seconds", given, MOST_SECONDS)
    if seconds <= 0:
        raise RequestError(f"seconds={shown(given)}: the time of a request must be above 0")
    return seconds


def _solver(given: object) -> str:
    if not isinstance(given, str) or given not in sde.SOLVERS:
        raise RequestError(f"unknown solver {shown(given)}: choose one of {', '.join(sde.SOLVERS)}")
    return str.__str__(given)


def _times(given: object) -> tuple[float, ...]:
    """A grid as given, whose times decrease within (0, 1]; a last 0 may be there or not."""
    message = f"times={shown(given)}: they must"
    if not isinstance(given, Sequence | torch.Tensor | np.ndarray) or isinstance(given, str | bytes | bytearray):
        raise RequestError(f"{message} be a list of decreasing numbers within (0, 1]")
    try:
        found: list[Any] = [*islice(iter(given), MOST_STEPS + 2)]
    except Exception as error:
        raise RequestError(f"{message} be a list of decreasing numbers within (0, 1]") from error
    times = [number("times", time) for time in found]
    if len(times) > MOST_STEPS:
        raise RequestError(f"{message} be at most {MOST_STEPS} times")
    pairs = list(pairwise(times if times[-1:] == [0.0] else [*times, 0.0]))
    if not pairs or not all(0.0 <= after < before <= 1.0 for before, after in pairs):
        raise RequestError(f"{message} decrease strictly, within (0, 1], to an optional 0")
    return tuple(times)


def _image(given: object) -> torch.Tensor:
    """An image as float32 [3, height, width] in [0, 1], or a clip [frame, 3, height, width]; a copy."""
    if isinstance(given, Image.Image):
        return pixels_of(given, "image")
    if isinstance(given, list | tuple):  # of one that is a clip, the request has made a tensor
        raise RequestError(f"image=a {_frames(given)}: the frames of a clip must be PIL images of one size")
    fit = isinstance(given, torch.Tensor) and given.ndim in (3, 4) and given.shape[-3] == 3 and given.numel() > 0
    if not fit or not given.dtype.is_floating_point or given.layout != torch.strided or given.is_meta:  # type: ignore
        raise RequestError(
            f"image={shown(given)}: it must be a PIL image, or a tensor of floats [3, height, width] in [0, 1]; of a "
            "clip a list of PIL images, or a tensor [frame, 3, height, width]"
        )
    pixels = given.detach().to(device="cpu", dtype=torch.float32, copy=True)  # type: ignore[attr-defined]
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):  # NaN too
        raise RequestError(f"image={shown(given)}: its numbers must be in [0, 1]")
    return pixels


def _frames(given: Sequence[Any]) -> str:
    """What is in a list that is no clip, in a few words."""
    kinds = dict.fromkeys(
        f"images of {one.width}x{one.height} pixels" if isinstance(one, Image.Image) else f"{type(one).__name__}s"
        for one in islice(given, MOST_FRAMES)
    )
    return line(f"list of {' and '.join(kinds) or 'nothing'}", 200)


def _mask(given: object) -> torch.Tensor:
    """A mask as float32 [height, width]; a copy."""
    if isinstance(given, Image.Image):
        try:
            return torch.from_numpy(np.array(given.convert("L"))).float() / 255
        except Exception as error:
            raise RequestError(f"mask={shown(given)}: it cannot be read ({said(error)})") from error
    if isinstance(given, list | tuple):
        raise RequestError(f"mask=a {_frames(given)}: it must be one image, for all frames of a clip")
    fit = isinstance(given, torch.Tensor) and given.ndim == 2 and given.numel() > 0 and not given.is_complex()
    if not fit or given.layout != torch.strided or given.is_meta:  # type: ignore[attr-defined]
        raise RequestError(
            f"mask={shown(given)}: it must be a PIL image, or a tensor [height, width], 1 where it is drawn anew"
        )
    return given.detach().to(device="cpu", dtype=torch.float32, copy=True)  # type: ignore[attr-defined]


def strength(given: object) -> float:
    """How much of an image is replaced, above 0 to 1."""
    found = number("strength", given, 1)
    if found <= 0:
        raise RequestError(f"strength={shown(given)}: it must be above 0, where nothing would change, and at most 1")
    return found


def _latents(given: object) -> torch.Tensor:
    """Given initial noise as float32, a copy; its shape is checked against the model's later."""
    if not isinstance(given, torch.Tensor) or not given.ndim or not given.numel():
        raise RequestError(
            f"latents={shown(given)}: they must be a finite tensor, of the shape of one state or of [n, ...] of them"
        )
    if not given.dtype.is_floating_point or given.layout != torch.strided or given.is_quantized or given.is_meta:
        raise RequestError(f"latents={shown(given)}: they must be a dense tensor of floating-point numbers with data")
    latents = given.detach().to(dtype=torch.float32, copy=True)
    if not bool((latents.abs() <= MOST_NOISE).all()):  # NaN and infinities too
        raise RequestError(
            f"latents={shown(given)}: they must be finite, noise of unit variance, and no element beyond {MOST_NOISE:g}"
        )
    return latents
