"""The threads that work for an engine: lanes, which run batches, and judges, which call rewards."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from rollflow.device.judges import JUDGES, Judges, Turn
from rollflow.models.acceleration import allow_recompiles

LOG = logging.getLogger("rollflow")
T = TypeVar("T")
Work = tuple[Callable[..., Any], tuple[Any, ...]]
_SETTING = threading.Lock()


class Threads:
    """Daemon threads that take work from one queue: none of them keeps an interpreter from ending.

    Args:
        count: how many.
        name: of each, with a number.
        start: runs in each thread before its first work.
    """

    def __init__(self, count: int, name: str, start: Callable[[], None]):
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._given_up: set[threading.Thread] = set()
        self._start, self._name, self._started, self._growing = start, name, 0, threading.Lock()
        self.threads: list[threading.Thread] = []
        self._ready = [self._add() for _ in range(count)]
        self._finalizer = weakref.finalize(self, _end, self._queue, self.threads)

    def _add(self) -> Future[None]:
        ready: Future[None] = Future()
        arguments = (self._queue, self._start, ready, self._given_up)
        thread = threading.Thread(target=_work, args=arguments, name=f"{self._name}-{self._started}", daemon=True)
        thread.start()
        self._started += 1
        self.threads.append(thread)
        return ready

    def wait(self) -> None:
        """Waits until every thread has started; raises what its `start` raised."""
        for ready in self._ready:
            ready.result()

    def post(self, work: Callable[..., Any], *args: Any) -> None:
        """Does `work` on one of the threads."""
        self._queue.put((work, args))

    def fill(self, count: int) -> None:
        """Starts threads until there are `count`, unless they were told to end."""
        with self._growing, suppress(RuntimeError):  # the system has no more: work waits for a thread that is free
            while self._finalizer.alive and len(self.threads) < count:
                self._add()

    def give_up(self, thread: threading.Thread) -> None:
        """Counts no more on a thread, which ends when its work comes back, if it ever does."""
        self._given_up.add(thread)
        if thread in self.threads:
            self.threads.remove(thread)

    def close(self, seconds: float | None = None) -> list[threading.Thread]:
        """Ends the threads when all work is done; waits that long, and returns those that are still at work."""
        with self._growing:
            self._finalizer()
        waiting = [thread for thread in self.threads if thread is not threading.current_thread()]
        for thread in waiting:
            thread.join(seconds)
        return [thread for thread in waiting if thread.is_alive()]


def _work(
    queue: SimpleQueue[Work | None], start: Callable[[], None], ready: Future[None], given_up: set[threading.Thread]
) -> None:
    try:
        start()
    except BaseException as error:
        ready.set_exception(error)
        return
    ready.set_result(None)
    del start, ready
    while (item := queue.get()) is not None:
        try:
            item[0](*item[1])
        except BaseException:  # work reports its own errors: this one is a fault, and nobody else would see it
            LOG.exception("a thread of rollflow met an error that its work should have reported")
        del item  # an idle thread holds nothing
        if threading.current_thread() in given_up:
            given_up.discard(threading.current_thread())
            return


def _end(queue: SimpleQueue[Work | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        queue.put(None)


def _set_threads(count: int) -> None:
    """Sets how many cores an operation of this thread uses, and of no thread that others start later."""
    with _SETTING:
        usual = torch.get_num_threads()  # asked first, or the first operation would set this thread's number to it
        torch.set_num_threads(count)
        if count != usual:
            restores = threading.Thread(target=torch.set_num_threads, args=(usual,), daemon=True)
            restores.start()  # torch sets the number of the thread that calls, and of all that have none yet
            restores.join()


class Lanes:
    """Threads that run batches side by side on a CPU; on a GPU, the one thread that talks to it.

    A model of many small operations gains little from several threads an operation: two batches on a thread each are
    nearly twice as fast on two cores as one batch on two threads.

    Args:
        device: where the batches run.
        count: how many batches may be on the device at a time.
        threads: cores that an operation of a lane uses, on a CPU.

    Attributes:
        abandoned: how many threads were given up because a call of a reward did not come back.
    """

    def __init__(self, device: torch.device, count: int, threads: int):
        self.count, self.threads, self.abandoned = count, threads, 0
        self.parallel = device.type == "cpu"

        def start() -> None:
            allow_recompiles()
            if device.type == "cuda":
                torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device.index)
            else:
                _set_threads(threads)

        self._lanes = Threads(count if self.parallel else 1, "rollflow-lane", start)
        self._judges = Threads(JUDGES, "rollflow-judge", start)
        self._watcher = Threads(1, "rollflow-watcher", start) if device.type == "cuda" else self._judges
        self._judging = Judges(self._judges)
        for pool in self._pools:
            pool.wait()

    def __repr__(self) -> str:
        return f"Lanes(count={self.count}, threads={self.threads})"

    @property
    def _pools(self) -> set[Threads]:
        return {self._lanes, self._judges, self._watcher}

    @property
    def alive(self) -> list[threading.Thread]:
        """Its threads."""
        return [thread for pool in self._pools for thread in pool.threads]

    def run(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """Does `work` on a lane."""
        future: Future[T] = Future()
        self._lanes.post(_into, future, work, args)
        return future

    def post(self, work: Callable[..., Any], *args: Any) -> None:
        """Does `work`, which reports its own result, on a lane."""
        self._lanes.post(work, *args)

    def judge(self, target: Any, concurrent: bool, work: Callable[..., Any], *args: Any) -> None:
        """Does `work`, which may take its time, on a judge's thread when it is its turn at `target`; see `Judges`."""
        self._judging.post(target, concurrent, work, *args)

    def hold(self, target: Any, concurrent: bool) -> Turn:
        """Waits, on a lane, for its turn at `target`."""
        return self._judging.hold(target, concurrent, self._lanes)

    def end(self, turn: Turn) -> bool:
        """A turn is over; False if it was given up before, and nothing of it counts any more."""
        return self._judging.end(turn)

    def abandon(self, turn: Turn) -> bool:
        """Gives up a turn whose thread does not come back, and replaces the thread; False if the turn is over."""
        if not self._judging.abandon(turn):
            return False
        self.abandoned += 1
        self._lanes.fill(self.count if self.parallel else 1)
        self._judges.fill(self._judging.needed)
        return True

    def watch(self, work: Callable[..., Any], *args: Any) -> None:
        """Does `work`, which waits for a GPU, on a thread of its own."""
        self._watcher.post(work, *args)

    def close(self, seconds: float | None = None) -> list[threading.Thread]:
        """Ends the threads when their work is done; waits that long for each, and returns those that did not end."""
        return [thread for pool in self._pools for thread in pool.close(seconds)]


def _into(future: Future[T], work: Callable[..., T], args: tuple[Any, ...]) -> None:
    try:
        future.set_result(work(*args))
    except BaseException as error:
        future.set_exception(error)
