"""A server in this process, which tests of HTTP share."""

import asyncio
import threading
from contextlib import contextmanager

from rollflow.cli.serving import _server, address, listening
from rollflow.serve.app import create_app
from rollflow.serve.desk import Desk
from rollflow.serve.limits import ServeSettings


class Served:
    """A desk behind HTTP on a thread and a loop of their own.

    Attributes:
        url: where it is.
        desk, counter: what answers; `call` works them.
    """

    def __init__(self, channels, settings=None, **desk):
        self._made, self._settings, self._options = channels, settings or ServeSettings(model="tiny"), desk
        self._up, self._error = threading.Event(), None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.desk = Desk(self._made, **self._options)
            app = create_app(self.desk, self._settings)
            self.counter, http = app.state.counter, _server(app)
            with listening("127.0.0.1", 0) as at:
                self.url = address(at)
                serving = asyncio.ensure_future(http.serve([at]))
                await self.desk.start()
                self._up.set()
                await self._stop.wait()
                await self.desk.close(0)
                http.should_exit = True
                await serving
        except BaseException as error:
            self._error = error
            self._up.set()

    def call(self, work, *given):
        """What an asynchronous function returns on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work(*given), self._loop).result(60)

    def __enter__(self):
        self._thread.start()
        assert self._up.wait(60), "the server did not start"
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server did not end"


@contextmanager
def opened(gate):
    """Lets what waits for a gate go on, at the end of the block at the latest."""
    gate.clear()
    try:
        yield gate
    finally:
        gate.set()
