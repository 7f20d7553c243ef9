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
from typing import Any, Literal

from rollflow import wire
from rollflow.errors import Abandoned, EngineClosed, EngineDead, RequestError, RollflowError, said, shown, told
from rollflow.job import Job
from rollflow.journal import Journal, Kept
from rollflow.pictures import described, written
from rollflow.request import Request

PACE = 0.05  # seconds between looks at what is new: scores are written behind
LOG = logging.getLogger("rollflow")


class Followed:
    """A job that is kept: how many of its scores are, and since when its request is."""

    def __init__(self, job: Job, promise: concurrent.futures.Future[None] | None, start: int):
        self.job, self.promise, self.start = job, promise, start
        self.fits = start == 0  # whether it is known that it goes on from what was kept
        self.ended = False
        self.watched: AbstractContextManager[None] | None = None


class Journaling:
    """Writes what becomes of an engine's jobs into a journal. All of it happens on one thread of its own.

    Args:
        journal: where to; it is closed with this.
        clock: of the engine, which deadlines count on.
    """

    def __init__(self, journal: Journal, clock: Callable[[], float]):
        self.journal, self._clock = journal, clock
        self._followed: dict[str, Followed] = {}  # until their ends are durable
        self._changed: dict[str, None] = {}
        self._lock, self._wake, self._closing = threading.Lock(), threading.Event(), False
        self._resumed = set[str]()
        self._empty = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    # On callers' threads.

    def named(self, id: Any) -> str:
        """What a job is called in the journal.

        Raises:
            RequestError: another job of the engine is called that, or it is no text.
        """
        name = f"job-{secrets.token_hex(8)}" if id is None else str(id)
        if not name.isprintable():
            raise RequestError(f"id={shown(name)}: in a journal it is a text without control characters")
        if name in self._followed:
            raise RequestError(f"id={shown(name)}: the journal has a search of that id; give another one")
        return name

    def request(self, asked: Request) -> dict[str, Any]:
        """A request as it is kept; raises `RequestError` for one that cannot be."""
        return wire.to_json(asked, self._clock)

    def claimed(self) -> list[Kept]:
        """What was begun by another engine and is not over, each once."""
        found = self.journal.unfinished(left=True)
        with self._lock:
            found = [kept for kept in found if kept.id not in self._resumed]
            self._resumed.update(kept.id for kept in found)
        return found

    def asked(self, kept: Kept) -> Request:
        """The request of a search that was kept; raises `RequestError` where it cannot be made any more."""
        own = {name: value for name, value in kept.request.items() if name[:1] != "_"}  # the rest is a server's
        return wire.from_json(own, self._clock)

    def accept(self, job: Job, request: dict[str, Any]) -> None:
        """Begins to keep a job; `wait` says when its request is durable."""
        with self._lock:
            if job.id in self._followed:
                raise RequestError(f"id={shown(job.id)}: the journal has a search of that id; give another one")
            followed = self._followed[job.id] = Followed(job, self.journal.accept(job.id, request), 0)
        self._follow(followed)

    def resume(self, job: Job, kept: Kept) -> None:
        """Keeps what becomes of a job that was kept before."""
        with self._lock:
            followed = self._followed[job.id] = Followed(job, None, len(kept.replay.entries))
        self._follow(followed)

    def wait(self, jobs: Sequence[Job]) -> None:
        """Waits until requests are durable; raises the first error. Who cancels the others then has that kept, too."""
        with self._lock:
            promises = [self._followed[job.id].promise for job in jobs if job.id in self._followed]
        for promise in promises:
            if promise is not None:
                promise.result()

    def flush(self) -> None:
        """Waits until the ends of all jobs that are over are durable."""
        with self._lock:
            over = [one for one in self._followed.values() if one.job.done()]
            self._empty.wait_for(lambda: all(self._followed.get(one.job.id) is not one for one in over))
        self.journal.flush()

    def close(self) -> None:
        """No job will go on: writes what is left, and closes the journal."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self.journal.close()

    def _follow(self, followed: Followed) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rollflow-journaling", daemon=True)
                self._thread.start()
        touch = partial(self._touch, followed.job.id)
        followed.watched = followed.job.watched(touch)
        followed.watched.__enter__()
        if followed.promise is not None:
            followed.promise.add_done_callback(lambda _: touch())
        touch()

    def _touch(self, id: str) -> None:
        """Of any thread: something changed, the end included."""
        with self._lock:  # or it could come into what was taken already
            self._changed[id] = None
        if not self._wake.is_set():
            self._wake.set()

    # On its own.

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                changed, self._changed = self._changed, {}
            self._look([*changed])
            if not self._closing:
                time.sleep(PACE)
        self._look([*self._followed])

    def _look(self, ids: Sequence[str]) -> None:
        for id in ids:
            followed = self._followed.get(id)
            if followed is None or followed.ended:
                continue
            try:
                self._write(followed)
            except Exception as error:  # of one job: the others are kept on
                LOG.exception("the job %s could not be kept (%s): it would be done again", id, said(error))

    def _write(self, followed: Followed) -> None:
        """Writes what is new of a job, once its request is there."""
        promise, job = followed.promise, followed.job
        if promise is not None and not promise.done():  # it will be touched again
            return
        if promise is not None and promise.exception() is not None:  # it is not in the journal, or another's
            self._leave(followed)
            return
        over = job.done()  # before the scores are looked at
        error = job.exception() if over else None
        if not over or isinstance(error, EngineDead | EngineClosed | Abandoned):  # another engine may go on with it
            self._keep(followed)
        if not over:
            return
        followed.ended = True
        if followed.watched is not None:
            followed.watched.__exit__(None, None, None)
        if not isinstance(error, EngineDead | EngineClosed | Abandoned):
            self._end(job, error).add_done_callback(lambda _: self._leave(followed))

    def _end(self, job: Job, error: BaseException | None) -> concurrent.futures.Future[None]:
        if error is None:
            try:
                result = job.result()
                kind, file = written(result)
                return self.journal.finish(job.id, described(result, kind), file)
            except EngineClosed:
                raise
            except Exception as fault:
                error = fault
        status: Literal["failed", "cancelled"] = "cancelled" if job.cancelled() else "failed"
        return self.journal.fail(job.id, status, told(error))

    def _keep(self, followed: Followed) -> None:
        """Hands over the scores that are new."""
        job = followed.job
        if not followed.fits:
            if job.resumed is None:
                return
            followed.fits = True
            if job.resumed == 0:  # what was kept did not: it began anew
                self._restart(followed)
        new = job.entries(followed.start)
        try:
            self.journal.log(job.id, followed.start, new)
        except RollflowError:  # some before could not be written
            self._restart(followed)
            new = job.entries()
            self.journal.log(job.id, 0, new)
        followed.start += len(new.entries)

    def _restart(self, followed: Followed) -> None:
        self.journal.restart(followed.job.id)
        followed.start = 0

    def _leave(self, followed: Followed) -> None:
        with self._lock:
            if self._followed.get(followed.job.id) is followed:
                del self._followed[followed.job.id]
            self._empty.notify_all()
