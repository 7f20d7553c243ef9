"""A worker process: `python -m rollflow.serve.worker` runs one engine for whoever holds the other ends of its pipes.

The first frame on standard input says which engine: {"op": "start", "engine": "MODULE:FUNCTION", "options": {...}}.
It ends when its input does, and with `DEAD` when its engine is dead.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, BinaryIO

from rollflow.engine import Engine
from rollflow.errors import RequestError, RollflowError, said, shown, told
from rollflow.models import silence
from rollflow.serve.logs import told_on_stderr
from rollflow.serve.messages import Message, pack, read
from rollflow.serve.station import Station

DEAD, UNFIT = 70, 2  # exit codes: the engine failed, and the process with it; there can be no engine
LOG = logging.getLogger("rollflow")


def pretrained(**options: Any) -> Engine:
    """An engine of `Engine.from_pretrained`, of plain values: `dtype` is a name."""
    import torch

    kind = options.pop("dtype", None)
    dtype = getattr(torch, kind, None) if isinstance(kind, str) and kind != "auto" else kind
    if kind is not None and dtype is None:
        raise RequestError(f"dtype={shown(kind)}: it must be the name of a torch dtype, or auto")
    return Engine.from_pretrained(dtype=dtype, **options)


def spare_the_collector() -> None:
    """Keeps Python's garbage collector from going through all that was imported, which is no garbage, again and again.

    That takes some tenths of a second in which no thread of the process does anything. It is for a process that does
    nothing else, before it makes its engine.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or libraries would report what is left as leaks


def made(header: Mapping[str, Any]) -> Engine:
    """The engine that a start asks for."""
    module, _, name = str(header["engine"]).partition(":")
    return getattr(importlib.import_module(module), name)(**header.get("options", {}))


def stationed(
    first: Mapping[str, Any], send: Callable[[Message], None], on_dead: Callable[[str], None]
) -> Station | None:
    """A station with the engine that a start asks for, which begins to warm up; None where there can be none.

    What it lacks is sent as `unfit`.
    """
    silence()
    try:
        engine = made(first)
    except Exception as error:
        if not isinstance(error, RollflowError):
            LOG.exception("a worker's engine could not be made")
            error = RollflowError(f"the engine of a worker cannot be made ({said(error)})")
        send(Message({"op": "unfit", "error": told(error)}))
        return None
    station = Station(engine, send, on_dead)
    station.open(bool(first.get("warm_up", True)))
    return station


def run(source: BinaryIO, sink: BinaryIO) -> int:
    """Runs an engine until its messages end; returns the exit code."""
    lock = threading.Lock()

    def send(message: Message) -> None:
        with suppress(OSError), lock:  # when nobody listens any more, the input ends, too
            sink.write(pack(message))
            sink.flush()

    if (first := read(source)) is None:
        return 0
    station = stationed(first.header, send, die)
    if station is None:
        return UNFIT
    while (message := read(source)) is not None:
        station.take(message)
    station.leave()
    return 0


def die(reason: str) -> None:
    """Ends the process of an engine that can do no more."""
    LOG.error("the engine of a worker is dead (%s): the process ends", reason)
    os._exit(DEAD)


def main() -> None:
    """Keeps its pipes to itself: what else prints goes to standard error, and what else reads finds nothing."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    spare_the_collector()
    with told_on_stderr("warning"):
        code = run(source, sink)
    sys.stderr.flush()
    os._exit(code)  # threads may be in calls that do not come back


if __name__ == "__main__":
    main()
