"""uvicorn as commands run it: it leaves signals alone, and gives up on clients that do not come to the point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn

GRACE_OF_ANSWERS = 5  # seconds that the last answers may take to be written
HEADERS = 30.0  # seconds, twice at most, that a connection may be there without the head of a request
OWN_FILES = 128  # open files that are left to all but connections
FEWEST = 64  # connections that there may be, however few searches may wait


def most_connections(max_queued: int) -> int:
    """Connections that a server may have: ten for each search that may wait, as far as the system allows so many open
    files; the process's own limit of them is raised where it has to be."""
    import resource

    most = max(FEWEST, 10 * max_queued)
    files, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + OWN_FILES
    if files != resource.RLIM_INFINITY and files < wanted:
        files = wanted if allowed == resource.RLIM_INFINITY else min(wanted, allowed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, allowed))
        most = min(most, max(1, files - OWN_FILES))
    return most


def quiet(app: Any, connections: int | None = None, headers: float = HEADERS) -> uvicorn.Server:
    """uvicorn, which leaves signals alone: they are the command's.

    Args:
        app: the application.
        connections: that there may be; requests beyond are answered with 503.
        headers: see `HEADERS`.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,
        http=_protocol(headers),
        log_config=None,  # handlers are the command's
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=connections,
        timeout_graceful_shutdown=GRACE_OF_ANSWERS,
    )
    return Server(config)


def _protocol(seconds: float) -> Any:
    """uvicorn's protocol, which ends a connection that has no request at two looks in a row, none between them.

    uvicorn itself does so only between two requests, and until the first byte of the second.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    usual: Any = AutoHTTPProtocol

    class Protocol(usual):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen = self
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            self._next.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            idle = self.cycle is None or self.cycle.response_complete
            if idle and self.cycle is self._seen:
                self.transport.close()
            self._seen = self.cycle if idle else self
            self._next = self.loop.call_later(seconds, self._look)

    return Protocol
