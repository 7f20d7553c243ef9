"""What a batch costs and how likely a row is to be needed: what the packing of batches is decided by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

WORTHWHILE = 1.02  # by how much the expected rate must rise before rows run ahead of the answer
NEGLIGIBLE = 0.02  # rows run ahead only if they will be needed with at least this chance ...
SURE = 0.25  # ... and where nothing else runs on their lane, with this
_PRIOR = (1.0, 8.0)  # successes and trials that every level starts with


@dataclass(frozen=True)
class CostModel:
    """Seconds of a batch (forward and decode) by bucket, as measured at warm-up.

    Before a measurement a batch is taken to cost a launch and one unit a row.
    """

    seconds: Mapping[int, float]

    @classmethod
    def assumed(cls, buckets: Sequence[int]) -> CostModel:
        """What is assumed of a model that nobody has timed: that small batches cost about as much as one of four."""
        return cls({bucket: 4.0 + bucket for bucket in buckets})

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows`."""
        return next(bucket for bucket in self.seconds if bucket >= rows)

    @property
    def largest(self) -> int:
        """The largest batch."""
        return max(self.seconds)

    @property
    def best(self) -> int:
        """The bucket with the most rows a second."""
        return max(self.seconds, key=lambda bucket: bucket / self.seconds[bucket])

    def rows(self, certain: int, ahead: Sequence[float], lanes: int = 1) -> int:
        """How many rows to run now, spread over `lanes` batches at once, for the most expected committed rows a second.

        Args:
            certain: rows that are needed whatever happens.
            ahead: of further rows, the chance that each will be needed, best first.
            lanes: batches that run at the same time.
        """
        value = [0.0, *accumulate([*[1.0] * certain, *ahead])]
        sizes = {lanes * bucket for bucket in self.seconds} | {certain}

        def rate(size: int) -> float:
            return value[size] / self.seconds[self.bucket(-(-size // lanes))]

        fitting = [size for size in sizes if 0 < size < len(value) and -(-size // lanes) <= self.largest]
        if not fitting:
            return len(value) - 1
        best = max(fitting, key=lambda size: (rate(size), size))
        usual = min(certain, lanes * self.largest)
        return best if not usual or rate(best) > WORTHWHILE * rate(usual) else usual


class Odds:
    """How often a child beats its bar, learned as searches run: by method and point of the grid.

    It decides how far searches run ahead of their answers, never what they decide.
    """

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[str, int], list[float]] = defaultdict(lambda: list(_PRIOR))

    def observe(self, method: str, level: int, success: bool) -> None:
        """One child was judged."""
        counts = self._counts[method, level]
        counts[0] += success
        counts[1] += 1

    def success(self, method: str, level: int) -> float:
        """The chance that the next child beats its bar."""
        successes, trials = self._counts[method, level]
        return successes / trials
