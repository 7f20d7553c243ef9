"""A request as plain JSON and back: names and numbers alone, no objects and no code.

Fields are those of `rollflow.Request`, a method's own options beside them or in `options`. What is a tensor or an image
is `{"safetensors": base64}`; a deadline, which counts on one process's clock, travels as `deadline_at`, seconds since
1970.
"""

from __future__ import annotations

import base64
import binascii
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save

from rollflow import methods
from rollflow.errors import RequestError, said, shown
from rollflow.request import Request, pixels_of
from rollflow.values import plain

TENSORS = ("latents", "image", "mask")
DEADLINE = "deadline_at"
DEPTH = 4  # of lists and mappings within one another
_DEFAULTS = {
    field.name: field.default_factory() if field.default_factory is not MISSING else field.default
    for field in fields(Request)
}
FIELDS = (*(name for name in _DEFAULTS if name != "deadline"), DEADLINE)


def to_json(request: Request, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """A request's fields that differ from their defaults.

    Args:
        request: what is asked.
        clock: the one that its deadline counts on.

    Raises:
        RequestError: a field is an object or a function, which another process could not make again.
    """
    found: dict[str, Any] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(request, name)
        if name in TENSORS:
            if value is not None:
                found[name] = _packed(name, value)
        elif name == "deadline":
            if value is not None:
                found[DEADLINE] = time.time() + float(value) - clock()
        elif name == "prompt" or (value is not default and value != default):
            found[name] = _plain(name, value)
    return found


def from_json(found: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> Request:
    """The request that `to_json` wrote, or that somebody else did; values are checked when it is handed in.

    Raises:
        RequestError: a field that there is not, one that is not written as above, or no prompt.
    """
    if not isinstance(found, Mapping) or not isinstance(found.get("prompt"), str):
        raise RequestError('a request is an object of fields with at least a "prompt", a text')
    own = _own_options(found)
    given = {name: value for name, value in found.items() if name in _DEFAULTS and name != "deadline"}
    for name in TENSORS:
        if given.get(name) is not None:
            given[name] = _unpacked(name, given[name])
    if found.get(DEADLINE) is not None:
        at = found[DEADLINE]
        if not isinstance(at, int | float) or isinstance(at, bool) or not math.isfinite(at):
            raise RequestError(f"{DEADLINE}={shown(at)}: it must be seconds since 1970")
        given["deadline"] = clock() + at - time.time()
    if not isinstance(given.get("reward", ""), str) or not isinstance(given.get("method", ""), str):
        raise RequestError(f"reward={shown(given.get('reward'))}, method={shown(given.get('method'))}: give names")
    if own:
        if not isinstance(options := given.get("options", {}), Mapping):
            raise RequestError(f"options={shown(options)}: they must be an object of a method's own options")
        given["options"] = {**options, **own}
    return Request(**given)


def _own_options(found: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own options among the fields."""
    own = {name: value for name, value in found.items() if name not in FIELDS}
    if not own:
        return own
    method = found.get("method", _DEFAULTS["method"])
    taken = methods.options_of(method) if isinstance(method, str) and method in methods.names() else []
    for name in own:
        if name not in taken:
            near = get_close_matches(str(name), [*FIELDS, *taken], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*FIELDS, *taken])}"
            raise RequestError(f"{name if str(name).isidentifier() else shown(name)}: there is no such field; {hint}")
    return own


def _plain(name: str, value: Any, depth: int = DEPTH) -> Any:
    value = plain(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if depth and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(name, one, depth - 1) for key, one in value.items()}
    if depth and isinstance(value, list | tuple):
        return [_plain(name, one, depth - 1) for one in value]
    raise RequestError(
        f"{name}={shown(value)}: a request that is kept or sent elsewhere has names and numbers alone; give a name, or "
        "hand it in without a journal"
    )


def _packed(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, Image.Image):
        value = pixels_of(value.convert("L"), name)[0] if name == "mask" else pixels_of(value, name)
    if not isinstance(value, torch.Tensor):
        raise RequestError(f"{name}={shown(value)}: it must be a tensor or an image")
    return {"safetensors": base64.b64encode(save({name: value.detach().cpu().contiguous()})).decode()}


def _unpacked(name: str, value: Any) -> torch.Tensor:
    text = value.get("safetensors") if isinstance(value, Mapping) else None
    if not isinstance(text, str):
        raise RequestError(f'{name}={shown(value)}: it must be {{"safetensors": base64}}, with one tensor, "{name}"')
    try:
        return load(base64.b64decode(text, validate=True))[name]
    except (binascii.Error, SafetensorError, KeyError, ValueError) as error:
        raise RequestError(f"{name}: these are not safetensors with one tensor, {name!r} ({said(error)})") from error
