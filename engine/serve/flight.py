"""A search at a station: what the front knows of it, and what is new."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

from rollflow import entries
from rollflow.job import Job


class Flight:
    """A search at a station, and what the front knows of it."""

    def __init__(self, id: str):
        self.id, self.cancelled = id, False
        self.job: Job | None = None
        self.sent = 0  # entries
        self.seen, self.nfe, self.best = 0, 0, -math.inf  # records that were looked at for improvements
        self.watched: AbstractContextManager[None] | None = None

    def news(self) -> dict[str, Any]:
        """What is new: how far it is, its improvements, and the scores since the last news."""
        job = self.job
        assert job is not None, "it was handed in"
        replay, better = job.entries(self.sent), self.improvements()
        found: dict[str, Any] = {"status": job.status}
        if replay.entries:
            found |= {"start": self.sent, "entries": entries.written(replay)}
            self.sent += len(replay.entries)
        if (update := job.update) is not None:
            seconds = job.spent + update.seconds
            found |= {"nfe": self.nfe, "best": self.best, "level": update.level, "seconds": seconds}
            found["better"] = [[*one, seconds] for one in better]
        return found

    def improvements(self, anew: bool = False) -> list[tuple[int, float, int]]:
        """NFE, reward and level of each evaluation that was better than all before it, of those not looked at yet."""
        if anew:  # a reward may have come later than those after it
            self.seen, self.nfe, self.best = 0, 0, -math.inf
        assert self.job is not None, "it was handed in"
        better = []
        for nfe, level, reward in self.job.rewards(self.seen):
            self.seen, self.nfe = self.seen + 1, self.nfe + nfe
            if reward is not None and math.isfinite(reward) and reward > self.best:
                self.best = reward
                better.append((self.nfe, reward, level))
        return better
