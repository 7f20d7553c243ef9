"""What calls of a reward take, measured as they happen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock


@dataclass(frozen=True)
class RewardCost:
    """Calls of one reward so far.

    Attributes:
        calls: how many were made.
        images: how many they judged.
        seconds: what they took.
        by_size: calls and seconds, by the number of images, rounded up to a power of two; ascending.
    """

    calls: int
    images: int
    seconds: float
    by_size: Mapping[int, tuple[int, float]]

    @property
    def curve(self) -> Mapping[int, float]:
        """Mean seconds of a call, by the number of images."""
        return {size: total / calls for size, (calls, total) in self.by_size.items()}


class Spent:
    """Counts the calls of one reward; of any thread."""

    def __init__(self) -> None:
        self._lock, self._calls, self._images, self._seconds = Lock(), 0, 0, 0.0
        self._by_size: dict[int, tuple[int, float]] = {}

    def add(self, images: int, seconds: float) -> None:
        """One call judged so many images."""
        size = 1 << max(0, images - 1).bit_length()
        with self._lock:
            self._calls, self._images, self._seconds = self._calls + 1, self._images + images, self._seconds + seconds
            calls, total = self._by_size.get(size, (0, 0.0))
            self._by_size[size] = calls + 1, total + seconds

    def now(self) -> RewardCost:
        """What was counted so far."""
        with self._lock:
            return RewardCost(self._calls, self._images, self._seconds, dict(sorted(self._by_size.items())))
