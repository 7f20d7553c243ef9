"""Judges work by the terms of its rewards: each term is called once for everything in a batch that asks for it.

A request that asks for "vqa" and one that asks for "0.7*vqa + 0.3*aesthetic" share the call of `vqa`. What has the
scores of all of its terms is reported; if one of them fails, so does the work that asked for it, once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from threading import Lock
from typing import Any

from torch import Tensor

from rollflow import rewards
from rollflow.device.judge import Call, by_term, identity
from rollflow.errors import FunctionError, RollflowError, said
from rollflow.rewards import Combined, Reward
from rollflow.row import Event, Failed, Row, Score, Show


class _Open:
    """Work that waits for scores."""

    __slots__ = ("combined", "keys", "missing", "scores", "work")

    def __init__(self, work: Row | Show, keys: Sequence[Hashable], combined: bool):
        self.work, self.keys, self.combined = work, keys, combined
        self.scores: dict[Hashable, list[float]] = {}
        self.missing = len({*keys})

    def joined(self) -> list[Score]:
        """The scores of each image: a number, or of a combined reward one a term."""
        if not self.combined:
            return [*self.scores[self.keys[0]]]
        return [*zip(*(self.scores[key] for key in self.keys), strict=True)]


class Judgement:
    """Work on its way through the terms of its rewards.

    Args:
        work: rows, or searches that are over; each has images of one request.
        judges: the reward of each.
        places: which of the images belong to each.
        make: makes the images, on a thread that judges.
        then: from work and the scores of each one's images to what is reported, if anything.
    """

    def __init__(
        self,
        work: Sequence[Any],
        judges: Sequence[Reward],
        places: Sequence[Sequence[int]],
        make: Callable[[], Tensor],
        then: Callable[[Any, list[list[Score]]], Event | None],
    ):
        self._work, self._places, self._make, self._then = work, places, make, then
        self._lock, self._open = Lock(), dict[int, _Open]()
        self._groups = by_term(judges)
        self._plain = not any(isinstance(judge, Combined) for judge in judges)
        if self._plain:  # nothing waits for another term: nearly every batch
            return
        for one, judge in zip(work, judges, strict=True):
            keys = [identity(term) for term in rewards.terms_of(judge)]
            self._open[id(one)] = _Open(one, keys, isinstance(judge, Combined))

    def calls(self) -> list[Call]:
        """One for each term."""
        if self._plain:
            then: Any = self._then  # a score is a number where no reward is combined
            return [
                Call(reward, [self._work[i] for i in own], [self._places[i] for i in own], self._make, then)
                for reward, own in self._groups.values()
            ]
        return [
            Call(
                term, [self._work[i] for i in own], [self._places[i] for i in own], self._make,
                partial(self._scored, key), failed=self._failed,
            )
            for key, (term, own) in self._groups.items()
        ]  # fmt: skip

    def _scored(self, key: Hashable, work: Sequence[Any], scores: list[list[float]]) -> Event | None:
        """Takes the scores of one term; passes on what has all of them."""
        whole: list[_Open] = []
        with self._lock:
            for one, own in zip(work, scores, strict=True):
                found = self._open.get(id(one))
                if found is None:  # another of its terms failed
                    continue
                found.scores[key] = own
                found.missing -= 1
                if not found.missing:
                    whole.append(self._open.pop(id(one)))
        if not whole:
            return None
        try:
            return self._then([found.work for found in whole], [found.joined() for found in whole])
        except BaseException as error:  # nobody must wait for ever
            unusable = FunctionError(f"the scores of the reward could not be used ({said(error)})")
            unusable.__cause__ = error
            kept = error if isinstance(error, RollflowError) else unusable
            failed: list[Any] = [found.work for found in whole]
            return Failed(failed, kept)

    def _failed(self, work: Sequence[Any], error: BaseException) -> Event | None:
        """A term could not be had: its work fails, if it has not already."""
        with self._lock:
            left = [found.work for one in work if (found := self._open.pop(id(one), None)) is not None]
        return Failed(left, error) if left else None  # type: ignore[arg-type]
