"""The fields of a request's body: OpenAI's, and those of `rollflow.Request` that are plain values; each is checked."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

from rollflow import methods, wire
from rollflow.errors import RequestError, shown
from rollflow.request import Request
from rollflow.serve.allowed import check_reward
from rollflow.serve.failures import Failure, param, wrong
from rollflow.serve.limits import ServeSettings
from rollflow.values import flag, whole

NFE = 100  # of a request that says nothing of a budget, see `rollflow.Request.nfe`
MOST_PARTIAL = 10  # partial images of a stream
MARGIN = 0.05  # of a client's timeout, which the answer may take to be written and read; a second at least
STARTS = (*wire.TENSORS, "strength")  # what a search starts from: of `rollflow.Request`, but not taken over HTTP
SEARCH = tuple(name for name in wire.FIELDS if name not in (*STARTS, wire.DEADLINE))  # of `rollflow.Request`
ASKED = ("model", "size", "user")  # OpenAI's, of any search
IMAGES = ("n", "response_format", "stream", "partial_images")  # OpenAI's, of images alone
PROGRESS = "progress"
SIDES = ("height", "width", "frames")
USUAL = {  # OpenAI's that have one way here
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "output_format": ("png",),
}
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class Asked:
    """A checked body.

    Attributes:
        requests: one for each image, as `rollflow.wire` has them.
        url: whether images are told by their address.
        stream: whether events are wanted, and of those `partial` images and `progress`.
        user: who it is for, as the client says.
        sent: the fields as they came, without what this server adds.
    """

    requests: list[dict[str, Any]]
    url: bool = False
    stream: bool = False
    partial: int = 0
    progress: bool = False
    user: str | None = None
    sent: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nfe(self) -> int:
        """The budget of the first search, 0 where its time decides."""
        return int(self.requests[0].get("nfe") or 0)


def images(body: Mapping[str, Any], settings: ServeSettings, timeout: str | None = None) -> Asked:
    """The body of POST /v1/images/generations.

    Args:
        body: as it came.
        settings: the limits.
        timeout: of the header x-stainless-read-timeout, how long the client waits for an answer, in seconds.

    Raises:
        Failure: a field that there is not, or one that is out of its bounds (400); a model that is not served (404).
    """
    given = _known(body, (*IMAGES, PROGRESS, *USUAL))
    for name, allowed in USUAL.items():
        if name in given and given[name] not in allowed:
            raise wrong(name, given[name], f"it must be {' or '.join(map(repr, allowed))}; leave it out")
    count = _checked("n", lambda: whole("n", given.get("n", 1), 1, settings.max_n))
    form = given.get("response_format", "b64_json")
    if form not in ("b64_json", "url"):
        raise wrong("response_format", form, "it must be 'b64_json' or 'url'")
    stream = _checked("stream", lambda: flag("stream", given.get("stream", False)))
    progress = _checked(PROGRESS, lambda: flag(PROGRESS, given.get(PROGRESS, False)))
    looks = given.get("partial_images", 0)
    partial = _checked("partial_images", lambda: whole("partial_images", looks, 0, MOST_PARTIAL))
    for name, wanted in (("partial_images", partial > 0), (PROGRESS, progress)):
        if wanted and not stream:
            raise wrong(name, given[name], "it goes with stream=true; give both, or neither")
    request = _request(given, settings)
    if not stream and "seconds" not in request:
        request |= _in_time(timeout, request)
    seed = _checked("seed", lambda: whole("seed", request.get("seed", 0), -(2**63), 2**63 - count))
    requests = [request, *({**request, "seed": seed + i} for i in range(1, count))]
    return Asked(requests, form == "url", stream, partial, progress, given.get("user"), given)


def search(body: Mapping[str, Any], settings: ServeSettings) -> Asked:
    """The body of POST /v1/searches; raises as `images`."""
    given = _known(body, ())
    return Asked([_request(given, settings)], user=given.get("user"), sent=given)


def usual_nfe(settings: ServeSettings) -> int:
    """The budget of a request that says nothing of one."""
    return min(NFE, settings.max_nfe)


def names(method: object = None) -> tuple[str, ...]:
    """The names of all fields, a method's own options among them."""
    own = methods.options_of(method) if isinstance(method, str) else ()
    return tuple(dict.fromkeys((*SEARCH, *ASKED, *IMAGES, PROGRESS, *USUAL, *own)))


def _known(body: Mapping[str, Any], more: tuple[str, ...]) -> dict[str, Any]:
    """The fields that are given, null as if it were left out; all of them are known."""
    given = {name: value for name, value in body.items() if value is not None}
    method = given.get("method", Request.method)
    if not isinstance(method, str) or method not in methods.names():
        raise wrong("method", method, f"choose one of {', '.join(methods.names())}")
    allowed = [*SEARCH, *ASKED, *more, *methods.options_of(method)]
    for name in given:
        if name not in allowed:
            raise _unknown(name, allowed)
    return given


def _unknown(name: str, allowed: list[str]) -> Failure:
    """The answer to a field that there is not."""
    near = get_close_matches(name, allowed, 1)
    if name in STARTS:
        what = f"none of {', '.join(STARTS)} is taken over HTTP, where a search starts from noise; leave it out"
    elif near:
        what = f"there is no such field; did you mean {near[0]!r}?"
    else:
        what = f"there is no such field; there are {', '.join(allowed)}"
    return Failure(f"{shown(name)}: {what}", 400, name[:100], "unknown_field")


def _request(given: Mapping[str, Any], settings: ServeSettings) -> dict[str, Any]:
    """A search as `rollflow.wire` has it; what its values are is checked when it is handed in, limits here."""
    prompt = given.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise wrong("prompt", prompt, "say what the image should show")
    if len(prompt) > settings.max_prompt:
        raise wrong("prompt", prompt, f"it has {len(prompt)} characters, at most {settings.max_prompt} are read")
    if isinstance(given.get("negative"), str) and len(given["negative"]) > settings.max_prompt:
        raise wrong("negative", given["negative"], f"at most {settings.max_prompt} characters are read")
    _check_model(given.get("model"), settings)
    if not isinstance(given.get("user", ""), str):
        raise wrong("user", given["user"], "it must be a text")
    own = [name for name in given if name in SEARCH or name not in names()]
    for name in own:
        _check_plain(name, given[name], name == "options")
    for name in ("reward", "held_out"):
        if name in given:
            check_reward(name, given[name], settings.rewards)
    found = {name: given[name] for name in own} | _size(given)
    if settings.reward != Request.reward:
        found.setdefault("reward", settings.reward)
    if "priority" in found:
        priority = found["priority"]
        found["priority"] = _checked("priority", lambda: whole("priority", priority, -(2**31), settings.max_priority))
    _check_pixels(given, found, settings)
    if "nfe" in found:
        found["nfe"] = _checked("nfe", lambda: whole("nfe", found["nfe"], 1, settings.max_nfe))
    if "seconds" in found:
        _check_seconds(found["seconds"], settings.max_seconds)
    elif "nfe" not in found:
        found["nfe"] = usual_nfe(settings)
    return found


def _check_model(model: object, settings: ServeSettings) -> None:
    if model is None or model == settings.model:
        return
    raise Failure(
        f"model={shown(model)}: this server has {shown(settings.model)}; name it, or leave the model out",
        404,
        "model",
        "model_not_found",
    )


def _check_plain(name: str, value: Any, mapping: bool) -> None:
    """Refuses objects where no field has any."""
    if mapping and isinstance(value, Mapping):
        for key, one in value.items():
            _check_plain(key, one, False)
    elif isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(one, Mapping) for one in value)):
        raise wrong(name, value, "it must be a text, a number, true, false or a list of those")


def _check_seconds(seconds: object, most: float) -> None:
    given = seconds if isinstance(seconds, int | float) and not isinstance(seconds, bool) else math.nan
    if not 0 < given <= most:
        raise wrong("seconds", seconds, f"it must be a number above 0, and at most {most:g}")


def _size(given: Mapping[str, Any]) -> dict[str, int]:
    size = given.get("size", "auto")
    if size == "auto":
        return {}
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise wrong("size", size, "it must be 'auto' or as in '512x512', width by height")
    if "width" in given or "height" in given:
        raise wrong("size", size, "width and height are given, too; give one of both")
    return {"width": int(found[1]), "height": int(found[2])}


def _check_pixels(given: Mapping[str, Any], found: dict[str, Any], settings: ServeSettings) -> None:
    """Refuses an image or a clip that is larger than memory should be asked for."""
    asked = [side for side in SIDES if side in found]
    found |= {side: _checked(side, partial(whole, side, found[side], 1)) for side in asked}
    size = {side: found.get(side, own) for side, own in zip(SIDES, settings.own, strict=True)}
    if math.prod(size.values()) <= settings.max_pixels or not asked:
        return
    fault = max(asked, key=lambda side: found[side] / settings.own[SIDES.index(side)])
    fault = fault if fault in given else "size"
    clip = f" in {size['frames']} frames" if size["frames"] > 1 else ""
    most = f"at most {settings.max_pixels} pixels are drawn here, those of all frames together"
    raise wrong(fault, given[fault], f"{size['width']}x{size['height']}{clip} is too large, {most}")


def _in_time(timeout: str | None, request: Mapping[str, Any]) -> dict[str, float]:
    """A deadline that comes before the client gives up."""
    try:
        seconds = float(timeout or "nan")
    except ValueError:
        return {}
    if not 0 < seconds < 1e9:
        return {}
    return {wire.DEADLINE: time.time() + max(seconds / 2, seconds - max(1.0, MARGIN * seconds))}


def _checked(name: str, check: Any) -> Any:
    try:
        return check()
    except RequestError as error:
        raise Failure(str(error), 400, param(str(error), (name,)) or name, "invalid_value") from error
