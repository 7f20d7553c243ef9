"""The threads that work for an engine: lanes, which run batches, and judges, which call rewards."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

JUDGES = 8  # rewards that may be waited for at a time
T = TypeVar("T")


class Lanes:
    """Threads that run batches side by side on a CPU; on a GPU, the one thread that talks to it.

    A model of many small operations gains little from several threads an operation: two batches on a thread each are
    nearly twice as fast on two cores as one batch on two threads.

    Args:
        device: where the batches run.
        count: how many batches may be on the device at a time.
        threads: cores that an operation of a lane uses, on a CPU.
    """

    def __init__(self, device: torch.device, count: int, threads: int):
        self.count, self.threads = count, threads
        self.parallel = device.type == "cpu"
        workers, usual = (count if self.parallel else 1), torch.get_num_threads()
        ready = threading.Barrier(workers + JUDGES + 1)

        def start() -> None:
            try:
                if device.type == "cuda":
                    torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device.index)
                else:
                    torch.get_num_threads()  # or the first operation would set the thread's number to the usual one
                    torch.set_num_threads(threads)  # of this thread ...
            except BaseException:
                ready.abort()  # the caller waits for it
                raise

        self._lanes = ThreadPoolExecutor(workers, "rollflow-lane", start)
        self._judges = ThreadPoolExecutor(JUDGES, "rollflow-judge", start)
        self._watcher = ThreadPoolExecutor(1, "rollflow-watcher", start) if device.type == "cuda" else self._judges
        self._turn, self._queues = threading.Lock(), dict[int, deque[tuple[Callable[..., Any], tuple]]]()
        for _ in range(workers):  # all start now, before the usual number is restored
            self._lanes.submit(ready.wait)
        for _ in range(JUDGES):
            self._judges.submit(ready.wait)
        ready.wait()
        torch.set_num_threads(usual)  # ... and not of threads that others start later

    def __repr__(self) -> str:
        return f"Lanes(count={self.count}, threads={self.threads})"

    def run(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """Does `work` on a lane."""
        return self._lanes.submit(work, *args)

    def judge(self, work: Callable[..., Any], *args: Any, one_at_a_time: Any = None) -> None:
        """Does `work`, which may take its time, on a judge's thread.

        Works of the same `one_at_a_time` follow one another, in order, on one thread: others do not wait for them.
        """
        if one_at_a_time is None:
            self._judges.submit(work, *args)
            return
        with self._turn:
            queue = self._queues.setdefault(id(one_at_a_time), deque())
            queue.append((work, args))
            if len(queue) == 1:  # nobody works on it
                self._judges.submit(self._work_off, id(one_at_a_time), one_at_a_time)

    def _work_off(self, key: int, target: Any) -> None:
        """The queue of a target, which stays alive, and its id its own, until the queue is empty."""
        while True:
            work, args = self._queues[key][0]
            work(*args)
            with self._turn:
                self._queues[key].popleft()
                if not self._queues[key]:
                    del self._queues[key]
                    return

    def watch(self, work: Callable[..., Any], *args: Any) -> None:
        """Does `work`, which waits for a GPU, on a thread of its own."""
        self._watcher.submit(work, *args)

    def close(self) -> None:
        """Ends the threads when they are idle."""
        for pool in (self._lanes, self._judges, self._watcher):
            pool.shutdown(wait=False)


class Locks:
    """A lock for each object that may be called by one thread at a time only."""

    def __init__(self) -> None:
        self._locks: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
        self._any = threading.Lock()

    def of(self, target: Any) -> threading.Lock:
        """The target's lock; objects that cannot be told apart weakly share one."""
        target = getattr(target, "__self__", target)
        try:
            return self._locks.setdefault(target, threading.Lock())
        except TypeError:
            return self._any
