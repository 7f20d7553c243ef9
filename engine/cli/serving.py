"""`rollflow serve`: searches over HTTP."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rollflow.cli.options import ModelOptions, by_default
from rollflow.errors import RequestError, said, shown

if TYPE_CHECKING:
    import uvicorn

    from rollflow.serve.desk import Desk
    from rollflow.serve.limits import ServeSettings

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
GRACE_OF_ANSWERS = 5  # seconds that the last answers may take to be written
KeyFile = Annotated[Path | None, by_default("no key is asked for, and --host is this machine", metavar="FILE")]
Folder = Annotated[Path | None, by_default("none: searches end with the process", metavar="FOLDER")]
Lanes = Annotated[int | None, by_default("as measured; 1 of several workers on a CPU")]
Cores = Annotated[int | None, by_default("all, divided by the workers")]
AnyNumber = Annotated[int | None, by_default("any number")]
Named = Annotated[tuple[str, ...], by_default("all but http and judge", metavar="REWARD ...")]


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
    """Batches that a worker computes at a time."""
    ray: bool = False
    """Run the workers as actors of the Ray cluster at $RAY_ADDRESS, or of one that is started here; with --device cuda
    each has a GPU."""
    journal: Folder = None
    """A folder that keeps searches: after a restart they go on where they were."""
    keep: float = 86400.0
    """Seconds that a search can be asked for after its end."""
    grace: float = 30.0
    """Seconds after SIGTERM in which what was asked for may end."""
    max_queued: int = 1000
    """Searches that may wait; more are told when to come again."""
    max_queued_nfe: AnyNumber = None
    """Function evaluations that may wait."""
    api_key_file: KeyFile = None
    """A file with a key a line, as KEY or NAME KEY, one of which clients must send."""
    requests_per_minute: AnyNumber = None
    """Requests of a key for searches in a minute, or of all clients where there are no keys."""
    rewards: Named = ()
    """Rewards that requests may name; with options they must be named as here, as in
    "http:url=http://judge:8000/score"."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_prompt: int = 4000
    """Characters of a prompt."""
    max_n: int = 16
    """Images of a request."""
    max_nfe: int = 10_000
    """Function evaluations of a search."""
    max_seconds: float = 600.0
    """Seconds that a search may ask for in place of function evaluations."""
    runtime: ModelOptions = field(default_factory=ModelOptions)

    def __call__(self) -> int:
        """Serves until a signal; returns 0, or 130 where a second signal cut it short."""
        self.runtime.check()
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            raise RequestError(f"a server takes {', '.join(missing)}: pip install 'rollflow[serve]'")
        for name in ("workers", "max_queued", "max_queued_nfe", "cores", "lanes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise RequestError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be at least 1")
        for name in ("keep", "grace"):
            if not 0 <= getattr(self, name) < 1e9:
                raise RequestError(f"--{name} {getattr(self, name):g}: it must be seconds, at least 0")
        if self.rewards:
            from rollflow.rewards import make

            for one in self.rewards:
                make(one)
        settings = self._settings()
        with listening(self.host, self.port) as at:
            loop = _loop()
            try:
                return loop.run_until_complete(self._serve(settings, at))
            finally:
                loop.run_until_complete(loop.shutdown_default_executor())
                loop.close()

    def _settings(self) -> ServeSettings:
        from rollflow.serve.keys import Keys, check_host
        from rollflow.serve.limits import ServeSettings

        keys = None if self.api_key_file is None else str(self.api_key_file)
        check_host(self.host, bool(Keys(keys)))
        same = ("host", "max_body", "max_prompt", "max_n", "max_nfe", "max_seconds", "requests_per_minute")
        given = {name: getattr(self, name) for name in same}
        return ServeSettings(model=self.runtime.model, rewards=self.rewards or None, keys=keys, **given)

    async def _serve(self, settings: ServeSettings, at: socket.socket) -> int:
        from rollflow.cli.workers import channels
        from rollflow.journal import Journal
        from rollflow.serve.desk import Desk

        journal = None if self.journal is None else Journal(self.journal)
        try:
            desk = Desk(
                channels(self.runtime, self.workers, self.ray, self.cores, self.lanes),
                journal=journal,
                max_queued=self.max_queued,
                max_queued_nfe=self.max_queued_nfe,
                keep=self.keep,
            )
            return await serve(desk, settings, at, self.grace, f"serving {self.runtime.model}")
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
    desk: Desk, settings: ServeSettings, at: socket.socket, grace: float, title: str, say: Callable[[str], Any] = print
) -> int:
    """Serves a desk until a signal, and drains it; returns 0, or 130 where a second signal cut that short.

    Args:
        desk: is started and closed here.
        settings: of the server.
        at: where it listens.
        grace: seconds that what was asked for may take after the signal.
        title: begins the line that tells the address when it is ready.
        say: takes that line.

    Raises:
        RollflowError: the desk cannot start.
    """
    from rollflow.serve.app import create_app

    app = create_app(desk, settings)
    http, signals = quiet(app), asyncio.Queue[int]()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        for one in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(one, signals.put_nowait, one)

    listen()
    serving, starting = loop.create_task(http.serve([at])), loop.create_task(desk.start())
    stopping, again = (loop.create_task(signals.get()) for _ in range(2))
    try:
        await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            listen()  # again: Ray has put its own handlers there
            say(f"{title} at {address(at)}")
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        else:
            starting.cancel()
        closing = loop.create_task(desk.close(grace))
        await asyncio.wait({closing, again}, return_when=asyncio.FIRST_COMPLETED)
        if closing.done():
            closing.result()
            return 0
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


def quiet(app: Any) -> uvicorn.Server:
    """uvicorn, which leaves signals alone: they are the command's."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_OF_ANSWERS,
    )
    return Server(config)


def _loop() -> asyncio.AbstractEventLoop:
    """uvloop's event loop where it is installed."""
    try:
        import uvloop  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
