"""The threads that work for an engine: lanes, which run batches, and judges, which call rewards."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

JUDGES = 8  # rewards that may be waited for at a time
LOG = logging.getLogger("rollflow")
T = TypeVar("T")
Work = tuple[Callable[..., Any], tuple[Any, ...]]


class Threads:
    """Daemon threads that take work from one queue: none of them keeps an interpreter from ending.

    Args:
        count: how many.
        name: of each, with a number.
        start: runs in each thread before its first work.
    """

    def __init__(self, count: int, name: str, start: Callable[[], None]):
        self._queue: SimpleQueue[Work | None] = SimpleQueue()
        self._replaced: set[threading.Thread] = set()
        self._start, self._name, self._started = start, name, 0
        self.threads: list[threading.Thread] = []
        self._ready = [self._add() for _ in range(count)]
        self._finalizer = weakref.finalize(self, _end, self._queue, self.threads)

    def _add(self) -> Future[None]:
        ready: Future[None] = Future()
        arguments = (self._queue, self._start, ready, self._replaced)
        thread = threading.Thread(target=_work, args=arguments, name=f"{self._name}-{self._started}", daemon=True)
        self._started += 1
        self.threads.append(thread)
        thread.start()
        return ready

    def wait(self) -> None:
        """Waits until every thread has started; raises what its `start` raised."""
        for ready in self._ready:
            ready.result()

    def post(self, work: Callable[..., Any], *args: Any) -> None:
        """Does `work` on one of the threads."""
        self._queue.put((work, args))

    def replace(self, thread: threading.Thread) -> None:
        """Gives up on a thread that may never come back: it ends when it does, and another takes its place."""
        self._replaced.add(thread)
        self.threads.remove(thread)
        self._add().result()

    def close(self, seconds: float | None = None) -> list[threading.Thread]:
        """Ends the threads when all work is done; waits that long, and returns those that are still at work."""
        self._finalizer()
        waiting = [thread for thread in self.threads if thread is not threading.current_thread()]
        for thread in waiting:
            thread.join(seconds)
        return [thread for thread in waiting if thread.is_alive()]


def _work(
    queue: SimpleQueue[Work | None], start: Callable[[], None], ready: Future[None], replaced: set[threading.Thread]
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
        if threading.current_thread() in replaced:
            return


def _end(queue: SimpleQueue[Work | None], threads: list[threading.Thread]) -> None:
    for _ in threads:
        queue.put(None)


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
        self._usual = torch.get_num_threads()

        def start() -> None:
            if device.type == "cuda":
                torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device.index)
            else:
                torch.get_num_threads()  # or the first operation would set the thread's number to the usual one
                torch.set_num_threads(threads)  # of this thread ...

        self._lanes = Threads(count if self.parallel else 1, "rollflow-lane", start)
        self._judges = Threads(JUDGES, "rollflow-judge", start)
        self._watcher = Threads(1, "rollflow-watcher", start) if device.type == "cuda" else self._judges
        self._turn, self._queues = threading.Lock(), dict[int, deque[Work]]()
        for pool in self._pools:
            pool.wait()
        torch.set_num_threads(self._usual)  # ... and not of threads that others start later

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

    def judge(self, work: Callable[..., Any], *args: Any, one_at_a_time: Any = None) -> None:
        """Does `work`, which may take its time, on a judge's thread.

        Works of the same `one_at_a_time` follow one another, in order, on one thread: others do not wait for them.
        """
        if one_at_a_time is None:
            self._judges.post(work, *args)
            return
        with self._turn:
            queue = self._queues.setdefault(id(one_at_a_time), deque())
            queue.append((work, args))
            if len(queue) == 1:  # nobody works on it
                self._judges.post(self._work_off, id(one_at_a_time), one_at_a_time)

    def _work_off(self, key: int, target: Any) -> None:
        """The queue of a target, which stays alive, and its id its own, until the queue is empty."""
        while True:
            item = self._queues[key][0]
            item[0](*item[1])
            with self._turn:
                queue = self._queues.get(key)
                if not queue or queue[0] is not item:  # it was given up: another thread works on the queue
                    return
                queue.popleft()
                if not queue:
                    del self._queues[key]
                    return

    def abandon(self, thread: threading.Thread, one_at_a_time: Any = None) -> None:
        """Gives up a judge's thread that does not come back; what waits behind it goes on, on another."""
        self.abandoned += 1
        with self._turn:
            if one_at_a_time is not None and (queue := self._queues.get(id(one_at_a_time))):
                queue.popleft()
                if queue:
                    self._judges.post(self._work_off, id(one_at_a_time), one_at_a_time)
                else:
                    del self._queues[id(one_at_a_time)]
        self._judges.replace(thread)
        torch.set_num_threads(self._usual)

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


class Locks:
    """A lock for each object that may be called by one thread at a time only."""

    def __init__(self) -> None:
        self._locks: weakref.WeakKeyDictionary[Any, threading.Lock] = weakref.WeakKeyDictionary()
        self._any = threading.Lock()

    def of(self, target: Any) -> threading.Lock:
        """The target's lock; objects that cannot be told apart weakly share one."""
        target = getattr(target, "__self__", target)
        try:
            return self._locks.setdefault(target, threading.Lock())
        except TypeError:
            return self._any

    def renew(self, target: Any) -> None:
        """Gives the target a new lock: who holds the old one will not come back."""
        target = getattr(target, "__self__", target)
        try:
            self._locks[target] = threading.Lock()
        except TypeError:
            self._any = threading.Lock()
