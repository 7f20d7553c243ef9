"""What a batch costs and how likely a row is to be needed: what the packing of batches is decided by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

WORTHWHILE = 1.02  # by how much the expected time must fall before rows run ahead of the answer
NEGLIGIBLE = 0.02  # rows run ahead only if they will be needed with at least this chance ...
SURE = 0.25  # ... and where nothing else runs on their lane, with this


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

    @cached_property
    def largest(self) -> int:
        """The largest batch."""
        return max(self.seconds)

    @cached_property
    def _buckets(self) -> list[int]:
        """The bucket of each number of rows from 0 on."""
        return [min(b for b in self.seconds if b >= rows) for rows in range(self.largest + 1)]

    @cached_property
    def _times(self) -> list[float]:
        """The seconds of each number of rows from 0 on."""
        return [self.seconds[bucket] for bucket in self._buckets]

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows`, which are at most as many as the largest does."""
        return self._buckets[rows]

    def rows(self, certain: int, ahead: Sequence[float], lanes: int = 1) -> int:
        """How many rows to run now, spread over `lanes` batches at once: those for which the time until all the rows
        are done that turn out to be needed is expected to be shortest, if the rest runs in one go thereafter.

        Args:
            certain: rows that are needed whatever happens.
            ahead: of further rows, the chance that each will be needed, best first.
            lanes: batches that run at the same time.
        """
        chances = [*[1.0] * min(certain, lanes * self.largest), *ahead]
        left = [*accumulate(reversed(chances), initial=0.0)][::-1]  # expected number from each place on

        def expected(size: int) -> float:
            now = self._time(-(-size // lanes))
            if size == len(chances):
                return now
            return now + chances[size] * self._time(left[size] / chances[size] / lanes)

        most = min(len(chances), lanes * self.largest)
        fitting = [size for size in {*(lanes * b for b in self.seconds), certain, len(chances)} if 0 < size <= most]
        best = min(fitting, key=lambda size: (expected(size), -size))
        usual = min(certain, lanes * self.largest)
        return best if not usual or WORTHWHILE * expected(best) < expected(usual) else usual

    def _time(self, rows: float) -> float:
        """Of a batch of this many rows, which may be an expectation; beyond the largest, of several batches."""
        if rows > self.largest:
            return rows / self.largest * self.seconds[self.largest]
        whole = math.floor(max(rows, 1))
        more = max(rows, 1) - whole
        return (1 - more) * self._times[whole] + (more * self._times[whole + 1] if more else 0.0)
