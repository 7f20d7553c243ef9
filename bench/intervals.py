"""95 % intervals: Wilson's for a share, the bootstrap over prompts for means and paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999


def wilson(hits: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Wilson's interval of the share of ones (scipy's `binomtest`)."""
    hits = np.asarray(hits)
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean; of paired differences, one value a prompt."""
    values = np.asarray(values, dtype=float)
    if len(set(values.tolist())) == 1:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(0)
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
