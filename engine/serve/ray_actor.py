"""A worker on a Ray cluster: a plain async actor with one engine.

Ray only places it and tells of its death: frames of bytes cross, as through a pipe, and the dispatcher gives its
searches to others. Ray's own restarts and retries stay off, since they are bound to the same actor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from rollflow.errors import RequestError, RollflowError, line, said, told
from rollflow.serve.messages import Message, pack, unpack
from rollflow.serve.process import PRETRAINED

WAITING = 30.0  # seconds after which an actor that Ray has not placed yet is spoken of
LOG = logging.getLogger("rollflow")
_connecting = threading.Lock()


class Actor:
    """What runs on the cluster, as an async actor.

    Args:
        first: which engine, see `rollflow.serve.worker`.
    """

    def __init__(self, first: Mapping[str, Any]):
        self._first = first
        self._loop: asyncio.AbstractEventLoop | None = None
        self._frames, self._come = list[bytes](), asyncio.Event()
        self._next, self._early = 0, dict[int, Sequence[bytes]]()
        self._station: Any = None

    async def open(self) -> int:
        """Makes the engine on another thread; returns the process's id."""
        from rollflow.serve import worker

        self._loop = loop = asyncio.get_running_loop()

        def send(message: Message) -> None:
            loop.call_soon_threadsafe(self._say, pack(message))

        def make() -> None:
            worker.spare_the_collector()
            self._station = worker.stationed(self._first, send, worker.die)

        threading.Thread(target=make, name="rollflow-start", daemon=True).start()
        return os.getpid()

    async def take(self, number: int, frames: Sequence[bytes]) -> None:
        """Messages for the station, the calls numbered from 0: Ray does not run those of an async actor in order."""
        self._early[number] = frames
        while self._next in self._early:
            self._next += 1
            for frame in self._early.pop(self._next - 1):
                self._station.take(unpack(frame))

    async def news(self) -> list[bytes]:
        """The station's messages since the last call, as soon as there are some."""
        while not self._frames:
            self._come.clear()
            await self._come.wait()
        frames, self._frames = self._frames, []
        return frames

    def _say(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._come.set()


class RayChannel:
    """Runs searches on an engine of a Ray cluster: of RAY_ADDRESS, or one that it starts here; a `Channel`.

    Args:
        options: of the function, plain JSON; by default those of `Engine.from_pretrained`. On a CPU, `lanes` and
            `threads` are 1 and the actor's cores where they are not given: Ray sets OMP_NUM_THREADS=1 for small actors.
        engine: "MODULE:FUNCTION" that makes the engine; the module must be on every node.
        cpus: cores that Ray reserves; by default lanes times threads, or 1.
        gpus: GPUs that Ray reserves; by default 1 where the device is a GPU, which is then its only one.
        environment: variables for the process besides the cluster's.
        warm_up: measure batches before the worker is ready.
    """

    def __init__(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        engine: str = PRETRAINED,
        cpus: int | None = None,
        gpus: float | None = None,
        environment: Mapping[str, str] | None = None,
        warm_up: bool = True,
    ):
        given = dict(options or {})
        on_gpu = str(given.get("device", "")).startswith("cuda")
        self._gpus = float(on_gpu) if gpus is None else gpus
        lanes, threads = int(given.get("lanes") or 1), given.get("threads")
        self._cpus = cpus or lanes * int(threads or 1)
        if self._gpus and engine == PRETRAINED:
            given["device"] = "cuda"  # the only one that Ray shows it
        elif engine == PRETRAINED:
            given |= {"lanes": lanes, "threads": int(threads or max(1, self._cpus // lanes))}
        self._first = {"op": "start", "engine": engine, "options": given, "warm_up": warm_up}
        self._environment = dict(environment or {})
        self._actor: Any = None
        self._queue: SimpleQueue[Message | None] = SimpleQueue()
        self._closed = False
        self.pid: int | None = None

    def __repr__(self) -> str:
        return f"ray {self.pid or ''}".strip()

    def start(self, on_message: Callable[[Message], None], on_death: Callable[[str], None]) -> None:
        """See `Channel`."""
        self._queue = SimpleQueue()
        threading.Thread(
            target=self._run, args=(self._queue, on_message, on_death), name="rollflow-ray", daemon=True
        ).start()

    def _run(
        self,
        queue: SimpleQueue[Message | None],
        on_message: Callable[[Message], None],
        on_death: Callable[[str], None],
    ) -> None:
        try:
            ray = connected()
            self._actor = actor = self._made(ray)
            opened = actor.open.remote()
            if not ray.wait([opened], timeout=WAITING)[0] and not self._closed:
                LOG.warning(
                    "a worker waits for %d cores and %g GPUs of the Ray cluster for %g s now: see `ray status`",
                    self._cpus, self._gpus, WAITING,
                )  # fmt: skip
            self.pid = ray.get(opened)
            threading.Thread(target=_write, args=(queue, actor), name="rollflow-to-ray", daemon=True).start()
            while not self._closed:
                for frame in ray.get(actor.news.remote()):
                    on_message(unpack(frame))
        except RollflowError as error:
            on_message(Message({"op": "unfit", "error": told(error)}))
        except Exception as error:  # of Ray's: the actor, its node or the cluster is gone
            if not self._closed:
                on_death(line(said(error), 200))
        finally:
            queue.put(None)

    def _made(self, ray: Any) -> Any:
        remote = ray.remote(Actor).options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": self._environment} if self._environment else None,
        )
        return remote.remote(self._first)

    def send(self, message: Message) -> None:
        """See `Channel`."""
        self._queue.put(message)

    def kill(self) -> None:
        """See `Channel`."""
        if self._actor is not None:
            import ray

            with suppress(Exception):  # it is gone already, and so perhaps is the cluster
                ray.kill(self._actor, no_restart=True)

    def close(self) -> None:
        """See `Channel`."""
        self._closed = True
        self._queue.put(None)
        self.kill()


def connected() -> Any:
    """The module `ray`, connected to its cluster.

    Raises:
        RequestError: Ray is not installed, or there is no cluster at RAY_ADDRESS.
    """
    try:
        import ray
    except ImportError as error:
        raise RequestError("workers on a cluster take Ray: pip install 'rollflow[ray]'") from error
    with _connecting:
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=True)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise RequestError(
                    f"there is no Ray cluster to be had ({said(error)}): start one by `ray start --head`, and set "
                    "RAY_ADDRESS"
                ) from error
    return ray


def _write(queue: SimpleQueue[Message | None], actor: Any) -> None:
    """Sends what is queued until None, all that is there in one call."""
    number = 0
    while (message := queue.get()) is not None:
        frames = [pack(message)]
        while not queue.empty() and (more := queue.get()) is not None:
            frames.append(pack(more))
        with suppress(Exception):  # of an actor that is gone: the other thread says so
            actor.take.remote(number, frames)
            number += 1
