"""Two kinds of load: requests that come at times of their own, and requests that come when others are over.

In an open loop nobody waits for anybody, as users who do not know each other: what a slow moment costs is seen by all
who come meanwhile. A closed loop keeps so many requests in flight, and comes less often where the engine is slow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from rollflow.job import Job

Submit = Callable[[int], Job]


@runtime_checkable
class Clock(Protocol):
    """What the loads need of time."""

    def now(self) -> float:
        """Seconds."""
        ...

    def sleep(self, seconds: float) -> None:
        """Lets this many seconds pass."""
        ...

    def acquire(self, over: threading.Semaphore) -> None:
        """Waits until the semaphore was released once more."""
        ...


class Wall(Clock):
    """Real time, of the clock by which engines tell theirs."""

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleeps."""
        time.sleep(seconds)

    def acquire(self, over: threading.Semaphore) -> None:
        """Blocks."""
        over.acquire()


class Passage:
    """When what happened to one request, in seconds of the clock; None for what did not happen yet.

    Attributes:
        due: when it was to be submitted. Every latency counts from here, also where the submitter was late: who counts
            from the submission leaves out the waits that a slow engine causes (coordinated omission).
        submitted: when `submit` returned.
        admitted: when the engine let it in.
        updated: when the first update with a reward came, or the end where none came before.
        ended: when its result was there; the image object is made later, on the thread that asks for it.
        error: what it failed with.
    """

    def __init__(self, due: float, clock: Clock, over: Callable[[], None]):
        self.due = due
        self.submitted: float | None = None
        self.admitted: float | None = None
        self.updated: float | None = None
        self.ended: float | None = None
        self.error: BaseException | None = None
        self._clock, self._over, self._watch = clock, over, threading.Lock()
        self._watching = ExitStack()

    def follow(self, job: Job) -> None:
        """Writes down the times of a job that was just submitted, as the engine's thread tells of them."""
        self.submitted = self._clock.now()
        self._watching.enter_context(job.watched(lambda: self._see(job)))
        self._see(job)  # what it told before anybody watched
        job.add_done_callback(self._end)

    def _see(self, job: Job) -> None:
        with self._watch:
            if self.updated is None and (update := job.update) is not None:
                now = self._clock.now()
                if self.admitted is None:
                    self.admitted = now - update.seconds
                if update.committed_nfe:
                    self.updated = now

    def _end(self, job: Job) -> None:
        self.ended, self.error = self._clock.now(), job.exception()
        self._watching.close()
        self._see(job)
        if self.updated is None:
            self.updated = self.ended
        self._over()


def poisson(rate: float, count: int, seed: Sequence[int]) -> Float[ndarray, " request"]:
    """The times of the first `count` arrivals of a Poisson process: gaps are exponential of mean `1 / rate` seconds."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count))


def open_loop(submit: Submit, arrivals: Float[ndarray, " request"], clock: Clock) -> list[Passage]:
    """Submits request i at `arrivals[i]` seconds from now, whatever became of the others; waits for all in the end.

    Raises:
        RollflowError: the first error of a request, or of its submission.
    """
    over, start = threading.Semaphore(0), clock.now()
    passages = [Passage(start + float(arrival), clock, over.release) for arrival in arrivals]
    for i, passage in enumerate(passages):
        early = passage.due - clock.now()
        if early > 0:
            clock.sleep(early)
        passage.follow(submit(i))
    for _ in passages:
        clock.acquire(over)
    return _without_errors(passages)


def closed_loop(submit: Submit, count: int, concurrency: int, seconds: float, clock: Clock) -> list[Passage]:
    """Keeps `concurrency` requests in flight, until `count` came or `seconds` are over; waits for all in the end.

    Raises:
        RollflowError: the first error of a request, or of its submission.
    """
    over, passages, start, running = threading.Semaphore(0), list[Passage](), clock.now(), 0
    while len(passages) < count:
        if running == concurrency:
            clock.acquire(over)
            running -= 1
        if (now := clock.now()) - start >= seconds:
            break
        passage = Passage(now, clock, over.release)
        passages.append(passage)
        passage.follow(submit(len(passages) - 1))
        running += 1
    for _ in range(running):
        clock.acquire(over)
    return _without_errors(passages)


def _without_errors(passages: list[Passage]) -> list[Passage]:
    for passage in passages:
        if passage.error is not None:
            raise passage.error
    return passages
