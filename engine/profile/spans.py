"""Sets of times: disjoint intervals in ascending order, [n, 2], in seconds."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NEVER = np.zeros((0, 2))


def between(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The times between `starts` and `ends`, which may overlap; pairs with a NaN are left out."""
    return union(np.stack([starts, ends], 1).astype(float))


def union(*sets: np.ndarray) -> np.ndarray:
    """The times that are in any of them; here the intervals of a set may overlap."""
    return _sweep([(one, 1) for one in sets], 1)


def common(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The times that are in both."""
    return _sweep([(one, 1), (other, 1)], 2)


def without(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The times of `one` that are not in `other`."""
    return _sweep([(one, 1), (other, -1)], 1)


def length(one: np.ndarray) -> float:
    """Seconds in all."""
    return float((one[:, 1] - one[:, 0]).sum())


def _sweep(sets: Iterable[tuple[np.ndarray, int]], least: int) -> np.ndarray:
    """The times at which the weights of the intervals that hold them add up to at least `least`."""
    times, changes = [], []
    for one, weight in sets:
        one = one[one[:, 1] > one[:, 0]]  # false where one is NaN
        times += [one[:, 0], one[:, 1]]
        changes += [np.full(len(one), weight), np.full(len(one), -weight)]
    time, change = np.concatenate(times), np.concatenate(changes)
    order = np.lexsort((-change, time))  # at one time, first what adds: intervals that touch are one
    inside = np.cumsum(change[order]) >= least
    before = np.concatenate([[False], inside[:-1]])
    found = np.stack([time[order][inside & ~before], time[order][~inside & before]], 1)
    return found[found[:, 1] > found[:, 0]]
