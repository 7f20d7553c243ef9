"""The thread that runs a loop, and what others need of it: to start it, to ask it, to wait for it, to end it."""

from __future__ import annotations

import atexit
import concurrent.futures
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image

from rollflow.callbacks import Callbacks
from rollflow.device.runner import Runner
from rollflow.errors import EngineClosed, EngineDead, RollflowError, said
from rollflow.journaling import Journaling
from rollflow.loop import Loop
from rollflow.models import Geometry
from rollflow.models.text import Text
from rollflow.preparing import Preparations
from rollflow.request import picture
from rollflow.ticket import Ticket

CLOSING = 5.0  # seconds that a closing engine waits for each of its threads
LOG = logging.getLogger("rollflow")
T = TypeVar("T")


class Host:
    """Runs a loop on a thread of its own, from the first request until it is closed.

    Args:
        loop: what runs.
        runner: its device.
        preparations: what it prepares.
        keeping: keeps its requests in a journal, if there is one.
    """

    def __init__(self, loop: Loop, runner: Runner, preparations: Preparations, keeping: Journaling | None = None):
        self.loop, self.runner, self.preparations = loop, runner, preparations
        self.closed, self.keeping = False, keeping
        self._thread: threading.Thread | None = None
        self._callbacks: Callbacks | None = None
        self._lock, self._process = threading.Lock(), os.getpid()
        model: Any = runner.model
        self._return: Callable[[], None] | None = model.give_back if model.capabilities.returns else None
        if self._return is not None:
            model.borrow()
        _HOSTS.add(self)

    def start(self) -> None:
        """Makes sure that the loop runs.

        Raises:
            EngineClosed: it was closed.
            RollflowError: this is another process than the one that it was made in.
        """
        self._check_process()
        with self._lock:
            if self.closed:
                raise EngineClosed("the engine was closed: make a new one")
            if self._thread is None:
                self._callbacks = Callbacks()
                self._thread = threading.Thread(target=self._run, name="rollflow-loop", daemon=True)
                self._thread.start()

    def do(self, work: Callable[[], T]) -> T:
        """Has the loop's thread do something short, and returns what it gives."""
        self._check_process()
        if self._thread in (None, threading.current_thread()):
            return work()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        if not self.loop.call(_into, future, work):
            return work()
        return future.result()

    def prepare(self, texts: Iterable[Text], geometry: Geometry | None, measure: bool = False) -> None:
        """Encodes texts, for a size where that matters, or measures the size, and waits until that is done."""
        self.check_waiting()
        self.start()
        wanted: list[tuple[Text | None, Geometry | None]] = [(text, geometry) for text in dict.fromkeys(texts)]
        wanted += [(None, geometry)] if measure else []
        futures = []
        for prompt, size in wanted:
            future: concurrent.futures.Future[None] = concurrent.futures.Future()
            then = partial(_settle, future, None)
            if not self.loop.call(self.preparations.want, prompt, size, then):
                raise EngineClosed("the engine was closed: make a new one")
            futures.append(future)
        for future in futures:
            future.result()

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request."""
        self.loop.cancel(ticket)

    def peek(self, ticket: Ticket) -> concurrent.futures.Future[Image.Image | None]:
        """An image of a request's best particle so far; None where there is none yet."""
        future: concurrent.futures.Future[Image.Image | None] = concurrent.futures.Future()

        def then(pixels: torch.Tensor | None, error: BaseException | None) -> None:
            _settle(future, None if pixels is None else picture(pixels), error)

        self.loop.peek(ticket, then)
        return future

    def clock(self) -> float:
        """Seconds, as the loop counts them."""
        return self.loop.clock()

    def call_back(self, job: object, call: Callable[[], None]) -> None:
        """Makes a call of a job on a thread for callbacks, or where there is none, on this one."""
        callbacks = self._callbacks if os.getpid() == self._process else None  # a forked child has none
        if callbacks is None or not callbacks.post(job, call):
            call()

    @property
    def _own_threads(self) -> list[threading.Thread | None]:
        callbacks = [] if self._callbacks is None else self._callbacks.threads
        return [self._thread, *callbacks, *self.runner.threads.alive]

    def check_waiting(self) -> None:
        """Raises `RollflowError` on a thread that the engine works with, or in a forked process."""
        self._check_process()
        if threading.current_thread() in self._own_threads:
            raise RollflowError(
                "a reward, a method or a callback waits for the engine that waits for it: hand requests in by "
                "`submit`, and wait for them on a thread of your own"
            )

    def close(self, drain: bool, wait: bool = True) -> None:
        """See `rollflow.Engine.close`; without `wait` it only begins, and the threads end by themselves."""
        if os.getpid() != self._process:
            return  # a forked child has none of the threads
        with self._lock:
            self.preparations.closing = self.preparations.closing or not drain
            first, self.closed = not self.closed, True
            thread = self._thread
        if thread is None:
            if first:
                self._end(wait)
            return
        self.loop.close(drain)
        if wait and threading.current_thread() not in self._own_threads:
            thread.join()

    def _run(self) -> None:
        """What its thread does; a host whose engine was dropped is there until it is done."""
        running = True
        while running:
            try:
                running = self.loop.step()
            except BaseException as error:
                LOG.exception("the loop of an engine met a fault of rollflow")
                dead = EngineDead(f"a fault of rollflow ended the engine ({said(error)}): please report it")
                dead.__cause__ = error
                self.loop.fail(dead)
        self._end(wait=True)

    def _end(self, wait: bool) -> None:
        """Gives threads and memory back; where it waits for the threads, it says how many did not end."""
        seconds = CLOSING if wait else 0.0
        left = self.runner.threads.close(seconds)
        self.runner.free()
        self.preparations.end()
        if self._callbacks is not None:
            left += self._callbacks.close(seconds)
        if self.keeping is not None:
            self.keeping.close()
        if self._return is not None:
            try:
                self._return()
            except Exception:
                LOG.exception("the model of a closed engine could not give back what it had borrowed")
        if left and wait:
            LOG.warning("%d threads of a closed engine are still in calls that do not come back", len(left))

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RollflowError(
                f"this engine was made in process {self._process}, and its threads are there: after a fork, make an "
                "engine in the child, or start children by 'spawn'"
            )


_HOSTS: weakref.WeakSet[Host] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the threads of every engine while the interpreter and torch are still whole."""
    for host in [*_HOSTS]:
        host.close(drain=False)


def _into(future: concurrent.futures.Future[T], work: Callable[[], T]) -> None:
    try:
        _settle(future, work(), None)
    except BaseException as error:
        _settle(future, None, error)


def _settle(future: concurrent.futures.Future, value: Any, error: BaseException | None) -> None:
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
