"""Calls rewards: on threads of their own, one call at a time for each, with retries and time limits.

A call judges images of several requests at once. If it fails, each request is judged by itself, so that one request's
prompt or image harms no other.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import rewards
from rollflow.copies import Download, upload
from rollflow.device.costs import RewardCost, Spent
from rollflow.device.judges import Turn
from rollflow.device.workers import Lanes
from rollflow.errors import FunctionError, RollflowError, said
from rollflow.profile.ledger import Ledger, current, working_for
from rollflow.rewards import FunctionReward, Reward
from rollflow.row import Again, Began, Brief, Event, Failed, Report, Row, Show
from rollflow.timers import Timer

RETRY_SECONDS = 0.2  # before the second call of a reward that was not available; doubled for each further one
LONGEST_RETRY = 30.0
NAMES = 256  # of rewards whose calls are counted
T = TypeVar("T")


class GivenUp(Exception):
    """A call on a lane took too long, and its rows have been told so."""


class Timed:
    """One call of a reward, which may have a time limit.

    Args:
        reward: what is called.
        work: rows, or searches that are over; all images of one belong to one request.

    Attributes:
        terms: what the reward says of how it is called.
        timer: of its time limit, while it runs.
    """

    def __init__(self, reward: Reward, work: Sequence[Row] | Sequence[Show]):
        self.reward, self.terms = reward, rewards.terms(reward)
        self.work: Sequence[Any] = work
        self.timer: Timer | None = None

    @property
    def images(self) -> int:
        """How many are judged."""
        return len(self.work)

    def give_up(self, seconds: float, report: Report) -> None:
        """Fails what it judges: it did not answer in time, and nobody waits for it any more."""
        error = FunctionError(
            f"the reward {rewards.title(self.reward)} did not answer for {self.images} images within its timeout of "
            f"{seconds:g} s"
        )
        error.__cause__ = TimeoutError(f"{seconds:g} s")
        self._fail(error, report)

    def _fail(self, error: BaseException, report: Report) -> None:
        report(Failed(self.work, error))


class Call(Timed):
    """A call of a reward on a judge's thread.

    Args:
        reward, work: see `Timed`.
        places: which of the images belong to each.
        make: makes the images, on the thread that judges.
        then: from the work and the scores of each one's images to what is reported.
        attempts: how often it was made again.
        failed: from the work and an error to what is reported.

    Attributes:
        batch: the number of the batch that it belongs to, in the ledger.
    """

    def __init__(
        self,
        reward: Reward,
        work: Sequence[Row] | Sequence[Show],
        places: Sequence[Sequence[int]],
        make: Callable[[], Float[Tensor, "image *frame 3 height width"]],
        then: Callable[[Any, list[list[float]]], Event | None],
        attempts: int = 0,
        failed: Callable[[Any, BaseException], Event | None] = Failed,
    ):
        super().__init__(reward, work)
        self.places, self.make, self.then, self.attempts, self.failed = places, make, then, attempts, failed
        self.batch = current()

    @property
    def images(self) -> int:
        """How many are judged."""
        return sum(map(len, self.places))

    @property
    def briefs(self) -> list[Brief]:
        """Of each image, whose it is."""
        return [one.brief for one, places in zip(self.work, self.places, strict=True) for _ in places]

    def split(self) -> list[Call]:
        """A call for each request."""
        tickets: dict[int, list[int]] = {}
        for i, one in enumerate(self.work):
            tickets.setdefault(one.brief.ticket, []).append(i)
        return [
            Call(
                self.reward, [self.work[i] for i in own], [self.places[i] for i in own],
                self.make, self.then, self.attempts, self.failed,
            )
            for own in tickets.values()
        ]  # fmt: skip

    def _fail(self, error: BaseException, report: Report) -> None:
        if (event := self.failed(self.work, error)) is not None:
            report(event)


class Judge:
    """Calls rewards for an engine.

    Args:
        threads: on which it calls.
        ledger: where time is written.
        bucket: calls are padded to that many images, so that a network's scores depend on no other image; None: not.
        device: where the images are.
        stream: on a GPU, the stream that rewards run on.

    """

    def __init__(self, threads: Lanes, ledger: Ledger, bucket: int | None, device: torch.device, stream: Any = None):
        self.threads, self._ledger, self._bucket, self._device = threads, ledger, bucket, device
        self._stream = stream
        self._fits: dict[Hashable, tuple[Reward, int]] = {}  # the most images of a call, of those out of memory
        self._costs: dict[str, Spent] = {}

    def post(self, call: Call, report: Report) -> None:
        """Judges, on a thread of its own; reports an event of `call.then`, or of what went wrong."""
        self.threads.judge(called(call.reward), call.terms.concurrent, self._run, call, report)

    def here(
        self, call: Timed, images: Float[Tensor, "row *frame 3 height width"], prompts: list[str], report: Report
    ) -> Tensor:
        """The rewards of images, judged on this thread, which is a lane: [row].

        Raises:
            GivenUp: it took longer than it may; this thread was replaced, and must do nothing more.
            FunctionError: the reward raised, or returned no scores.
        """
        turn = self.threads.hold(called(call.reward), call.terms.concurrent)

        def judge() -> Tensor:
            with self.timed(call, len(prompts)):
                return self.score(call, images, prompts)

        scores, failure = self._timed(turn, call, report, judge)
        if turn.state == "abandoned":
            raise GivenUp
        if failure is not None:
            raise reward_error(call, failure) from failure
        assert scores is not None
        return scores

    def abandon(self, turn: Turn) -> bool:
        """Gives up a call that takes too long; False if it is over."""
        return self.threads.abandon(turn)

    def _run(self, turn: Turn, call: Call, report: Report) -> None:
        with working_for(call.batch):
            self._judge(turn, call, report)

    @torch.no_grad()
    def _judge(self, turn: Turn, call: Call, report: Report) -> None:
        scores, failure = self._timed(turn, call, report, lambda: self._scores(call))
        if turn.state == "abandoned":  # whoever gave it up has told its requests so: nothing of it counts any more
            return
        event: Event | None
        try:
            event = self._failure(call, failure, report) if scores is None else call.then(call.work, scores)
        except BaseException as error:  # nobody must wait for ever
            name = rewards.title(call.reward)
            unusable = FunctionError(f"the answer of the reward {name} could not be used ({said(error)})")
            unusable.__cause__ = error
            event = call.failed(call.work, unusable)
        if event is not None:
            report(event)

    def _timed(
        self, turn: Turn, call: Timed, report: Report, judge: Callable[[], T]
    ) -> tuple[T | None, BaseException | None]:
        """What `judge` returns, or what it raises; the turn is over then."""
        scores, failure, seconds = None, call.terms.fault, call.terms.timeout
        if failure is None:
            if seconds is not None:
                report(Began(call, seconds, turn))
            try:
                scores = judge()
            except BaseException as error:
                failure = error
        if self.threads.end(turn) and seconds is not None:
            report(Began(call, None, turn))
        return scores, failure

    def _failure(self, call: Call, error: BaseException | None, report: Report) -> Event | None:
        """Later again, each request by itself, or an error of the one request that it belongs to."""
        assert error is not None
        if isinstance(error, call.terms.retry_on) and call.attempts < call.terms.retries:
            call.attempts += 1
            return Again(call, back_off(call.attempts))
        if len({one.brief.ticket for one in call.work}) > 1:  # one request's prompt may be all that it cannot judge now
            for part in call.split():
                self.post(part, report)
            return None
        return call.failed(call.work, reward_error(call, error))

    def _scores(self, call: Call) -> list[list[float]]:
        apart = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)  # not behind the next decode
        with apart, self._ledger.span("reward", self._device):
            wanted = [place for places in call.places for place in places]
            images = call.make()
            if wanted != [*range(len(images))]:
                images = images[upload(torch.tensor(wanted), images.device)]
            with self.timed(call, len(images)):
                scored = self.score(call, images, [brief.prompt for brief in call.briefs])
                (found,) = Download(scored).wait()  # the one wait for the device
        scores = iter(found.tolist())
        return [[next(scores) for _ in places] for places in call.places]

    @contextmanager
    def timed(self, call: Timed, images: int) -> Iterator[None]:
        """Writes down what a call of a reward takes."""
        start, cpu, failed = self._ledger.clock(), time.thread_time(), True
        try:
            yield
            failed = False
        finally:
            self._ledger.call(rewards.title(call.reward), images, start, time.thread_time() - cpu, failed)
        self._cost(call.reward).add(images, self._ledger.clock() - start)

    def _cost(self, reward: Reward) -> Spent:
        name = rewards.title(reward)
        if (found := self._costs.get(name)) is None:
            found = self._costs.setdefault(name, Spent())
            if len(self._costs) > NAMES:
                self._costs.pop(next(iter(self._costs)), None)
        return found

    @property
    def costs(self) -> dict[str, RewardCost]:
        """What calls took so far, by the reward's name; of the latest few hundred names."""
        return {name: spent.now() for name, spent in [*self._costs.items()]}

    def score(self, call: Timed, images: Float[Tensor, "row *frame 3 height width"], prompts: list[str]) -> Tensor:
        """The rewards of images: [row]; the caller has its turn at the reward.

        More images than a call may have, by the reward's `batch` or by what fits into memory, are judged in parts.
        """
        reward, count, most = call.reward, len(prompts), call.terms.batch
        if self._fits and (fits := self._fits.get(identity(reward))) is not None:
            most = fits[1] if most is None else min(most, fits[1])
        most = count if most is None else min(most, count)
        scores: list[Tensor] = []
        done = 0
        while done < count:
            part = slice(done, done + most)
            try:
                scores.append(self._part(call, images[part], prompts[part]))
            except torch.OutOfMemoryError:
                if most == 1:
                    raise
                most = (most + 1) // 2
                self._fits[identity(reward)] = reward, most  # held, or another could take its identity
                warnings.warn(
                    f"the reward {rewards.title(reward)} ran out of memory with {len(prompts[part])} images: it is "
                    f"called with at most {most} from now on",
                    RuntimeWarning,
                    stacklevel=2,
                )
                continue
            done += most
        return scores[0] if len(scores) == 1 else torch.cat(scores)

    def _part(self, call: Timed, images: Float[Tensor, "row *frame 3 height width"], prompts: list[str]) -> Tensor:
        """One call of a reward, which a reproducible engine fills up to one size: [row]."""
        reward, size = call.reward, 0
        if self._bucket is not None and call.terms.padded:
            limits = (self._bucket, call.terms.batch, self._fits.get(identity(reward), (reward, None))[1])
            size = min(limit for limit in limits if limit is not None)
        missing = max(0, size - len(prompts))
        if missing:
            images = torch.cat([images, images[:1].expand(missing, *images.shape[1:])])
        images = images.contiguous()  # one layout, or a network's last bits would depend on who else was judged
        scores = reward(images, prompts + prompts[:1] * missing)
        if not isinstance(scores, Tensor) or scores.shape != (len(images),) or scores.is_complex():
            tensor = isinstance(scores, Tensor)
            given = f"a tensor of shape {tuple(scores.shape)}, {scores.dtype}" if tensor else type(scores).__name__
            raise FunctionError(
                f"the reward {rewards.title(reward)} returned {given} for {len(images)} images: it must return one "
                f"real number an image, shape ({len(images)},)"
            )
        return scores[: len(prompts)]


def called(reward: Reward) -> Any:
    """What is called in the end: two requests that pass the same function are judged in one call."""
    return reward.function if isinstance(reward, FunctionReward) else reward


def identity(reward: Reward) -> Hashable:
    """What tells rewards apart: of a method its object and function, since it is another object each time."""
    target = called(reward)
    return (id(target.__self__), id(target.__func__)) if isinstance(target, MethodType) else (id(target), 0)


def by_term(judges: Sequence[Reward]) -> dict[Hashable, tuple[Reward, list[int]]]:
    """The distinct terms of rewards, by identity, each with the places of the rewards that ask for it."""
    groups: dict[Hashable, tuple[Reward, list[int]]] = {}
    for i, judge in enumerate(judges):
        for term in rewards.terms_of(judge):
            places = groups.setdefault(identity(term), (term, []))[1]
            if not places or places[-1] != i:  # else the same reward asks twice
                places.append(i)
    return groups


def back_off(attempt: int) -> float:
    """Seconds before a reward that was not available is called for the `attempt`-th time again."""
    return min(LONGEST_RETRY, RETRY_SECONDS * 2 ** min(30, attempt - 1))


def reward_error(call: Timed, error: BaseException) -> BaseException:
    """What a request is told of an error that its reward raised."""
    if isinstance(error, RollflowError) and not isinstance(error, call.terms.retry_on):
        return error
    kind, _, text = said(error).partition(": ")
    raised = FunctionError(f"the reward {rewards.title(call.reward)} raised {kind} for {call.images} images: {text}")
    raised.__cause__ = error
    return raised
