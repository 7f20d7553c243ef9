"""SVDD: soft value-based decoding, in the greedy form that the paper compares."""

from __future__ import annotations

from rollflow.draw import GUIDED_NFE, Draw, Evaluated, Guide
from rollflow.methods.budget import Search, best, require, whole
from rollflow.methods.catalog import method


@method(
    branches=True,
    guided=lambda options: options.gradient > 0,
    holds=lambda nfe, steps, options: 2,
    parents=lambda nfe, steps, options: max(0, steps - 2),
)
def svdd(nfe: int, steps: int, children: int | None = None, gradient: float = 0.0, clip: float | None = None) -> Search:
    """At each of the `steps` levels draws `children` candidates from the survivor and keeps the best (Li et al. 2024,
    arXiv 2408.08252, with temperature 0; Kim et al. 2025, arXiv 2503.19385, table 2).

    Args:
        nfe: budget of function evaluations; the last level takes what division leaves over, so that all is spent.
        steps: levels; the first draws from the prior.
        children: candidates a level; by default as many as the budget allows.
        gradient: above 0, candidates also follow the reward's gradient (SVDD + DPS); see `dps`. Each then costs
            `rollflow.draw.GUIDED_NFE`, except at the last level.
        clip: the largest root mean square by which a gradient moves the posterior mean; see `dps`.

    Raises:
        RequestError: when the budget does not pay for `children` at every level.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1)
    given = Guide(gradient, clip=clip)
    guide, cost = (given, GUIDED_NFE) if gradient else (None, 1)
    each = cost * (steps - 1) + 1  # what one candidate at every level costs
    least = 1 if children is None else whole("children", children, 1)
    require("svdd", nfe, least * each, f"{least} at each of {steps} levels")
    return _search(nfe, steps, children or nfe // each, guide, cost)


def _search(left: int, steps: int, children: int, guide: Guide | None, cost: int) -> Search:
    survivor: Evaluated | None = None
    for _ in range(steps - 1):
        (drawn,) = yield [Draw(survivor, children, guide=guide, keep=1, decides=children > 1)]
        survivor = best(drawn)
        left -= cost * len(drawn)
    (drawn,) = yield [Draw(survivor, left, keep=1, decides=left > 1)]
    return best(drawn)
