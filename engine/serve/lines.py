"""The lines of a batch: a prompt each, or a JSON object with a `prompt` and other fields of a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rollflow.errors import RequestError, said, shown

LONGEST = 1 << 24  # bytes of a line: latents of a large image
CHUNK = 1 << 22


class Line(NamedTuple):
    """A line that is not empty: its number, from 1, and its bytes without the end of the line."""

    number: int
    text: bytes


class Asked(NamedTuple):
    """What a line asks for: the `id` that it gives or its number, and the request as plain JSON."""

    id: str
    request: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A file of lines as it was when it was looked through.

    Attributes:
        path: of the file.
        digest: SHA-256 of its bytes.
        counts: lines that are not empty, of each shard.
        shard: lines of the file, also empty ones, that a shard stands for.
    """

    path: Path
    digest: str
    counts: tuple[int, ...]
    shard: int

    @property
    def total(self) -> int:
        """Lines that are not empty."""
        return sum(self.counts)


def source(path: Path, shard: int) -> Source:
    """Looks through a file, in bounded memory.

    Raises:
        RequestError: it cannot be read, or has no lines.
    """
    digest, counts = hashlib.sha256(), list[int]()
    try:
        with path.open("rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
        for line in lines(path):
            place = (line.number - 1) // shard
            counts.extend([0] * (place + 1 - len(counts)))
            counts[place] += 1
    except OSError as error:
        raise RequestError(f"{shown(str(path))} cannot be read ({said(error)}): give a file of lines") from error
    if not counts:
        raise RequestError(f"{shown(str(path))} has no lines: write a prompt, or a JSON object with one, in each")
    return Source(path, digest.hexdigest(), tuple(counts), shard)


def lines(path: Path) -> Iterator[Line]:
    """Its lines that are not empty; of one that is too long the beginning, which is none that can be read."""
    with path.open("rb") as file:
        number = 0
        while text := file.readline(LONGEST + 1):
            number += 1
            whole = text
            while len(whole) > LONGEST and not whole.endswith(b"\n"):  # the rest of it
                if not (whole := file.readline(LONGEST + 1)):
                    break
            if text := text.strip():
                yield Line(number, text)


def asked(line: Line, defaults: Mapping[str, Any]) -> Asked:
    """The request of a line, with `defaults` for the fields that it leaves out.

    A line that begins with { is a JSON object, any other is itself a prompt. The default options of a method are for
    lines that name no other one.

    Raises:
        RequestError: the line cannot be read.
    """
    if len(line.text) > LONGEST:
        raise RequestError(f"the line has more than {LONGEST} bytes")
    try:
        text = line.text.decode("utf-8-sig" if line.number == 1 else "utf-8")
        found = json.loads(text) if text.startswith("{") else {"prompt": text}
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"the line {shown(line.text.decode(errors='replace'))} cannot be read ({said(error)})"
        ) from error
    id = found.pop("id", line.number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise RequestError(f"id={shown(id)}: it must be a text or a whole number")
    given = {**defaults}
    if found.get("method", given.get("method")) != given.get("method"):
        given.pop("options", None)
    own = found.get("options")
    if isinstance(own, dict) and "options" in given:
        found = {**found, "options": {**given["options"], **own}}
    return Asked(str(id).encode(errors="replace").decode(), {**given, **found})
