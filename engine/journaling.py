"""Keeps an engine's requests in a journal: before they are acknowledged, their scores soon after, and their ends."""

from __future__ import annotations

import concurrent.futures
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from rollflow import wire
from rollflow.errors import EngineClosed, EngineDead, RollflowError, said
from rollflow.job import Job
from rollflow.journal import Journal, Kept
from rollflow.pictures import described, written
from rollflow.request import Request

PACE = 0.05  # seconds between looks at what is new: scores are written behind
LOG = logging.getLogger("rollflow")


class Followed:
    """A job whose scores are kept, and how many are."""

    def __init__(self, job: Job, start: int):
        self.job, self.start, self.checked = job, start, start == 0
        self.watched: AbstractContextManager[None] | None = None


class Journaling:
    """Writes what becomes of an engine's jobs into a journal; one thread of its own looks at those that changed.

    Args:
        journal: where to.
        clock: of the engine, which deadlines count on.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float]):
        self.journal, self._clock = journal, clock
        self._promises: dict[str, concurrent.futures.Future[None]] = {}
        self._followed: dict[str, Followed] = {}
        self._changed: dict[str, None] = {}
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), False
        self._thread: threading.Thread | None = None

    def named(self, id: Any) -> str:
        """What a job is called in the journal."""
        return f"job-{secrets.token_hex(8)}" if id is None else str(id)

    def request(self, asked: Request) -> dict[str, Any]:
        """A request as it is kept; raises `RequestError` for one that cannot be."""
        return wire.to_json(asked, self._clock)

    def unfinished(self) -> list[tuple[Kept, Request]]:
        """What was begun by another engine and is not over."""
        found = [kept for kept in self.journal.unfinished() if kept.id not in self._followed]
        return [(kept, wire.from_json(kept.request, self._clock)) for kept in found]

    def accept(self, job: Job, request: dict[str, Any]) -> None:
        """Begins to keep a job's request; `wait` says when it is durable."""
        self._promises[job.id] = self.journal.accept(job.id, request)

    def wait(self, jobs: Sequence[Job]) -> None:
        """Waits until requests are durable, and follows their jobs from then on; raises the first error."""
        promises = [self._promises.pop(job.id) for job in jobs]
        for job, promise in zip(jobs, promises, strict=True):
            promise.result()
            self.follow(job)

    def follow(self, job: Job, kept: Kept | None = None) -> None:
        """Keeps a job's scores from now on, and its end; `kept` is what it was resumed from."""
        followed = Followed(job, 0 if kept is None else len(kept.replay.entries))
        with self._lock:
            self._followed[job.id] = followed
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rollflow-journaling", daemon=True)
                self._thread.start()
        followed.watched = job.watched(partial(self._touch, job.id))
        followed.watched.__enter__()
        self._touch(job.id)
        job.add_done_callback(partial(self._ended, followed))

    def leave_open(self) -> None:
        """The engine is about to end without finishing its jobs: they are still to be done, and stay so."""
        self._closing = True

    def close(self) -> None:
        """All jobs of the engine are over: writes what is left, and closes the journal."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self.journal.close()

    # On the engine's threads.

    def _touch(self, id: str) -> None:
        self._changed[id] = None
        if not self._wake.is_set():
            self._wake.set()

    def _ended(self, followed: Followed, job: Job) -> None:
        """On a thread for callbacks."""
        if followed.watched is not None:
            followed.watched.__exit__(None, None, None)
        error = job.exception()
        open_still = isinstance(error, EngineDead | EngineClosed) or (error is not None and self._closing)
        if open_still:  # another engine goes on with it
            self._keep(followed)
            return
        try:
            if error is None:
                result = job.result()
                kind, file = written(result)
                promise = self.journal.finish(job.id, described(result, kind), file)
            else:
                status = "cancelled" if job.cancelled() else "failed"
                promise = self.journal.fail(job.id, status, {"type": type(error).__name__, "message": str(error)})
            promise.add_done_callback(lambda _: self._followed.pop(job.id, None))
        except EngineClosed:  # the journal was closed meanwhile: the job is still to be done
            LOG.warning("the end of the job %s came after its journal was closed: it will be done again", job.id)

    # On its own.

    def _run(self) -> None:
        while not self._closing or self._changed:
            self._wake.wait()
            self._wake.clear()
            changed, self._changed = self._changed, {}
            with self._lock:
                jobs = [one for id in changed if (one := self._followed.get(id)) is not None]
            for followed in jobs:
                if not followed.job.done():
                    self._keep(followed)
            if not self._closing:
                time.sleep(PACE)

    def _keep(self, followed: Followed) -> None:
        """Hands over the scores that are new."""
        job = followed.job
        try:
            if not followed.checked and job.resumed is not None:
                followed.checked = True
                if job.resumed == 0:  # what was kept did not fit: it began anew
                    self.journal.restart(job.id)
                    followed.start = 0
            if followed.checked:
                new = job.entries(followed.start)
                self.journal.log(job.id, followed.start, new)
                followed.start += len(new.entries)
        except RollflowError as error:
            if job.done():  # and its scores are gone already
                return
            LOG.warning(
                "scores of the job %s could not be kept (%s): they would be computed again", job.id, said(error)
            )
