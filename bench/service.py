"""`rollflow serve` in a process of its own: started, waited for, and ended; or a server that runs already."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rollflow.errors import RequestError, line, shown

ADDRESS = re.compile(r"https?://[^\s/]+:\d+")
STARTS, DRAINS = 300.0, 60.0  # seconds that a server may take to be ready, and to end
POLL = 0.1


@dataclass(frozen=True)
class Service:
    """A server that is ready.

    Attributes:
        url: without a slash at its end.
        pid: of its process; None of one that somebody else started.
    """

    url: str
    pid: int | None = None


@contextmanager
def served(url: str | None, arguments: Sequence[str], command: Sequence[str] | None = None) -> Iterator[Service]:
    """A server that is ready: the one at `url`, or `rollflow serve` with these arguments, on a free port.

    Args:
        url: of a server that runs; it is left running.
        arguments: of the server to start.
        command: that starts it, before the arguments.

    Raises:
        RequestError: it ended, or was not ready in time.
    """
    if url is not None:
        service = Service(url.rstrip("/"))
        _wait_until_ready(service.url, None, deque())
        yield service
        return
    start = [*(command or (sys.executable, "-m", "rollflow", "serve")), "--port", "0", *arguments]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    said: deque[str] = deque(maxlen=20)
    try:
        address = _address(process, said)
        _wait_until_ready(address, process, said)
        yield Service(address, process.pid)
    finally:
        _end(process)


def _address(process: subprocess.Popen[str], said: deque[str]) -> str:
    """The address that the process prints; a thread reads on, so that its output never blocks it."""
    found, known = list[str](), threading.Event()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            for text in output:
                said.append(text.rstrip())
                if not found and (match := ADDRESS.search(text)):
                    found.append(match.group())
                    known.set()
        known.set()

    threading.Thread(target=read, name="server output", daemon=True).start()
    if not known.wait(STARTS):
        raise _failed(f"printed no address within {STARTS:g} s", said)
    if not found:
        raise _failed("ended", said)
    return found[0]


def _wait_until_ready(url: str, process: subprocess.Popen[str] | None, said: deque[str]) -> None:
    until, why = time.monotonic() + STARTS, "no answer"
    while time.monotonic() < until:
        if process is not None and process.poll() is not None:
            raise _failed(f"ended with {process.returncode}", said)
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=10):
                return
        except urllib.error.HTTPError as error:
            why = f"{error.code}"
        except (OSError, ValueError) as error:
            why = line(str(error), 100)
            if process is None:
                raise RequestError(
                    f"no server answers at {shown(url)} ({why}): start one with rollflow serve, or leave out --url"
                ) from error
        time.sleep(POLL)
    raise _failed(f"was not ready within {STARTS:g} s ({why})", said)


def _failed(what: str, said: Sequence[str]) -> RequestError:
    last = " | ".join([*said][-4:]) or "it said nothing"
    return RequestError(f"the server {what}: {line(last, 300)}")


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(DRAINS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
