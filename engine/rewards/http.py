"""The `http` reward: images and prompts go to a server, and one number a row comes back.

The wire format, of one POST a call, in either of two forms:

    Content-Type: application/json            {"prompts": [text, ...], "images": [image, ...]}
    Content-Type: application/x-safetensors   a safetensors file with one tensor, "images", and the metadata
                                              {"prompts": a JSON list of texts}

`prompts` has one text a row. An image is the base64 text of a PNG file, and a clip the list of its frames, in order.
The tensor is floating, in [0, 1], and [row, 3, height, width], or of clips [row, frame, 3, height, width]. A key goes
along as `Authorization: Bearer KEY`. The answer is JSON, in UTF-8:

    200                    {"scores": [number, ...]}       finite, one a row, in order; higher is better
    any other status       {"error": {"message": text}}    408, 425, 429 and 5xx: again later; others: never

Nothing else is exchanged: no code, no pickles, no names of files.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from rollflow.errors import FunctionError, RequestError, RewardUnavailable, line, shown
from rollflow.rewards import pixels
from rollflow.rewards.network import FrameReward
from rollflow.rewards.protocol import RETRIES, Reward

FORMATS = ("png", "safetensors")
LATER = (408, 425, 429)  # statuses that may be another one next time, besides 5xx
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


@dataclass(frozen=True)
class HttpReward(Reward):
    """Scores from a server that speaks the wire format of this module.

    A clip is sent whole: what counts of it, the server's reward says. Errors that may pass (no connection, no answer in
    time, the statuses 408, 425, 429 and 5xx) raise `RewardUnavailable`, upon which an engine calls again, later each
    time. The standard library's client is enough for one call a batch, and needs no package.

    Attributes:
        url: http or https, as in http:url=http://host:8000/score; without user, password and fragment.
        format: "png", which rounds to 8 bits, or "safetensors", which does not and is several times as large.
        seconds: without a byte from the server after which a call is given up.
        retries: how often an engine calls again.
        batch: the most images or clips of a call; None: as many as there are.
        key: the environment variable that holds a key for the server; None: it needs none.
    """

    kind: ClassVar[str] = "http"
    concurrent: ClassVar[bool] = True
    padded: ClassVar[bool] = False  # each image is paid for
    packages: ClassVar[tuple[str, ...]] = ()
    name = FrameReward.name  # as it is written in a spec

    url: str = ""
    format: str = "png"
    seconds: float = 60.0
    retries: int = RETRIES
    batch: int | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.url:
            check_url("http", "url", self.url)
        check_variable("http", self.key)
        if self.format not in FORMATS:
            raise RequestError(f"http: format={shown(self.format)}: choose one of {', '.join(FORMATS)}")
        if not 0 < self.seconds < math.inf or self.retries < 0:
            raise RequestError(f"http: seconds={self.seconds:g}, retries={self.retries}: above 0, and at least 0")

    def check(self, prompt: str) -> None:
        """Raises `RequestError` where no server is named or its key is not there; the server is not asked."""
        if not self.url:
            raise RequestError("the reward http: name its server, as in http:url=http://host:8000/score")
        secret("http", self.key)

    def __call__(
        self, images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str]
    ) -> Float[Tensor, " row"]:
        """See `rollflow.rewards.Reward`; on the CPU.

        Raises:
            RewardUnavailable: it may work later.
            RequestError: the server refuses what was sent.
            FunctionError: what it answers is not in the wire format.
        """
        self.check("")
        kind, body = written(images, prompts, self.format)
        headers = {"Content-Type": kind, "Accept": "application/json"}
        if key := secret("http", self.key):
            headers["Authorization"] = f"Bearer {key}"
        answer = self._post(urllib.request.Request(self.url, body, headers, method="POST"), 1000 + 100 * len(prompts))
        return torch.tensor(self._scores(answer, len(prompts)), dtype=torch.float32)

    def _post(self, request: urllib.request.Request, most: int) -> bytes:
        """The body of the answer, whose bytes are at most `most`."""
        try:
            with _opener().open(request, timeout=self.seconds) as response:
                body = response.read(most + 1)
        except urllib.error.HTTPError as error:
            with error:
                text = f"the reward http: {self._server} answered {error.code} ({_reason(error, self.key)})"
            if error.code in LATER or error.code >= 500:
                raise RewardUnavailable(text) from None
            raise RequestError(text) from None
        except (OSError, http.client.HTTPException) as error:  # among them URLError and TimeoutError
            reason = getattr(error, "reason", None) or error
            late = f" within {self.seconds:g} s" if isinstance(reason, TimeoutError) else ""
            what = line(str(reason) or type(reason).__name__, 100)
            raise RewardUnavailable(f"the reward http: {self._server} did not answer{late} ({what})") from error
        if len(body) > most:
            raise FunctionError(f"the reward http: {self._server} answered more than {most} bytes")
        return body

    def _scores(self, body: bytes, rows: int) -> list[float]:
        try:
            answer: Any = json.loads(body)
            scores = answer["scores"]
            if len(scores) == rows and all(type(one) in (int, float) and math.isfinite(one) for one in scores):
                return [float(one) for one in scores]
        except (ValueError, KeyError, TypeError, OverflowError):
            pass
        raise FunctionError(
            f"the reward http: {self._server} answered {shown(body.decode(errors='replace'))} for {rows} images: "
            'it must be {"scores": [...]} with one finite number each'
        )

    @property
    def _server(self) -> str:
        """The address without its query, which may hold what no message should."""
        parts = urlsplit(self.url)
        return line(f"{parts.scheme}://{parts.netloc}{parts.path}", 100)


def written(
    images: Float[Tensor, "row *frame 3 height width"], prompts: Sequence[str], format: str
) -> tuple[str, bytes]:
    """The content type and the body of a call in one of `FORMATS`."""
    if format == "safetensors":
        tensors = {"images": images.detach().cpu().contiguous()}
        return "application/x-safetensors", save(tensors, {"prompts": json.dumps([*prompts])})

    def text(pictures: np.ndarray) -> Any:
        if pictures.ndim == 4:
            return [text(picture) for picture in pictures]
        return base64.b64encode(file(pictures)).decode()

    rows = [text(picture) for picture in pixels.eight_bit(images)]
    return "application/json", json.dumps({"prompts": [*prompts], "images": rows}).encode()


def file(picture: np.ndarray, format: str = "png") -> bytes:
    """An 8-bit picture as a PNG file, or as a JPEG of quality 95."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format, **({"quality": 95} if format == "jpeg" else {"compress_level": 1}))
    return buffer.getvalue()


def check_url(reward: str, option: str, url: str) -> None:
    """Raises `RequestError` for what is no address of a server, or tells a password."""
    try:
        parts = urlsplit(url)
        told, fine = "@" in parts.netloc, parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        told, fine = False, False
    if told:
        raise RequestError(
            f"{reward}: {option} holds a user or a password, which would stand in specs and logs: leave them out, and "
            "name the environment variable of a key with key=NAME"
        )
    if not fine or any(one.isspace() or not one.isprintable() for one in url) or parts.fragment:
        raise RequestError(f"{reward}: {option}={shown(url)}: it must be as in http://host:8000/path")


def check_variable(reward: str, variable: str | None) -> None:
    """Raises `RequestError` for what is no name of an environment variable; what was given is not told."""
    if variable is not None and not _VARIABLE.fullmatch(variable):
        raise RequestError(
            f"{reward}: key must be the name of an environment variable that holds the key, in capitals, as in "
            "key=MY_KEY, and never the key itself (what was given is not repeated here)"
        )


def secret(reward: str, variable: str | None) -> str | None:
    """The key in an environment variable; raises `RequestError` where it is not set."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RequestError(f"the reward {reward} takes a key from the environment variable {variable}: set it first")
    return key


def hidden(text: str, variable: str | None) -> str:
    """A text without the key that it may repeat."""
    key = os.environ.get(variable or "", "").strip()
    return text.replace(key, "***") if key else text


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirections: they would turn a POST into a GET, and carry the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Stay)


def _reason(error: urllib.error.HTTPError, variable: str | None) -> str:
    """What the server says of its error, or what the status means."""
    try:
        text = str(json.loads(error.read(10_000))["error"]["message"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        text = str(error.reason)
    return line(hidden(text, variable), 200)
