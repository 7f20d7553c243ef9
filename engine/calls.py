"""Calls that wait for several requests: their jobs, how far they are, and what comes of them, in order."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rollflow import checks
from rollflow.entries import Replay
from rollflow.errors import FunctionError, RollflowError, said
from rollflow.job import Job
from rollflow.request import Request

LEAST_SECONDS = 1e-3  # of a search whose time was used up elsewhere: it ends with the first that it has
Asked = TypeVar("Asked")
Jobs = Sequence[Job | RollflowError]  # in place of a request that was refused, its error


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told when rewards have come: of the requests of one call, in their order."""

    committed_nfe: tuple[int, ...]
    best_reward: tuple[float, ...]


def left_of(request: Request, replay: Replay | None) -> Request:
    """The request that a search is resumed by: with the budget that it had settled on, and the time that is left."""
    if replay is None or not replay.nfe:
        return request
    left = None if request.seconds is None else max(LEAST_SECONDS, request.seconds - replay.seconds)
    return replace(request, nfe=replay.nfe, seconds=left)


def submitted(
    requests: Sequence[Any], check: Callable[[Any], Asked], submit: Callable[[Asked], Job], return_exceptions: bool
) -> list[Job | RollflowError]:
    """A job for each request; errors of requests in their places, or the first of them before anything runs."""
    asked: list[tuple[Asked] | RollflowError] = []
    requests = checks.listed(requests, "requests")
    for i, request in enumerate(requests):
        try:
            asked.append((check(request),))
        except RollflowError as error:
            if not return_exceptions:
                raise indexed(error, i, len(requests)) from error.__cause__
            asked.append(error)
    jobs: list[Job | RollflowError] = []
    try:
        for one in asked:
            jobs.append(submit(*one) if isinstance(one, tuple) else one)
    except BaseException:
        cancel(jobs)
        raise
    return jobs


async def on_a_thread(submit: Callable[[], Jobs]) -> Jobs:
    """The jobs that `submit` makes on a thread; a task that is cancelled meanwhile cancels them when they come."""
    made: list[Job | RollflowError] = []
    left = threading.Event()

    def work() -> None:
        made.extend(submit())
        if left.is_set():
            cancel(made)

    try:
        await asyncio.to_thread(work)
    except BaseException:  # cancelled: the thread goes on, and sees one of the two
        left.set()
        cancel(made)
        raise
    return made


def follow(jobs: Jobs, on_progress: Callable[[Progress], None] | None) -> None:
    """Waits for all jobs, and tells how far they are."""
    running = [job for job in jobs if isinstance(job, Job)]
    if on_progress is None:
        concurrent.futures.wait([job._future for job in running])
        return
    changed, told = threading.Event(), None
    with ExitStack() as watches:
        for job in running:
            watches.enter_context(job.watched(changed.set))
        over = False
        while not over:
            if not all(job.done() for job in running):
                changed.wait()
                changed.clear()
            over = all(job.done() for job in running)
            state = _progress(jobs)
            if state != told and any(state.committed_nfe):
                told = state
                try:
                    on_progress(state)
                except Exception as error:
                    raise FunctionError(f"the progress callback raised {said(error)}") from error


def cancel(jobs: Jobs) -> None:
    """Ends all jobs."""
    for job in jobs:
        if isinstance(job, Job):
            job.cancel()


def collected(jobs: Jobs, return_exceptions: bool) -> list[Any]:
    """The results of jobs that are over, with errors in their places, or else the first of them raised."""
    found: list[Any] = []
    for i, job in enumerate(jobs):
        error = job.exception() if isinstance(job, Job) else job
        if error is not None and not return_exceptions:
            raise indexed(error, i, len(jobs)) from error.__cause__
        found.append(job.result() if isinstance(job, Job) and error is None else error)
    return found


def mapped(
    requests: Iterable[Any],
    submit: Callable[[Any], Job],
    check_waiting: Callable[[], None],
    concurrency: int,
    return_exceptions: bool,
) -> Iterator[tuple[int, Any]]:
    """Yields `(index, result)` of requests as they finish, `concurrency` of them at a time; see `Engine.map`.

    What is done is yielded before more is taken: what comes next may depend on it.
    """
    running: dict[concurrent.futures.Future, tuple[int, Job]] = {}
    numbered = enumerate(_each(requests))
    try:
        while True:
            for future in [future for future in running if future.done()]:
                index, job = running.pop(future)
                failure = job.exception()
                if failure is not None and not return_exceptions:
                    raise indexed(failure, index, 2) from failure.__cause__
                yield index, job.result() if failure is None else failure
            if len(running) < concurrency and (one := next(numbered, None)) is not None:
                try:
                    job = submit(one[1])
                except RollflowError as error:
                    if not return_exceptions:
                        raise indexed(error, one[0], 2) from error.__cause__
                    yield one[0], error
                else:
                    running[job._future] = one[0], job
            elif running:
                check_waiting()
                concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
            else:
                return
    finally:
        cancel([job for _, job in running.values()])


def _each(requests: Iterable[Any]) -> Iterator[Any]:
    """The members of the caller's iterable; what it raises is the cause of a `FunctionError`."""
    try:
        yield from requests
    except Exception as error:
        raise FunctionError(f"the iterable of requests raised {said(error)}") from error


def _progress(jobs: Jobs) -> Progress:
    updates = [job.update if isinstance(job, Job) else None for job in jobs]
    return Progress(
        tuple(0 if update is None else update.committed_nfe for update in updates),
        tuple(float("-inf") if update is None else update.best_reward for update in updates),
    )


def indexed(error: BaseException, index: int, count: int) -> BaseException:
    """The error of one of several requests, with its place in the message."""
    if count == 1 or not isinstance(error, RollflowError):
        return error
    placed = copy.copy(error)
    placed.args = (f"request {index}: {error}", *error.args[1:])
    return placed
