"""Resampling: which particles live on, and how often, in proportion to their weights.

Each scheme takes normalised weights and returns the sorted indices of `count` survivors. The expected number of copies
of particle i is `count * weights[i]` under every one; the schemes differ in that number's variance (Douc, Cappe and
Moulines 2005, "Comparison of resampling schemes for particle filtering").
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rollflow.errors import RequestError, shown

Scheme = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _invert(weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The inverse of the cumulative weights at sorted points in [0, 1); never a particle of weight 0."""
    edges = np.cumsum(weights)
    return np.searchsorted(edges / edges[-1], points, side="right")


def multinomial(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Independent draws."""
    return _invert(weights, np.sort(rng.random(count)))


def stratified(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """One draw in each of `count` equal strata (Kitagawa 1996)."""
    return _invert(weights, (np.arange(count) + rng.random(count)) / count)


def systematic(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """One draw for all strata: copies differ from `count * weight` by less than 1 (Carpenter et al. 1999)."""
    return _invert(weights, (np.arange(count) + rng.random()) / count)


def residual(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The whole parts of `count * weight` for certain, the rest by independent draws (Liu and Chen 1998)."""
    expected = count * weights / weights.sum()
    whole = np.floor(expected + 1e-12)
    sure = np.repeat(np.arange(len(weights)), whole.astype(int))
    left = count - len(sure)
    rest = multinomial(expected - whole, left, rng) if left else np.empty(0, int)
    return np.sort(np.concatenate([sure, rest]))


SCHEMES: dict[str, Scheme] = {f.__name__: f for f in (multinomial, systematic, stratified, residual)}


def scheme(name: str) -> Scheme:
    """The scheme of a name; raises `RequestError` for an unknown one."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise RequestError(f"unknown resampling {shown(name)}: choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights that sum to 1; all alike where every one is 0."""
    top = log_weights.max()
    if top == -np.inf:
        return np.full(len(log_weights), 1 / len(log_weights))
    weights = np.exp(log_weights - top)
    return weights / weights.sum()


def effective_sample_size(weights: np.ndarray) -> float:
    """`1 / sum w^2` of normalised weights: how many equal weights would be worth as much (Kong 1992)."""
    return 1 / float(np.square(weights).sum())
