"""95 % intervals: Wilson's for a share, the bootstrap for means and paired differences, ranks for quantiles."""

from __future__ import annotations

import math
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


def least_sample(share: float) -> int:
    """How many values a quantile takes to lie among them: 2 for the median, 20 for 0.95, 100 for 0.99."""
    return math.ceil(round(1 / min(share, 1 - share), 6))


def quantile(values: Sequence[float] | np.ndarray, share: float) -> float | None:
    """The smallest value that at least this share of the values does not exceed; None of fewer than `least_sample`."""
    if len(values) < least_sample(share):
        return None
    return float(np.quantile(values, share, method="inverted_cdf"))


def quantile_interval(values: Sequence[float] | np.ndarray, share: float) -> tuple[float | None, float | None]:
    """Between which of the values a quantile lies, whatever the distribution: each end fails in at most 2.5 %.

    The number of independent values below the quantile is binomial. An end is None where no value is far enough out: of
    0.99 the upper one takes 368 values. Values that depend on each other, such as the latencies of neighbours in a
    queue, leave more doubt than this says.
    """
    ordered, n = np.sort(np.asarray(values, dtype=float)), len(values)
    low = int(stats.binom.ppf(0.025, n, share))  # P(fewer than low below it) < 2.5 %
    high = int(stats.binom.ppf(0.975, n, share))  # P(more than high below it) <= 2.5 %
    return (float(ordered[low - 1]) if low > 0 else None, float(ordered[high]) if high < n else None)
