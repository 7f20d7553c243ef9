"""How likely a row is to be needed, learned as searches run."""

from __future__ import annotations

from collections import defaultdict

_PRIOR = (0.5, 8.0)  # successes and trials that every level starts with


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
