"""RBF: rollover budget forcing, the method of the paper."""

from __future__ import annotations

import math

from rollflow.draw import GUIDED_NFE, Draw, Guide
from rollflow.methods.budget import Search, best, require, whole, worth
from rollflow.methods.catalog import method


@method(
    branches=True,
    guided=lambda options: options.gradient > 0,
    holds=lambda nfe, steps, options: 2,
    parents=lambda nfe, steps, options: max(0, steps - 2),
)
def rbf(nfe: int, steps: int, initial: int | None = None, gradient: float = 0.0, clip: float | None = None) -> Search:
    """Rollover budget forcing (Kim et al. 2025, arXiv 2503.19385, algorithm 1).

    Draws children of the current particle one at a time. The first that beats the bar becomes current at once, and
    what it left of the level's quota rolls over to the next level. Unlike the published loop, ours advances through
    every level and spends the budget to the last evaluation: the last level takes all that remains.

    Args:
        nfe: budget of function evaluations, `initial` included.
        steps: points of the time grid that are evaluated; children live on points 1 .. steps - 1.
        initial: samples of the prior, of which the best starts; by default a tenth of the budget (the paper's 50 of
            500). With `steps=1` all of the budget is initial.
        gradient: above 0, particles also follow the reward's gradient (RBF + DPS); see `dps`. Each then costs
            `rollflow.draw.GUIDED_NFE`, except at the last level.
        clip: the largest root mean square by which a gradient moves the posterior mean; see `dps`.

    Raises:
        RequestError: when the budget does not pay for the initial samples and one child a level.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1)
    given = Guide(gradient, clip=clip)
    guide, cost = (given, GUIDED_NFE) if gradient and steps > 1 else (None, 1)
    least = 1 if initial is None else whole("initial", initial, 1)
    after = cost * max(0, steps - 2) + (steps > 1)  # what one child at every later level costs
    require("rbf", nfe, cost * least + after, f"{least} initial, one child at each of {steps - 1} levels")
    if steps == 1:
        initial = nfe
    elif initial is None:
        initial = max(1, min(nfe // 10, nfe - after) // cost)
    return _search(nfe - cost * initial, steps, initial, guide, cost)


def _search(left: int, steps: int, initial: int, guide: Guide | None, cost: int) -> Search:
    (children,) = yield [Draw(None, initial, guide=guide, keep=1)]
    current = best(children)
    bar = worth(current)
    quota = each = max(1, left // (cost * steps))  # Q in the paper, in children
    alone = each == 1  # with one child a level, one that beats the bar rolls nothing over
    for _ in range(1, steps - 1):
        until = math.inf if alone else bar
        (children,) = yield [Draw(current, quota, until=until, guide=guide, keep=1, decides=not alone)]
        left -= cost * len(children)
        if worth(children[-1]) > bar:
            current = children[-1]
            bar = worth(current)
            quota = quota - len(children) + each  # the rollover
        else:
            current = best(children)
            quota = each
    if steps > 1:
        (children,) = yield [Draw(current, left, keep=1, decides=left > 1)]
        current = best(children)
    return current
