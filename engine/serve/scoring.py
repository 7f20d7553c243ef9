"""Calls a reward for many callers: calls that wait are judged together, and an error harms its own caller alone."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import rewards
from rollflow.errors import FunctionError, RequestError, said
from rollflow.rewards import Reward
from rollflow.serve.reward_bodies import Asked, Refused

SIZES = 1000  # of images, whose batches are known to be smaller
ENDED = "the server ended before this call was judged"
LANES = 8  # calls at a time of a reward that says that it is concurrent


class Judged(NamedTuple):
    """One call of a reward that is over: how many images, of how many callers, and what it took."""

    images: int
    callers: int
    seconds: float
    failed: bool


@dataclass(eq=False)
class _Waiting:
    asked: Asked
    answer: asyncio.Future[list[float]]
    since: float


class Scorer:
    """One reward behind a queue; its methods belong to one event loop, and the reward runs on threads.

    Calls whose images have the same size are judged together, whole and in the order in which they came. While the
    reward is busy others gather; when it is idle, the first one waits `wait` seconds for more.

    Args:
        reward: what judges.
        name: what callers call it.
        device: where images go before they are judged; None: they stay on the CPU.
        batch: the most images of a call of the reward, which may itself say fewer.
        wait: seconds.
        turns: are held, in this order, while the reward runs: of what another reward calls, too.
        told: is called after each call of the reward.
        clock: seconds.
    """

    def __init__(
        self,
        reward: Reward,
        name: str,
        *,
        device: torch.device | None = None,
        batch: int = 64,
        wait: float = 0.005,
        turns: Sequence[Lock] = (),
        told: Callable[[Judged], None] = lambda judged: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        terms = rewards.terms(reward)
        self.reward, self.name, self.wait = reward, name, wait
        self.batch = min(batch, terms.batch or batch)
        self._device, self._turns, self._told, self._clock = device, turns, told, clock
        self._size = rewards.size(reward)
        self._queue, self._more = deque[_Waiting](), asyncio.Event()
        self._running: dict[int, float] = {}  # lane -> when its call began
        self._jobs: dict[int, Future[list[list[float] | Refused]]] = {}  # lane -> its last call
        self._most: dict[tuple[int, ...], int] = {}  # shape of an image -> of how many there was memory
        self._closed = False
        self._pace = 0.0  # seconds an image, of the calls so far
        self._lanes = LANES if terms.concurrent else 1
        self._threads = ThreadPoolExecutor(self._lanes, thread_name_prefix=f"reward {name}")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to judge, on the running loop."""
        self._tasks = [asyncio.get_running_loop().create_task(self._lane(i)) for i in range(self._lanes)]

    async def close(self) -> None:
        """Ends; what waits still is refused, and a call of the reward that runs is not waited for."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self._queue:
            if not one.answer.done():
                one.answer.set_exception(Refused(503, ENDED, 1.0))
        self._queue.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def hangs(self) -> bool:
        """Whether a thread is in a call of the reward, also after the end."""
        return any(not job.done() for job in [*self._jobs.values()])

    @property
    def waiting(self) -> int:
        """Images that wait to be judged."""
        return sum(len(one.asked.prompts) for one in self._queue)

    @property
    def busy_seconds(self) -> float:
        """For how long the oldest call of the reward runs by now; 0 if none does."""
        return max((self._clock() - began for began in [*self._running.values()]), default=0.0)

    @property
    def seconds(self) -> float:
        """How long what waits will take, by the calls so far."""
        return self.waiting * self._pace / self._lanes

    def check(self, prompts: Sequence[str], size: tuple[int, int]) -> None:
        """Whether the reward can judge these prompts and this size; may take a moment: call it on a thread.

        Raises:
            Refused: it cannot; 422.
        """
        if self._size is not None and size != self._size:
            raise Refused(
                422, f"the reward {self.name} judges images of {self._size[0]}x{self._size[1]}, not {size[0]}x{size[1]}"
            )
        for prompt in dict.fromkeys(prompts):
            try:
                rewards.check(self.reward, prompt)
            except Exception as error:
                raise self._refusal(error) from error

    async def score(self, asked: Asked) -> list[float]:
        """Finite scores, one a row. A caller that is cancelled is not judged any more, if it was not already.

        Raises:
            Refused: the reward could not judge, with a status of HTTP: 422 never, 5xx perhaps later.
        """
        if self._closed:
            raise Refused(503, ENDED, 1.0)
        one = _Waiting(asked, asyncio.get_running_loop().create_future(), self._clock())
        self._queue.append(one)
        self._more.set()
        try:
            return await one.answer
        finally:
            with suppress(ValueError):  # only of a caller that is gone
                self._queue.remove(one)

    async def _lane(self, lane: int) -> None:
        while True:
            await self._gathered()
            calls = self._taken()
            if not calls:
                continue
            self._running[lane] = began = self._clock()
            try:
                self._jobs[lane] = job = self._threads.submit(self._judged, calls)
                found = await asyncio.wrap_future(job)
            except BaseException as error:
                found = [Refused(503, ENDED, 1.0)] * len(calls)
                if isinstance(error, asyncio.CancelledError):
                    raise
            finally:
                del self._running[lane]
                images = sum(len(one.asked.prompts) for one in calls)
                pace = (self._clock() - began) / images
                self._pace = pace if self._pace == 0 else 0.8 * self._pace + 0.2 * pace
                for one, answer in zip(calls, found, strict=True):
                    if one.answer.done():
                        continue
                    if isinstance(answer, Refused):
                        one.answer.set_exception(answer)
                    else:
                        one.answer.set_result(answer)

    async def _gathered(self) -> None:
        """Waits for a call, and then for more of them until there are enough or it has waited."""
        while True:
            self._more.clear()
            left = math.inf
            if self._queue:
                left = self._queue[0].since + self.wait - self._clock()
                if left <= 0 or self.waiting >= self.batch:
                    return
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._more.wait(), None if left == math.inf else left)

    def _taken(self) -> list[_Waiting]:
        """The calls that are judged next: the first, and others of its size in their order, as many as fit."""
        taken, rows = list[_Waiting](), 0
        most = self._batch(self._queue[0].asked.images) if self._queue else 0
        for one in self._queue:
            if taken and one.asked.images.shape[1:] != taken[0].asked.images.shape[1:]:
                continue
            if taken and rows + len(one.asked.prompts) > most:
                break
            taken.append(one)
            rows += len(one.asked.prompts)
        for one in taken:
            self._queue.remove(one)
        return taken

    def _batch(self, images: Tensor) -> int:
        """The most images of such a shape of a call of the reward."""
        return self._most.get(tuple(images.shape[1:]), self.batch)

    # On a thread of the reward.

    @torch.no_grad()
    def _judged(self, calls: Sequence[_Waiting]) -> list[list[float] | Refused]:
        """Scores or a refusal of each call: where one of several fails, each whose caller is there is judged by itself.

        An error that may pass is no call's own: all are to come again.
        """
        images = calls[0].asked.images if len(calls) == 1 else torch.cat([one.asked.images for one in calls])
        prompts = [prompt for one in calls for prompt in one.asked.prompts]
        start, failed = self._clock(), True
        try:
            scores = iter(self._scores(images, prompts))
            failed = False
        except BaseException as error:  # of somebody else's code: the server must go on
            if len(calls) == 1 or isinstance(error, rewards.retry_on(self.reward)):
                return [self._refusal(error) for _ in calls]
        finally:
            self._told(Judged(len(prompts), len(calls), self._clock() - start, failed))
        if failed:
            del images
            return [
                Refused(499, "the caller is gone") if one.answer.done() else self._judged([one])[0] for one in calls
            ]
        return [self._finite([next(scores) for _ in one.asked.prompts]) for one in calls]

    def _scores(self, images: Float[Tensor, "row *frame 3 height width"], prompts: list[str]) -> list[float]:
        """The reward's own scores; memory that runs out halves the calls with images of this shape from then on."""
        if self._device is not None:
            images = images.to(self._device)
        found, done = list[float](), 0
        while done < len(prompts):
            part = slice(done, done + self._batch(images))
            rows = len(prompts[part])
            try:
                with ExitStack() as held:
                    for turn in self._turns:
                        held.enter_context(turn)
                    scores = self.reward(images[part].contiguous(), prompts[part])
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                if len(self._most) >= SIZES:
                    self._most.clear()
                self._most[tuple(images.shape[1:])] = (rows + 1) // 2
                continue
            if not isinstance(scores, Tensor) or scores.shape != (rows,) or scores.is_complex():
                raise FunctionError(
                    f"the reward {self.name} returned {shape_of(scores)} for {rows} images: it must return one number "
                    "an image"
                )
            found += scores.double().cpu().tolist()
            done += rows
        return found

    def _finite(self, scores: list[float]) -> list[float] | Refused:
        for i, score in enumerate(scores):
            if not math.isfinite(score):  # the same image would have the same score again: never again
                return Refused(422, f"the reward {self.name} gave {score} for images[{i}]: a score must be finite")
        return scores

    def _refusal(self, error: BaseException) -> Refused:
        if isinstance(error, Refused):
            return error
        if isinstance(error, rewards.retry_on(self.reward)):
            return Refused(503, str(error) or said(error), max(1.0, self.seconds))
        if isinstance(error, RequestError):
            return Refused(422, str(error))
        return Refused(500, f"the reward {self.name} raised {said(error)}")


def shape_of(scores: object) -> str:
    """What a reward returned, for a message."""
    return f"a tensor of shape {[*scores.shape]}" if isinstance(scores, Tensor) else type(scores).__name__
