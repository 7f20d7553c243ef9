"""95 % intervals: Wilson's for a share, the bootstrap over prompts for means and paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 9999


def wilson(hits: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), one value in [0, 1] a prompt.

    Where a value is a mean over seeds, prompts count as the sample: the interval is then on the wide side.
    """
    hits = np.asarray(hits, dtype=float)
    n, share, z = len(hits), float(hits.mean()), float(stats.norm.ppf(0.975))
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def sign_test(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p-value of as many prompts better as worse, ties left out (scipy's `binomtest`)."""
    differences = np.asarray(differences, dtype=float)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def bootstrap(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean; of paired differences, one value a prompt."""
    values = np.asarray(values, dtype=float)
    if len(set(values.tolist())) == 1:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(0)
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=rng)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
