"""Verifier threshold: go on as soon as the reward is good enough."""

from __future__ import annotations

import math

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, best, number, require, whole, worth
from rollflow.methods.catalog import method


@method(branches=True, holds=lambda nfe, steps, options: 3)
def threshold(nfe: int, steps: int, bar: float | None = None, initial: int | None = None, children: int = 4) -> Search:
    """Draws children of the current particle one at a time, and goes on with the first whose reward is above the bar,
    or with the best of `children` (after the verifier threshold of arXiv 2512.08985). What this saves starts further
    searches, and the best last particle of all is chosen.

    RBF's bar rises with the rewards seen; this one stays, so that more searches get through.

    Args:
        nfe: budget of function evaluations. What is left when no further search can be paid for goes to more children
            at the last level of the last one.
        steps: points of the grid that are evaluated.
        bar: the reward that is good enough; by default the best of the first search's initial samples.
        initial: samples of the prior that each search begins with; by default a twentieth of the budget.
        children: at a level, at most.

    Raises:
        RequestError: a bad option, or a budget that does not pay for the initial samples and one child a level.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("children", children, 1)
    if bar is not None:
        bar = number("bar", bar)
    least = 1 if initial is None else whole("initial", initial, 1)
    need = least + steps - 1
    require("threshold", nfe, need, f"{least} initial, one child at each of {steps - 1} levels")
    initial = max(1, min(nfe // 20, nfe - need + 1)) if initial is None else initial
    return _search(nfe, steps, bar, initial, children)


def _search(left: int, steps: int, bar: float | None, initial: int, children: int) -> Search:
    ends: list[Evaluated] = []  # the best so far
    while left >= initial + steps - 1 or not ends:
        count = left if steps == 1 else initial
        (drawn,) = yield [Draw(None, count, keep=1, decides=count > 1 or bar is None)]
        left -= len(drawn)
        current = best(drawn)
        bar = worth(current) if bar is None else bar
        for level in range(1, steps):
            to_come = steps - 1 - level
            last = not to_come and left - children < initial + steps - 1  # no further search can be paid for
            count = left if last else min(children, left - to_come)
            decides = count > 1 or not to_come  # ends of several searches are compared
            until = bar if decides and not last else math.inf
            (drawn,) = yield [Draw(current, count, until=until, keep=1, decides=decides)]
            left -= len(drawn)
            current = best(drawn)
        ends = [best([*ends, current])]
    return ends[0]
