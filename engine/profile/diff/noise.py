"""How sure a change is: t intervals over repetitions, or over batches of one recording whose neighbours are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95  # of all intervals of a family together
LEAST = 8  # things that an interval within a recording takes, on either side
REPEATED = 4  # recordings, both sides together, from which on they tell the noise
FARTHEST = 512  # neighbours that are looked at, at most
# Relative errors of things in order of time, and the weight of each in a value's relative error.
Errors = tuple[np.ndarray, np.ndarray]
MOST = 500.0  # a logarithm whose exponential is still finite


@dataclass(frozen=True)
class Estimate:
    """The logarithm of B over A: its value, standard error, and the degrees of freedom of its t distribution."""

    center: float
    error: float
    freedom: float

    @property
    def change(self) -> float:
        """B over A less 1."""
        return math.expm1(self.center)

    def interval(self, family: int = 1) -> tuple[float, float]:
        """Between which changes B over A less 1 lies, as one of a family of intervals (Bonferroni)."""
        half = self.error * float(stats.t.ppf(1 - (1 - LEVEL) / 2 / family, self.freedom))
        return math.expm1(self.center - half), math.expm1(min(self.center + half, MOST))


def over_repetitions(a: Sequence[float], b: Sequence[float]) -> Estimate | None:
    """From the values of recordings: Student's t of what they are relative to their side's mean.

    Both sides are taken to vary alike, so that one of them may be a single recording. None of fewer than `REPEATED`
    recordings, or where a mean is not above 0.
    """
    sides = [values[np.isfinite(values)] for values in (np.asarray(a, dtype=float), np.asarray(b, dtype=float))]
    freedom = sum(len(values) for values in sides) - 2
    if min(len(values) for values in sides) < 1 or freedom < REPEATED - 2 or min(v.mean() for v in sides) <= 0:
        return None
    squares = sum(float(((values / values.mean() - 1) ** 2).sum()) for values in sides)
    error = math.sqrt(squares / freedom * sum(1 / len(values) for values in sides))
    return Estimate(math.log(sides[1].mean() / sides[0].mean()), error, float(freedom))


def within(a: float, b: float, errors_a: Errors, errors_b: Errors) -> Estimate | None:
    """From two values and the errors of the things that they were made of.

    None of fewer than `LEAST` things, or where a value is not above 0.
    """
    if min(len(errors_a[0]), len(errors_b[0])) < LEAST or min(a, b) <= 0:
        return None
    (one, many), (other, more) = long_run_error(*errors_a), long_run_error(*errors_b)
    variance = one**2 + other**2
    freedom = variance**2 / (one**4 / many + other**4 / more) if variance else many + more  # Satterthwaite (1946)
    return Estimate(math.log(b / a), math.sqrt(variance), freedom)


def long_run_error(errors: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The standard error of a weighted sum of errors whose neighbours depend on each other, and its freedom.

    Newey and West (1987): covariances of neighbours count with Bartlett's weights up to a distance of L. A bootstrap
    of contiguous blocks of L things (Künsch 1989) has this error but for chance, which is why no seed is needed. L is
    what Andrews (1991, eq. 6.2) has for the autocorrelation that is seen, at least n^(1/3) and at most n/4. Degrees of
    freedom are those of Bartlett's window at frequency zero, 1.5 n/L. Errors may differ in size from thing to thing,
    but that of one with much weight is not seen, as the value follows it: the result is no less than for equal sizes.
    """
    n, e = len(errors), errors - errors.mean()
    if not e.any():
        return 0.0, float(n - 1)
    rho = float(np.clip(e[1:] @ e[:-1] / (e @ e), -0.99, 0.99))
    usual = 1.1447 * (4 * rho**2 / (1 - rho**2) ** 2 * n) ** (1 / 3)
    reach = int(np.clip(math.ceil(max(usual, n ** (1 / 3))), 1, max(1, min(n // 4, FARTHEST))))
    own = equal = 0.0
    u = weights * e
    u = u - u.mean()
    for h in range(reach):
        share = (1 - h / reach) * (1 if h == 0 else 2)
        own += share * float(u[h:] @ u[: n - h])
        equal += share * float(e[h:] @ e[: n - h]) / n * float(weights[h:] @ weights[: n - h])
    error = math.sqrt(max(own, equal, 0.0) * n / (n - reach))  # the mean that was taken off took some of it
    return error, max(1.0, min(n - 1.0, 1.5 * n / reach))
