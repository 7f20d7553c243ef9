"""Seconds of two sides' batches compared size by size: what is due to slower batches, and what to more or others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollflow.profile.diff.noise import Errors


@dataclass(frozen=True, eq=False)
class Sample:
    """Things of one kind that took time, of all recordings of a side, in order of time.

    Attributes:
        keys: what they are like, [n, k]; two things with the same key should take the same time.
        seconds: what each took.
        units: how much of the work each did: rows, or images.
        run: of which recording each is.
        runs: how many recordings there are.
    """

    keys: np.ndarray
    seconds: np.ndarray
    units: np.ndarray
    run: np.ndarray
    runs: int

    @classmethod
    def of(cls, runs: Sequence[Any], pick: Callable[[Any], tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Sample:
        """What `pick` gives of each recording: keys, seconds and units."""
        picked = [pick(run) for run in runs]
        keys, seconds, units = (np.concatenate([one[i] for one in picked]) for i in range(3))
        run = np.repeat(np.arange(len(picked)), [len(one[1]) for one in picked])
        return cls(keys, seconds, units, run, len(picked))


@dataclass(frozen=True)
class Shares:
    """Seconds of a recording of A and of B, means over a side's, and what their difference is due to.

    `speed`, `packing` and `work` add up to `b - a`.

    Attributes:
        speed: batches of a size took longer than batches of that size.
        packing: the same rows were packed into batches of other sizes.
        work: there were more rows.
    """

    a: float
    b: float
    speed: float
    packing: float
    work: float


@dataclass(frozen=True, eq=False)
class Speed:
    """Batches of B against batches of A of the same sizes.

    Attributes:
        a, b: mean seconds of a batch, sizes weighted alike on both sides.
        index_a, index_b: of each recording, its seconds over those that batches of its sizes take on either side; NaN
            where it has none of these sizes.
        errors_a, errors_b: of each batch, see `rollflow.profile.diff.noise`.
    """

    a: float
    b: float
    index_a: np.ndarray
    index_b: np.ndarray
    errors_a: Errors
    errors_b: Errors


class Matched:
    """The things of two sides, by what they are like."""

    def __init__(self, a: Sample, b: Sample):
        self._sides = a, b
        _, cell = np.unique(np.concatenate([a.keys, b.keys]), axis=0, return_inverse=True)
        cell = cell.reshape(-1)
        self._cells = cell[: len(a.keys)], cell[len(a.keys) :]
        size = int(cell.max(initial=-1)) + 1
        self._counts = [np.bincount(own, minlength=size).astype(float) for own in self._cells]
        totals = [
            np.bincount(own, weights=side.seconds, minlength=size)
            for own, side in zip(self._cells, self._sides, strict=True)
        ]
        self._means = [total / np.maximum(count, 1) for total, count in zip(totals, self._counts, strict=True)]
        self._both = (self._counts[0] > 0) & (self._counts[1] > 0)

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a recording of A and of B that lie in sizes which both have."""
        a, b = (
            float((count * mean)[self._both].sum()) / side.runs
            for count, mean, side in zip(self._counts, self._means, self._sides, strict=True)
        )
        return a, b

    def shares(self) -> Shares:
        """The difference in seconds, split.

        Of n batches of a size that take m on average, Σ n m changes by Σ Δn <m> + Σ <n> Δm over sizes, exactly; <>
        is the mean of both sides (Bennet 1920). A size that one side lacks takes there what it takes on the other. Of
        the first sum, as much is due to more rows as they cost at the mean price of a row.
        """
        a, b = (
            count * mean / side.runs for count, mean, side in zip(self._counts, self._means, self._sides, strict=True)
        )
        n_a, n_b = (count / side.runs for count, side in zip(self._counts, self._sides, strict=True))
        m_a = np.where(self._counts[0] > 0, self._means[0], self._means[1])
        m_b = np.where(self._counts[1] > 0, self._means[1], self._means[0])
        middle = (m_a + m_b) / 2
        speed, count = float(((n_a + n_b) / 2 * (m_b - m_a)).sum()), float(((n_b - n_a) * middle).sum())
        units_a, units_b = (float(side.units.sum()) / side.runs for side in self._sides)
        price = float(((n_a + n_b) * middle).sum()) / (units_a + units_b) if units_a + units_b else 0.0
        work = (units_b - units_a) * price
        return Shares(float(a.sum()), float(b.sum()), speed, count - work, work)

    def speed(self) -> Speed | None:
        """B against A in sizes that both have, or None where there is nothing to compare.

        Sizes have the weight n_a n_b / (n_a + n_b), with which their differences tell most. A batch's error is what
        it took over what batches of its size take, with the time of B scaled as a whole.
        """
        (n_a, n_b), (m_a, m_b), both = self._counts, self._means, self._both
        weight = np.where(both, n_a * n_b / np.maximum(n_a + n_b, 1), 0.0)
        a, b = float(weight @ m_a), float(weight @ m_b)
        if min(a, b) <= 0:
            return None
        usual = (n_a * m_a + n_b * m_b / (b / a)) / np.maximum(n_a + n_b, 1)
        used = both & (usual > 0)
        spread = np.sqrt((n_a + n_b) / np.maximum(n_a + n_b - 1, 1))  # a mean of few lies too near to each of them
        indices, errors = [], []
        for side, cells, count, scale in zip(self._sides, self._cells, self._counts, (1.0, b / a), strict=True):
            own = used[cells]
            cell, seconds, run = cells[own], side.seconds[own], side.run[own]
            each = weight[cell] / count[cell]
            took = np.bincount(run, weights=each * seconds, minlength=side.runs)
            would = np.bincount(run, weights=each * usual[cell], minlength=side.runs)
            indices.append(np.divide(took, would, out=np.full(side.runs, np.nan), where=would > 0))
            error = (seconds / (scale * usual[cell]) - 1) * spread[cell]
            errors.append((error, each * usual[cell] / float(weight @ usual)))
        total = float(weight.sum())
        return Speed(a / total, b / total, *indices, *errors)
