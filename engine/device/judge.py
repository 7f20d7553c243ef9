"""Calls rewards: on threads of their own, one call at a time for each, with retries and time limits.

A call judges images of several requests at once. If it fails, each request is judged by itself, so that one request's
prompt or image harms no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import rewards
from rollflow.device.workers import Lanes, Locks
from rollflow.errors import FunctionError, RollflowError, said
from rollflow.profile.ledger import Ledger
from rollflow.rewards import FunctionReward, Reward
from rollflow.row import Again, Began, Brief, Event, Failed, Report, Row, Show

RETRY_SECONDS = 0.2  # before the second call of a reward that was not available; doubled for each further one
LONGEST_RETRY = 30.0


class Call:
    """One call of a reward.

    Args:
        reward: what is called.
        work: rows, or searches that are over; all images of one belong to one request.
        places: which of the images belong to each.
        images: makes the images, on the thread that judges.
        then: from the work and the scores of each one's images to what is reported.
    """

    def __init__(
        self,
        reward: Reward,
        work: Sequence[Row] | Sequence[Show],
        places: Sequence[Sequence[int]],
        images: Callable[[], Float[Tensor, "image 3 height width"]],
        then: Callable[[Any, list[list[float]]], Event | None],
    ):
        self.reward, self.places, self.images, self.then = reward, places, images, then
        self.work: Sequence[Any] = work
        self.attempts = 0
        self.state = "waiting"  # then "running"; in the end "over" or "abandoned"
        self.thread: threading.Thread | None = None

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
            Call(self.reward, [self.work[i] for i in own], [self.places[i] for i in own], self.images, self.then)
            for own in tickets.values()
        ]


class Judge:
    """Calls rewards for an engine.

    Args:
        threads: on which it calls.
        report: where answers go.
        ledger: where time is written.
        bucket: calls are padded to that many images, so that a network's scores depend on no other image; None: not.
        stream: on a GPU, the stream that rewards run on.
    """

    def __init__(self, threads: Lanes, ledger: Ledger, bucket: int | None, device: torch.device, stream: Any = None):
        self.threads, self._ledger, self._bucket, self._device = threads, ledger, bucket, device
        self._stream, self._locks, self._state = stream, Locks(), threading.Lock()

    def post(self, call: Call, report: Report) -> None:
        """Judges, on a thread of its own; reports an event of `call.then`, or of what went wrong."""
        judged = called(call.reward)
        alone = None if _concurrent(call.reward) else judged
        self.threads.judge(self._run, call, report, one_at_a_time=alone)

    def abandon(self, call: Call, attempt: int) -> bool:
        """Gives up a call that takes too long; False if this attempt of it is over."""
        with self._state:
            if call.state != "running" or call.attempts != attempt:
                return False
            call.state = "abandoned"
        judged = called(call.reward)
        self._locks.renew(judged)
        assert call.thread is not None
        self.threads.abandon(call.thread, None if _concurrent(call.reward) else judged)
        return True

    @torch.no_grad()
    def _run(self, call: Call, report: Report) -> None:
        call.thread, call.state = threading.current_thread(), "running"
        scores: list[list[float]] = []
        failure: BaseException | None = None
        try:
            if (seconds := rewards.timeout(call.reward)) is not None:
                report(Began(call, float(seconds), call.attempts))
            scores = self._scores(call)
        except BaseException as error:
            failure = error
        with self._state:  # whoever gave it up has told its requests so: nothing of it counts any more
            if call.state == "abandoned":
                return
            call.state = "over"
        event: Event | None
        try:
            event = call.then(call.work, scores) if failure is None else self._failure(call, failure, report)
        except BaseException as error:  # such as of a `retry_on` that is no list of errors: nobody must wait for ever
            unusable = FunctionError(f"the answer of the reward {call.reward.name} could not be used ({said(error)})")
            unusable.__cause__ = error
            event = Failed(call.work, unusable)
        if event is not None:
            report(event)

    def _failure(self, call: Call, error: BaseException, report: Report) -> Event | None:
        """Later again, each request by itself, or an error of the one request that it belongs to."""
        later, retries = isinstance(error, rewards.retry_on(call.reward)), rewards.retries(call.reward)
        if later and call.attempts < retries:
            call.attempts += 1
            return Again(call, min(LONGEST_RETRY, RETRY_SECONDS * 2 ** min(30, call.attempts - 1)))
        parts = [] if later else call.split()
        if len(parts) > 1:
            for part in parts:
                self.post(part, report)
            return None
        return Failed(call.work, reward_error(call.reward, error, len(call.briefs)))

    def _scores(self, call: Call) -> list[list[float]]:
        apart = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)  # not behind the next decode
        with apart, self._ledger.span("reward", self._device):
            wanted = [place for places in call.places for place in places]
            images = call.images()
            if wanted != [*range(len(images))]:
                images = images[torch.tensor(wanted, device=images.device)]
            scores = iter(self.score(call.reward, images, [brief.prompt for brief in call.briefs]).tolist())
        return [[next(scores) for _ in places] for places in call.places]

    def score(self, reward: Reward, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Tensor:
        """The rewards of images: [row]; one call at a time for a reward that does not say that it is `concurrent`."""
        missing = 0 if self._bucket is None else self._bucket - len(prompts)
        if missing > 0:
            images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        images = images.contiguous()  # one layout, or a network's last bits would depend on who else was judged
        judged = called(reward)
        free: AbstractContextManager[Any] = nullcontext()
        with free if _concurrent(reward) else self._locks.of(judged):
            scores = reward(images, prompts + prompts[:1] * max(0, missing))
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            given = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise FunctionError(
                f"the reward {reward.name} returned {given} for {len(images)} images: it must return one score an "
                f"image, shape ({len(images)},)"
            )
        return scores[: len(prompts)]


def called(reward: Reward) -> Any:
    """What is called in the end: two requests that pass the same function are judged in one call."""
    return reward.function if isinstance(reward, FunctionReward) else reward


def grouped(judges: Sequence[Reward]) -> list[tuple[Reward, list[int]]]:
    """Places grouped by reward, so that each reward is called once a batch."""
    groups: dict[int, tuple[Reward, list[int]]] = {}
    for i, reward in enumerate(judges):
        groups.setdefault(id(called(reward)), (reward, []))[1].append(i)
    return [*groups.values()]


def _concurrent(reward: Reward) -> bool:
    try:
        return rewards.concurrent(reward)
    except RollflowError:  # it was a flag at the door, and is none any more
        return False


def reward_error(reward: Reward, error: BaseException, images: int) -> BaseException:
    """What a request is told of an error that its reward raised."""
    if isinstance(error, RollflowError) and not isinstance(error, rewards.retry_on(reward)):
        return error
    kind, _, text = said(error).partition(": ")
    raised = FunctionError(f"the reward {reward.name} raised {kind} for {images} images: {text}")
    raised.__cause__ = error
    return raised
