"""What calls of a reward take, measured as they happen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock


@dataclass
class RewardCost:
    """Calls of one reward; any thread may add.

    Attributes:
        calls: how many were made.
        images: how many they judged.
        seconds: what they took.
        by_size: calls and seconds, by the number of images, rounded up to a power of two.
    """

    calls: int = 0
    images: int = 0
    seconds: float = 0.0
    by_size: dict[int, tuple[int, float]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, images: int, seconds: float) -> None:
        """One call judged so many images."""
        size = 1 << max(0, images - 1).bit_length()
        with self._lock:
            self.calls, self.images, self.seconds = self.calls + 1, self.images + images, self.seconds + seconds
            calls, total = self.by_size.get(size, (0, 0.0))
            self.by_size[size] = calls + 1, total + seconds

    @property
    def curve(self) -> Mapping[int, float]:
        """Mean seconds of a call, by the number of images, ascending."""
        return {size: total / calls for size, (calls, total) in sorted(self.by_size.items())}
