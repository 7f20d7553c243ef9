"""A request on its way: its result, its updates, and how to end it; for threads and for asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from rollflow.entries import Replay
from rollflow.errors import Cancelled, shown
from rollflow.request import Request, Result
from rollflow.search.record import History
from rollflow.ticket import Evaluated, Finished, News, Refused, Started, Ticket
from rollflow.watching import Wake, Watchers

Status = Literal["queued", "running", "done", "cancelled", "failed"]
LOG = logging.getLogger("rollflow")


@runtime_checkable
class Owner(Protocol):
    """What a job needs of its engine."""

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request."""
        ...

    def peek(self, ticket: Ticket) -> concurrent.futures.Future[Image.Image | None]:
        """An image of its best particle so far."""
        ...

    def check_waiting(self) -> None:
        """Raises where waiting would never end."""
        ...

    def call_back(self, job: object, call: Callable[[], None]) -> None:
        """Makes a call of a job that may take its time, after those that came before of it, on a thread for that."""
        ...

    def clock(self) -> float:
        """Seconds."""
        ...


@dataclass(frozen=True)
class Update:
    """How far a request is.

    Attributes:
        committed_nfe: function evaluations that the algorithm was charged for so far.
        executed_nfe: what the device ran for it so far, its share of padding included.
        best_reward: the best reward so far; minus infinity before the first.
        level: the point of the time grid of the last particle.
        seconds: since the request was let in.
        job: whose update it is.
    """

    committed_nfe: int
    executed_nfe: int
    best_reward: float
    level: int
    seconds: float
    job: Job

    def image(self, timeout: float | None = None) -> Image.Image | None:
        """The best so far, at the time of this call, decoded for it; None before the first particle.

        It waits for a lane of the device. In asyncio, call it by `await asyncio.to_thread(update.image)`.

        Raises:
            TimeoutError: the timeout passed.
            RollflowError: the image cannot be made, or the call would wait for itself.
        """
        return self.job._image(timeout)


class Job:
    """A request that an engine works on.

    Waiting and callbacks follow `concurrent.futures.Future`; `await job` and `async for update in job` work in any
    asyncio loop. An awaiting task that is cancelled cancels the job, as it would a future of asyncio's; protect it with
    `asyncio.shield`.

    Attributes:
        id: as given to `Engine.submit`, or a number.
        number: of its request in the ledger; -1 before it is there.
        request: what was asked.
    """

    def __init__(
        self,
        identity: Any,
        request: Request,
        owner: Owner,
        render: Callable[[Finished], Result],
        keep: object = None,
        spent: float = 0.0,
        of: str = "",
    ):
        self.id, self.request = identity, request
        self._keep = keep  # the engine, which would end its work if nobody referred to it
        self._owner: Owner | None = owner  # until nothing more will come: a job does not keep its engine alive
        self._render, self._rendered = render, dict[int, Result]()
        self._ticket: Ticket | None = None
        self.number = -1
        self._future: concurrent.futures.Future[Finished] = concurrent.futures.Future()
        self._future.set_running_or_notify_cancel()  # it ends by `cancel` of the job alone
        self._best: concurrent.futures.Future[Finished | None] = concurrent.futures.Future()
        self._status: Status = "queued"
        self._lock = threading.Lock()
        self._history: History | None = None
        self._started, self._ended, self._nfe = 0.0, 0.0, 0
        self._spent, self._of = spent, of  # seconds that other processes have run it; the kind of its engine
        self._watchers = Watchers()

    def __repr__(self) -> str:
        return f"Job({shown(self.id)}, {self._status}, {shown(self.request.prompt, 60)})"

    @property
    def status(self) -> Status:
        """ "queued", "running", "done", "cancelled" or "failed"."""
        return self._status

    def done(self) -> bool:
        """Whether it is over, however it ended."""
        return self._future.done()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._status == "cancelled"

    def running(self) -> bool:
        """Whether it was let in and is not over."""
        return self._status == "running"

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the result.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: the timeout passed; the job goes on.
            Cancelled: the job was cancelled.
            RollflowError: what made this request fail; its cause is the original error.
        """
        self._wait(self._future, timeout)
        return self._result(self._future.result())

    def _result(self, finished: Finished) -> Result:
        """Made when it is first asked for, on the caller's thread: a long history takes its time."""
        with self._lock:
            if not self._rendered:
                self._rendered[0] = self._render(finished)
            return self._rendered[0]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Waits for the end; the error that `result` would raise, or None."""
        self._wait(self._future, timeout)
        return self._future.exception()

    def best(self, timeout: float | None = None) -> Result | None:
        """Of a job that is over its result; of a cancelled one the best that it had found, None if there was nothing.

        Raises:
            TimeoutError: the timeout passed before the job was over, and its image made.
            RollflowError: what made this request fail.
        """
        self._wait(self._best, timeout)
        finished = self._best.result()
        return None if finished is None else self._result(finished)

    def cancel(self) -> bool:
        """Asks for its end; False if it is over already.

        Its queued rows go at once, and rows that are on the device are dropped when they come back. `result` raises
        `Cancelled`, and `best` gives what was found until then.
        """
        owner, ticket = self._owner, self._ticket
        if owner is None or ticket is None or not self._close("cancelled"):
            return False
        owner.cancel(ticket)
        self._finish(error=Cancelled(f"the job {shown(self.id)} was cancelled"))
        return True

    def add_done_callback(self, function: Callable[[Job], object]) -> None:
        """Calls `function(job)` when it is over, or at once if it is over already.

        Callbacks of a job follow one another on a thread for callbacks, so that a slow one holds up no search and no
        other job's; when nothing of the job is left in its engine, they are called on this thread. An error of the
        function is logged and harms nobody. It must not wait for the engine: `submit` works in it.
        """
        self._future.add_done_callback(lambda _: self._call_back(function))

    def _call_back(self, function: Callable[[Job], object]) -> None:
        def call() -> None:
            try:
                function(self)
            except BaseException as error:  # SystemExit too: on a thread of the engine it would end everybody's work
                if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
                    raise
                LOG.exception("a callback of the job %s raised", shown(self.id))

        if (owner := self._owner) is None:
            call()
        else:
            owner.call_back(self, call)

    # Updates.

    @property
    def update(self) -> Update | None:
        """How far it is now; None before it was let in."""
        history = self._history
        if history is None:
            return None
        owner = self._owner
        now = self._ended if owner is None or self._future.done() else owner.clock()
        seconds = max(0.0, now - self._started)
        return Update(history.committed, history.executed, history.best, history.level, seconds, self)

    def __iter__(self) -> Iterator[Update]:
        """Updates as rewards come, until it is over. A slow reader misses some, but never the last."""
        changed = threading.Event()
        with self.watched(changed.set):
            while True:
                over = self._future.done()
                if (update := self.update) is not None:
                    yield update
                if over:
                    return
                self._check()
                changed.wait()
                changed.clear()

    async def __aiter__(self) -> AsyncIterator[Update]:
        """As `__iter__`, for asyncio."""
        wake = Wake(asyncio.get_running_loop())
        with self.watched(wake):
            while True:
                over = self._future.done()
                if (update := self.update) is not None:
                    yield update
                if over:
                    return
                self._check()
                await wake.wait()

    def __await__(self) -> Generator[Any, None, Result]:
        return self._awaited().__await__()

    async def _awaited(self) -> Result:
        try:
            await self.over()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._result(self._future.result())

    async def over(self) -> None:
        """Waits until it is over, however it ends."""
        wake = Wake(asyncio.get_running_loop())
        self._future.add_done_callback(lambda _: wake())
        while not self._future.done():
            self._check()
            await wake.wait()

    def entries(self, start: int = 0) -> Replay:
        """What has to be kept of it so that another process can go on with it; of any thread.

        Args:
            start: from which of its evaluations on.
        """
        history, update = self._history, self.update
        if history is None or update is None:
            return Replay()
        stopped = history.stopped  # before the entries, which may be of a finish
        return Replay(
            history.entries(start), history.scales, self._nfe, self._spent + update.seconds, stopped, self._of
        )

    @property
    def spent(self) -> float:
        """Seconds that other processes have run it, before this one went on."""
        return self._spent

    @property
    def resumed(self) -> int | None:
        """How many evaluations of another process it went on from; None before it was let in."""
        history = self._history
        return None if history is None else history.resumed

    def watched(self, wake: Callable[[], None]) -> AbstractContextManager[None]:
        """Inside of the context, `wake` is called whenever something changes, on any thread; it returns at once."""
        return self._watchers.watched(wake)

    def rewards(self, start: int = 0) -> list[tuple[int, int, float | None]]:
        """Of each committed evaluation from an index on its NFE, its level and its reward; of any thread."""
        return [] if self._history is None else self._history.rewards(start)

    def _check(self) -> None:
        if (owner := self._owner) is not None and not self._future.done():
            owner.check_waiting()

    def _wait(self, future: concurrent.futures.Future, timeout: float | None) -> None:
        if not future.done():
            if (owner := self._owner) is not None:
                owner.check_waiting()
            if not concurrent.futures.wait([future], timeout).done:
                raise TimeoutError(f"the job {shown(self.id)} was not over within {timeout:g} s; it goes on")

    def _image(self, timeout: float | None) -> Image.Image | None:
        owner, ticket = self._owner, self._ticket
        if owner is None or ticket is None or self._future.done():
            best = self.best(timeout) if self._status in ("done", "cancelled") else None
            return None if best is None else best.image
        owner.check_waiting()
        peeked = owner.peek(ticket)
        if not concurrent.futures.wait([peeked], timeout).done:
            raise TimeoutError(f"the image of the job {shown(self.id)} was not there within {timeout:g} s")
        image = peeked.result()
        if image is None and self._future.done():  # it ended in between
            return self._image(timeout)
        return image

    def begin(self, submit: Callable[[Callable[[News], None]], Ticket]) -> None:
        """Hands it to the loop."""
        with self._lock:  # the loop's news wait until it is known what they are of
            self._ticket = submit(self.tell)
            self.number = self._ticket.id

    # What the loop tells, on its own thread.

    def tell(self, news: News) -> None:
        """Takes the loop's news."""
        if isinstance(news, Evaluated):
            self._watchers.wake()
        elif isinstance(news, Started):
            self._nfe, self._started = news.nfe, news.seconds
            self._history = news.history
            with self._lock:
                if self._status == "queued":
                    self._status = "running"
            self._watchers.wake()
        elif isinstance(news, Finished):
            self._finished(news)
        else:
            self._refused(news)

    def _finished(self, news: Finished) -> None:
        if not self._best.done():
            self._best.set_result(news)
        if self._close("done"):
            self._finish(result=news)
        self._settled()

    def _refused(self, news: Refused) -> None:
        cancelled = isinstance(news.error, Cancelled)
        if self._close("cancelled" if cancelled else "failed"):
            self._finish(error=news.error)
        if news.last:
            if not self._best.done():
                if cancelled:
                    self._best.set_result(None)
                else:
                    self._best.set_exception(news.error)
            self._settled()

    def _close(self, status: Status) -> bool:
        with self._lock:
            if self._status not in ("queued", "running"):
                return False
            self._status = status
            if (owner := self._owner) is not None:
                self._ended = owner.clock()  # before anybody can see that it is over
            return True

    def _settled(self) -> None:
        """Nothing more will come: the engine is no longer needed."""
        self._owner = self._ticket = self._keep = None

    def _finish(self, result: Finished | None = None, error: BaseException | None = None) -> None:
        with suppress(concurrent.futures.InvalidStateError):  # on the loop's thread an error would end the engine
            if result is not None:
                self._future.set_result(result)
            else:
                self._future.set_exception(error)
        self._watchers.wake()
