"""`rollflow serve`: searches over HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rollflow.cli.connections import most_connections
from rollflow.cli.connections import quiet as quiet
from rollflow.cli.options import ModelOptions, by_default
from rollflow.errors import RequestError, said, shown
from rollflow.names import BUILT_IN
from rollflow.serve.logs import Level, told_on_stderr

if TYPE_CHECKING:
    from rollflow.serve.desk import Desk
    from rollflow.serve.limits import ServeSettings

LOG = logging.getLogger("rollflow")
TELL = partial(print, flush=True)  # through a pipe, too
PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
KeyFile = Annotated[Path | None, by_default("no key is asked for, and --host is this machine", metavar="FILE")]
Folder = Annotated[Path | None, by_default("none: searches end with the process", metavar="FOLDER")]
Lanes = Annotated[int | None, by_default("as measured; 1 of several workers on a CPU")]
Cores = Annotated[int | None, by_default("all, divided by the workers")]
AnyNumber = Annotated[int | None, by_default("any number")]
Pixels = Annotated[int | None, by_default("4 times a built-in model's own, else 2048 x 2048")]
Sizes = Annotated[tuple[int, ...], by_default("those that measure fastest", metavar="ROWS ...")]
Named = Annotated[
    tuple[str, ...], by_default("those that call no other server and whose weights are here", metavar="REWARD ...")
]


@dataclass(frozen=True)
class Serve:
    """Serve searches over HTTP: OpenAI's Images API, searches as jobs, metrics for Prometheus, and a page at /.

    It prints its address when it is ready. SIGTERM or Ctrl-C ends it when what was asked for is done, or after --grace
    seconds; meanwhile new requests are told to come again.
    """

    host: str = "127.0.0.1"
    """Address to listen at; another than this machine's own takes --api-key-file."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    workers: int = 1
    """Engines; more than one are processes of their own, which share the cores, or have a GPU each."""
    cores: Cores = None
    """Cores of each of several workers, where they have no GPU."""
    lanes: Lanes = None
    """Batches that a worker computes at a time; to be set where two servers are to compute alike."""
    buckets: Sizes = ()
    """Batch sizes of a worker, ascending; a batch is padded up to the next. To be set where two servers are to compute
    alike, or a start is not to measure them."""
    ray: bool = False
    """Run the workers as actors of the Ray cluster at $RAY_ADDRESS, or of one that is started here; with --device cuda
    each has a GPU."""
    journal: Folder = None
    """A folder that keeps searches: after a restart they go on where they were."""
    keep: float = 86400.0
    """Seconds that a search can be asked for after its end, at least 1."""
    grace: float = 30.0
    """Seconds after SIGTERM in which what was asked for may end."""
    max_queued: int = 1000
    """Searches that may wait; more are told when to come again."""
    max_queued_nfe: AnyNumber = None
    """Function evaluations that may wait to be let in, as every search does for some milliseconds; those of searches
    that run do not count, and one request alone may be more."""
    api_key_file: KeyFile = None
    """A file with a key a line, as KEY or NAME KEY, one of which clients must send, and Prometheus for /metrics, too;
    /health, /ready, the page and /docs take none."""
    requests_per_minute: AnyNumber = None
    """Requests of a key for searches in a minute, or of all clients where there are no keys."""
    rewards: Named = ()
    """Rewards that requests may name; with options they must be named as here, as in
    "http:url=http://judge:8000/score". Requests that name none get count, or the first where that is not among them."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_prompt: int = 4000
    """Characters of a prompt."""
    max_n: int = 16
    """Images of a request; never more than --max-queued."""
    max_nfe: int = 10_000
    """Function evaluations of a search."""
    max_seconds: float = 600.0
    """Seconds that a search may ask for in place of function evaluations."""
    max_pixels: Pixels = None
    """Pixels of an image, of a clip those of all its frames together."""
    max_priority: int = 0
    """The highest priority that a request may ask for; lower ones are everybody's."""
    log_level: Level = "info"
    """What is logged on standard error: warning leaves out what is no trouble, and debug adds a line for each request
    of HTTP. Prompts are never logged."""
    runtime: ModelOptions = field(default_factory=ModelOptions)

    def __call__(self) -> int:
        """Serves until a signal; returns 0, or 130 where a second signal cut it short."""
        self._check_buckets()
        self.runtime.check()
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise RequestError(f"a server takes {', '.join(missing)}: pip install 'rollflow[serve]'")
        for name in ("workers", "max_queued", "max_queued_nfe", "cores", "lanes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be at least 1")
        for name, least in (("keep", 1), ("grace", 0)):
            if not least <= getattr(self, name) < 1e9:
                raise RequestError(f"--{name} {getattr(self, name):g}: it must be seconds, at least {least}")
        self._check_rewards()
        settings = self._settings()
        with listening(self.host, self.port) as at, told_on_stderr(self.log_level):
            loop = _loop()
            try:
                code = loop.run_until_complete(self._serve(settings, at))
            finally:
                loop.close()
        return left(code)

    def _check_buckets(self) -> None:
        if self.buckets:
            from rollflow.settings import batch_sizes

            try:
                batch_sizes(self.buckets, self.runtime.reproducible, on_cpu=True)
            except RequestError as error:
                raise RequestError(f"--buckets {' '.join(map(str, self.buckets))}: {error}") from error

    def _check_rewards(self) -> None:
        """Looks for weights, and for the keys of other servers, which no client could give."""
        if not self.rewards:
            return
        from rollflow import rewards
        from rollflow.cli.judging import check_weights
        from rollflow.request import Request
        from rollflow.serve.allowed import REMOTE

        check_weights([Request("two red circles", one) for one in self.rewards])
        for one in self.rewards:
            if one.partition(":")[0] in REMOTE:
                rewards.check(rewards.make(one), "two red circles")

    def _settings(self) -> ServeSettings:
        from rollflow.serve.keys import Keys, check_host
        from rollflow.serve.limits import ServeSettings

        keys = None if self.api_key_file is None else str(self.api_key_file)
        check_host(self.host, bool(Keys(keys)))
        same = ("host", "max_body", "max_prompt", "max_nfe", "max_seconds", "max_priority", "requests_per_minute")
        given: dict[str, Any] = {name: getattr(self, name) for name in same}
        given["max_n"] = min(self.max_n, self.max_queued)  # more could never be let in
        pixels, own = most_pixels(self.runtime.model)
        given["max_pixels"] = pixels if self.max_pixels is None else self.max_pixels
        given |= {} if own is None else {"own": own}
        return ServeSettings(model=self.runtime.model, rewards=self.rewards or None, keys=keys, **given)

    async def _serve(self, settings: ServeSettings, at: socket.socket) -> int:
        from rollflow.cli.workers import channels
        from rollflow.journal import Journal
        from rollflow.serve.desk import Desk
        from rollflow.serve.worker import spare_the_collector

        spare_the_collector()
        journal = None if self.journal is None else Journal(self.journal)
        try:
            desk = Desk(
                channels(self.runtime, self.workers, self.ray, self.cores, self.lanes, self.buckets),
                journal=journal,
                max_queued=self.max_queued,
                max_queued_nfe=self.max_queued_nfe,
                keep=self.keep,
            )
            most = most_connections(self.max_queued)
            return await serve(desk, settings, at, self.grace, f"serving {self.runtime.model}", connections=most)
        finally:
            if journal is not None:
                await asyncio.to_thread(journal.close)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        RequestError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        at = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot listen at {shown(host)}, port {port} ({said(error)}): choose another") from error
    with at:
        yield at


async def serve(
    desk: Desk,
    settings: ServeSettings,
    at: socket.socket,
    grace: float,
    title: str,
    say: Callable[[str], Any] = TELL,
    connections: int | None = None,
) -> int:
    """Serves a desk until a signal, and drains it; returns 0, or 130 where a second signal cut that short.

    Args:
        desk: is started and closed here.
        settings: of the server.
        at: where it listens.
        grace: seconds that what was asked for may take after the signal.
        title: begins the line that tells the address when it is ready.
        say: takes that line.
        connections: that there may be.

    Raises:
        RollflowError: the desk cannot start.
    """
    from rollflow.serve.app import create_app

    app = create_app(desk, settings)
    http, signals = quiet(app, connections), asyncio.Queue[int]()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, signals.put_nowait, one)

    listen()
    serving, starting = loop.create_task(http.serve([at])), loop.create_task(desk.start())
    stopping, again = (loop.create_task(signals.get()) for _ in range(2))
    try:
        await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        started = starting.done()
        if started:
            starting.result()
            listen()  # again: Ray has put its own handlers there
            say(f"{title} at {address(at)}")
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        else:
            starting.cancel()
        # What a journal has left is not waited for where nothing works on it yet.
        closing = loop.create_task(desk.close(grace if started else 0))
        await asyncio.wait({closing, again}, return_when=asyncio.FIRST_COMPLETED)
        if closing.done():
            closing.result()
            return 0
        LOG.warning("a second signal: what is not over is left now")
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await desk.close(0)
        http.force_exit = True
        return 130
    finally:
        for waiting in (stopping, again):
            waiting.cancel()
        http.should_exit = True
        with suppress(asyncio.CancelledError):
            await serving
        app.state.counter.tracing.close()
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(one)


def address(at: socket.socket) -> str:
    """The URL of a socket."""
    host, port = at.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def left(code: int, patience: float = 1.0) -> int:
    """Ends the process with `code` where threads are left; returns `code` elsewhere.

    Python would wait for calls of rewards that hang, and crash where a model is still being loaded. All that must not
    be lost has been written before.
    """
    until = time.monotonic() + patience
    others = [one for one in threading.enumerate() if one is not threading.current_thread()]
    for one in others:
        if not one.daemon:
            one.join(max(0.0, until - time.monotonic()))
    if any(one.is_alive() for one in others):
        if (ray := sys.modules.get("ray")) is not None:
            ray.shutdown()  # or a cluster that was started here would stay
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def most_pixels(model: str) -> tuple[int, tuple[int, int, int] | None]:
    """Pixels of an image, or of a clip's frames together, and the model's own height, width and frames.

    Four times the own ones of a built-in model; of another one, whose own size is not known before it is loaded, those
    of an image of 2048x2048.
    """
    from rollflow.models import own_size

    if model not in BUILT_IN:
        return 2048 * 2048, None
    height, width, frames = own_size(model) or (64, 64, 1)
    own = height or 64, width or 64, frames or 1
    return 4 * math.prod(own), own


def _loop() -> asyncio.AbstractEventLoop:
    """uvloop's event loop where it is installed."""
    try:
        import uvloop  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
