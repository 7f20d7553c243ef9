"""A worker process: `python -m rollflow.serve.worker` runs one engine for whoever holds the other ends of its pipes.

The first frame on standard input says which engine: {"op": "start", "engine": "MODULE:FUNCTION", "options": {...}}.
It ends when its input does, and with `DEAD` when its engine is dead.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from rollflow.engine import Engine
from rollflow.errors import RequestError, RollflowError, said, shown
from rollflow.serve.messages import Message, pack, read, told
from rollflow.serve.station import Station

DEAD = 70  # exit code: the engine failed, the process with it
LOG = logging.getLogger("rollflow")


def pretrained(**options: Any) -> Engine:
    """An engine of `Engine.from_pretrained`, of plain values: `dtype` is a name."""
    import torch

    kind = options.pop("dtype", None)
    dtype = getattr(torch, kind, None) if isinstance(kind, str) and kind != "auto" else kind
    if kind is not None and dtype is None:
        raise RequestError(f"dtype={shown(kind)}: it must be the name of a torch dtype, or auto")
    return Engine.from_pretrained(dtype=dtype, **options)


def made(header: Mapping[str, Any]) -> Engine:
    """The engine that a start asks for."""
    module, _, name = str(header["engine"]).partition(":")
    return getattr(importlib.import_module(module), name)(**header.get("options", {}))


def run(source: BinaryIO, sink: BinaryIO) -> int:
    """Runs an engine until its messages end; returns the exit code."""
    lock, dead = threading.Lock(), threading.Event()

    def send(message: Message) -> None:
        try:
            with lock:
                sink.write(pack(message))
                sink.flush()
        except OSError:  # nobody listens any more: the input ends, too
            dead.set()

    def on_dead(reason: str) -> None:
        LOG.error("the engine of a worker is dead (%s): the process ends", reason)
        os._exit(DEAD)

    first = read(source)
    if first is None:
        return 0
    try:
        engine = made(first.header)
    except RollflowError as error:
        send(Message({"op": "unfit", "error": told(error)}))
        return 2
    except Exception as error:
        LOG.exception("a worker's engine could not be made")
        send(Message({"op": "unfit", "error": told(RollflowError(f"an engine cannot be made ({said(error)})"))}))
        return 2
    station = Station(engine, send, on_dead)
    station.open(bool(first.header.get("warm_up", True)))
    while not dead.is_set() and (message := read(source)) is not None:
        station.take(message)
    station.leave()
    return 0


def main() -> None:
    """Keeps its pipes to itself: what else prints goes to standard error, and what else reads finds nothing."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    code = run(source, sink)
    sys.stderr.flush()
    os._exit(code)  # threads may be in calls that do not come back


if __name__ == "__main__":
    main()
