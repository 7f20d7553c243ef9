"""Progressive seed pruning: many samples begun, few finished."""

from __future__ import annotations

from typing import Any

from rollflow.draw import Draw
from rollflow.errors import RequestError
from rollflow.methods.budget import Search, best, number, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once: the first samples that may go on, or later those that went on and their next step."""
    counts = levels(nfe, steps, options.factor, options.first)
    start = 1 if steps == 1 else counts[0] if options.first else counts[1]
    return max([start, *(2 * count for count in counts[1:])])


@method(branches=False, trusts="first", holds=held)
def psp(nfe: int, steps: int, factor: float = 2.0, first: int = 0) -> Search:
    """Progressive seed pruning by successive halving (arXiv 2607.21591): of the samples of one level, about one in
    `factor` goes on to the next. Nothing branches, so that it works under the ODE.

    Args:
        nfe: budget of function evaluations; what rounding leaves over goes to the first level, or, where that is not
            judged, to later ones.
        steps: evaluations of a sample that is never pruned.
        factor: how many times fewer samples each level has than the one before; 1 prunes nothing.
        first: the first level that is judged, and after which samples are pruned: where posterior means do not foretell
            the image yet, pruning by their rewards misleads. By default the engine's, see `rollflow.Engine`.

    Raises:
        RequestError: a factor below 1, or a budget that does not pay for one whole sample.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("first", first, 0)
    if number("factor", factor) < 1:
        raise RequestError(f"factor={factor!r}: each level has at most as many samples as the one before; at least 1")
    require("psp", nfe, steps, f"one sample of {steps} steps")
    return _search(levels(nfe, steps, factor, first), first)


def levels(budget: int, steps: int, factor: float, first: int = 0) -> list[int]:
    """How many samples each level evaluates: as many up to level `first`, from there on fewer by `factor`, at least 1;
    `budget` in all.
    """

    def counts(count: int) -> list[int]:
        return [max(1, int(count * factor ** -float(max(0, level - first)))) for level in range(steps)]

    low, high = 1, budget + 1  # the most at the first level that the budget pays for, by bisection
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(counts(middle)) <= budget else (low, middle)
    chosen = counts(low)
    left = budget - sum(chosen)
    if not first:
        chosen[0] += left
        return chosen
    for level in range(first + 1, steps):  # more survivors, where the level before has any
        more = min(left, chosen[level - 1] - chosen[level])
        chosen[level] += more
        left -= more
    for level in range(left):  # what is still left is not enough for a sample that is judged
        chosen[level] += 1
    return chosen


def _search(counts: list[int], first: int) -> Search:
    # No level is judged that nothing is pruned at, nor one whose rewards are not to be trusted.
    last = len(counts) - 1
    judged = [level == last or (level >= first and counts[level + 1] < counts[level]) for level in range(last + 1)]
    keep = (1 if last == 0 else counts[1]) if judged[0] else None
    particles = flat((yield [Draw(None, counts[0], scored=judged[0], decides=counts[0] > 1, keep=keep)]))
    for level in range(1, len(counts)):
        particles = sorted(particles, key=worth, reverse=True)[: counts[level]]
        particles = flat((yield [Draw(p, scored=judged[level], decides=counts[level] > 1) for p in particles]))
    return best(particles)
