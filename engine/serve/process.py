"""A worker in a process of its own: frames over its pipes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, BinaryIO

from rollflow.errors import RollflowError, said
from rollflow.serve.messages import Message, pack, read

PRETRAINED = "rollflow.serve.worker:pretrained"
GRACE = 5.0  # seconds that a closed worker has to end by itself
LOG = logging.getLogger("rollflow")


class ProcessChannel:
    """Runs searches on an engine in a process of its own, which ends with this one; a `Channel`.

    Args:
        options: of the function, plain JSON; by default those of `Engine.from_pretrained`. Say `lanes` and `threads`
            where several workers share the cores.
        engine: "MODULE:FUNCTION" that makes the engine.
        environment: variables for the process besides this one's.
        warm_up: measure batches before the worker is ready.

    Attributes:
        pid: of the process; None before the first.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        engine: str = PRETRAINED,
        environment: Mapping[str, str] | None = None,
        warm_up: bool = True,
    ):
        self._first = {"op": "start", "engine": engine, "options": dict(options or {}), "warm_up": warm_up}
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._queue: SimpleQueue[Message | None] = SimpleQueue()
        self._closed = self._answers = False

    def __repr__(self) -> str:
        return f"process {self.pid or ''}".strip()

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return None if self._process is None else self._process.pid

    def start(self, on_message: Callable[[Message], None], on_death: Callable[[str], None]) -> None:
        """See `Channel`."""
        self._queue, self._answers = SimpleQueue(), False
        queue = self._queue
        queue.put(Message(self._first))
        threading.Thread(
            target=self._run, args=(queue, on_message, on_death), name="rollflow-process", daemon=True
        ).start()

    def _run(
        self,
        queue: SimpleQueue[Message | None],
        on_message: Callable[[Message], None],
        on_death: Callable[[str], None],
    ) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "rollflow.serve.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,  # Ctrl-C in a terminal is for the front, which drains
            )
        except OSError as error:
            on_death(said(error))
            return
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        self._process = process
        threading.Thread(target=_write, args=(queue, process.stdin), name="rollflow-to-process", daemon=True).start()
        try:
            while (message := read(process.stdout)) is not None:
                self._answers = True
                on_message(message)
        except (RollflowError, ValueError) as error:
            LOG.error("a worker cannot be understood: %s", said(error))
            process.kill()
        queue.put(None)
        code = process.wait()
        process.stdout.close()
        if not self._closed:
            on_death(f"process {process.pid} ended by signal {-code}" if code < 0 else f"it ended with code {code}")

    def send(self, message: Message) -> None:
        """See `Channel`."""
        self._queue.put(message)

    def kill(self) -> None:
        """See `Channel`."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """See `Channel`."""
        self._closed = True
        self._queue.put(None)
        process = self._process
        if process is not None:
            try:
                process.wait(GRACE if self._answers else 0)  # one that still imports does not listen yet
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(GRACE)


def _write(queue: SimpleQueue[Message | None], pipe: BinaryIO) -> None:
    """Writes what is queued until None, or until nobody reads."""
    with suppress(OSError, ValueError), pipe:
        while (message := queue.get()) is not None:
            pipe.write(pack(message))
            pipe.flush()
