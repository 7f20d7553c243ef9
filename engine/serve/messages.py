"""What the front and its workers tell one another: a header of JSON and bytes; no pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rollflow.errors import RollflowError

LENGTHS = struct.Struct(">IQ")  # bytes of the header and of the payload
MOST_HEADER, MOST_PAYLOAD = 1 << 28, 1 << 32


class Message(NamedTuple):
    """One message: `header` is plain JSON whose "op" says what it is, `payload` the bytes of a file."""

    header: dict[str, Any]
    payload: bytes = b""


@runtime_checkable
class Readable(Protocol):
    """A pipe."""

    def read(self, count: int, /) -> bytes:
        """So many bytes; fewer at its end."""
        ...


@runtime_checkable
class Channel(Protocol):
    """A worker as the front sees it; it is started again after its death."""

    def start(self, on_message: Callable[[Message], None], on_death: Callable[[str], None]) -> None:
        """Starts a worker and returns at once; the functions are called on any thread, the second once at most."""
        ...

    def send(self, message: Message) -> None:
        """Gives the worker a message; returns at once and drops what is for a dead one."""
        ...

    def kill(self) -> None:
        """Ends a worker that does not answer, without waiting; `on_death` is called."""
        ...

    def close(self) -> None:
        """Ends the worker and waits for that some seconds at most; `on_death` is not called."""
        ...


def pack(message: Message) -> bytes:
    """A message as one frame: the lengths of header and payload (">IQ"), the header, the payload."""
    header = json.dumps(message.header, separators=(",", ":")).encode()
    return LENGTHS.pack(len(header), len(message.payload)) + header + message.payload


def unpack(frame: bytes) -> Message:
    """The message of a whole frame."""
    header, payload = LENGTHS.unpack_from(frame)
    start = LENGTHS.size
    if len(frame) != start + header + payload:
        raise RollflowError(f"a frame of {len(frame)} bytes: its lengths say {start + header + payload}")
    return Message(json.loads(frame[start : start + header]), frame[start + header :])


def read(stream: Readable) -> Message | None:
    """The next message of a stream; None at its end, also in the middle of a message.

    Raises:
        RollflowError: the lengths are none of a message's: something else wrote into the stream.
    """
    if len(lengths := stream.read(LENGTHS.size)) < LENGTHS.size:
        return None
    header, payload = LENGTHS.unpack(lengths)
    if header > MOST_HEADER or payload > MOST_PAYLOAD:
        raise RollflowError(f"a message of {header} and {payload} bytes: something else wrote into a worker's pipe")
    if len(text := stream.read(header)) < header or len(rest := stream.read(payload)) < payload:
        return None
    return Message(json.loads(text), rest)
