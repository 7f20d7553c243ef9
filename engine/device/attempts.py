"""Work on a lane that may fail: it is run again in smaller parts, until the error belongs to one request."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any

import torch

from rollflow.errors import EngineDead, ModelError, RollflowError, said
from rollflow.models import Geometry
from rollflow.row import Failed, Free, Report, Row, Show, Shrunk

After = Callable[[Callable[[], None]], None]  # what is to be done last; it is given what frees the lane


class Attempts:
    """Runs batches, whole if that goes, and in parts if it does not.

    A batch that does not fit into the device's memory is halved, and one row, if it was padded, is padded less; where a
    guided row kept all that its gradient needs, it runs again and keeps less. For any other error each request runs by
    itself. An error of the device itself fails all. Whatever goes wrong, all work is answered, and the lane is freed.

    Args:
        size: gives the size of the batch that work makes, padding included.
        spares: says whether a batch of one would take less memory the next time.
        shrink: is told the image size, the batch size that did not fit, and whether its rows are guided.
    """

    def __init__(
        self, size: Callable[[Any], int], spares: Callable[[Any], bool], shrink: Callable[[Geometry, int, bool], None]
    ):
        self._size, self._spares, self._shrink, self._warned = size, spares, shrink, False

    def run(self, run: Callable[[Any, Report], After | None], work: Sequence[Any], report: Report) -> None:
        """Runs `work`, on a lane; reports a free lane once, and every row or search once.

        Args:
            run: evaluates a part of it; returns what is to be done last, which frees the lane, if there is anything.
            work: rows, or searches that are over.
            report: takes the events.
        """
        left, free = [work], _Once(partial(report, Free()))
        try:
            while left:
                if self._run_last(run, left, report, free):
                    return
        except BaseException as error:  # of what surrounds the work, and not of a model: nothing was made to expect it
            while left:
                report(Failed(left.pop(), _fault(error)))
        free()

    def _run_last(
        self,
        run: Callable[[Any, Report], After | None],
        left: list[Sequence[Any]],
        report: Report,
        free: Callable[[], None],
    ) -> bool:
        """Runs the last part of what is left, which it replaces by what is left of it; True if `free` was handed on."""
        part, error = left[-1], None
        # Before it runs: what others find not to fit meanwhile makes later batches smaller.
        size, spares = self._size(part), self._spares(part)
        try:
            after = run(part, report)
        except BaseException as caught:
            error = caught
        if error is None:
            left.pop()
            return after is not None and self._finish(after, part, _nothing if left else free, report) and not left
        if is_fatal(error):
            while left:
                report(Failed(left.pop(), _dead(error)))
        elif out_of_memory(error) and (size > 1 or spares):
            error = None  # and with it the frames that hold the batch's tensors
            geometry, half, guided = part[0].brief.geometry, len(part) // 2, is_guided(part)
            self._shrink(geometry, size, guided)
            if size > 1:
                report(Shrunk(geometry, size, guided))
            left[-1:] = [part[half:], part[:half]] if half else [part]
        elif len(parts := _by_request(part)) > 1:
            self._warn_of(error, len(part))
            left[-1:] = parts[::-1]
        else:
            report(Failed(left.pop(), model_error(error)))
        return False

    def _finish(self, after: After, part: Sequence[Any], free: Callable[[], None], report: Report) -> bool:
        """Does what is to be done last; False if that fails, which by then is too late to try again."""
        try:
            after(free)
        except BaseException as error:
            report(Failed(part, _dead(error) if is_fatal(error) else _fault(error)))
            return False
        return True

    def _warn_of(self, error: BaseException, rows: int) -> None:
        if not self._warned:
            self._warned = True
            with suppress(RuntimeWarning):  # where warnings are errors, this thread is nobody's to raise it to
                warnings.warn(
                    f"a batch of {rows} rows failed ({said(error)}) and runs again request by "
                    "request, which is slower; what fails then fails alone. This warning comes once",
                    RuntimeWarning,
                    stacklevel=2,
                )


class _Once:
    """Calls a function the first time that it is called, on any thread."""

    def __init__(self, function: Callable[[], None]):
        self._function, self._lock = function, Lock()

    def __call__(self) -> None:
        if self._lock.acquire(blocking=False):  # for good
            self._function()


def is_guided(work: Sequence[Any]) -> bool:
    """Whether a batch is one of guided rows."""
    return isinstance(work[0], Row) and work[0].kind == "guided"


def image_count(work: Sequence[Any]) -> int:
    """How many images are made of rows, or of searches that are over."""
    return sum(len(one.candidates) if isinstance(one, Show) else 1 for one in work)


def _by_request(work: Sequence[Any]) -> list[list[Any]]:
    """Rows or searches by request, in order."""
    parts: dict[int, list[Any]] = {}
    for one in work:
        parts.setdefault(one.brief.ticket, []).append(one)
    return [*parts.values()]


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may do; the rewards of guided rows are part of theirs."""
    return isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError)


def is_fatal(error: BaseException) -> bool:
    """Whether the device can do no more work: torch's own type, or CUDA's message where torch has no type for it."""
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or (
        isinstance(error, RuntimeError) and str(error).startswith("CUDA error")
    )


def _dead(error: BaseException) -> EngineDead:
    dead = EngineDead(f"the device failed for good ({said(error)}): make a new engine")
    dead.__cause__ = error
    return dead


def _fault(error: BaseException) -> RollflowError:
    fault = RollflowError(
        f"the engine met a fault of its own in a batch of this request ({said(error)}): report it, and submit it again"
    )
    fault.__cause__ = error
    return fault


def model_error(error: BaseException) -> BaseException:
    """What a request is told of an error of the model."""
    if isinstance(error, RollflowError):
        return error
    kind, _, text = said(error).partition(": ")
    raised = ModelError(f"the model raised {kind} for a batch of this request: {text}")
    raised.__cause__ = error
    return raised


def _nothing() -> None:
    pass
