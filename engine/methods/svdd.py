"""SVDD: soft value-based decoding, in the greedy form that the paper compares."""

from __future__ import annotations

from rollflow.draw import GUIDED_NFE, Draw, Evaluated, Guide
from rollflow.methods.budget import Search, best, require, whole


def svdd(
    nfe: int,
    steps: int,
    children: int | None = None,
    gradient: float = 0.0,
    clip: float | None = None,
    finish: int = 0,
) -> Search:
    """At each of the `steps` levels draws `children` candidates from the survivor and keeps the best (Li et al. 2024,
    arXiv 2408.08252, with temperature 0; Kim et al. 2025, arXiv 2503.19385, table 2).

    Args:
        nfe: budget of function evaluations; the last level takes what division leaves over, so that all is spent.
        steps: levels; the first draws from the prior.
        children: candidates a level; by default as many as the budget allows.
        gradient: above 0, candidates also follow the reward's gradient (SVDD + DPS); see `dps`. Each then costs
            `rollflow.draw.GUIDED_NFE`, except at the last level.
        clip: see `dps`.
        finish: evaluations that the engine keeps for the finish of the chosen particle.

    Raises:
        RequestError: when the budget does not pay for `children` at every level.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("finish", finish, 0)
    given = Guide(gradient, clip=clip)
    guide, cost = (given, GUIDED_NFE) if gradient else (None, 1)
    each = cost * (steps - 1) + 1  # what one candidate at every level costs
    least = 1 if children is None else whole("children", children, 1)
    require("svdd", nfe, least * each + finish, f"{least} at each of {steps} levels and a finish of {finish}")
    return _search(nfe - finish, steps, children or (nfe - finish) // each, guide, cost)


def _search(left: int, steps: int, children: int, guide: Guide | None, cost: int) -> Search:
    survivor: Evaluated | None = None
    for _ in range(steps - 1):
        (drawn,) = yield [Draw(survivor, children, guide=guide)]
        survivor = best(drawn)
        left -= cost * len(drawn)
    (drawn,) = yield [Draw(survivor, left)]
    return best(drawn)
