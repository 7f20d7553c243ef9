"""Best of N: independent samples, the best final reward wins."""

from __future__ import annotations

from rollflow.draw import Evaluated
from rollflow.methods.budget import Search, best, require, whole
from rollflow.methods.catalog import method
from rollflow.methods.paths import SIDE_BY_SIDE, held, samples


@method(branches=False, holds=lambda nfe, steps, options: held(nfe, steps))
def bon(nfe: int, steps: int) -> Search:
    """Best-of-N sampling: N = nfe // steps samples of the whole path; only their last evaluation is judged.

    More than `SIDE_BY_SIDE` samples run in parties of that many.

    Args:
        nfe: budget of function evaluations; what is left after N whole samples pays for one of fewer, longer steps.
        steps: evaluations a sample.

    Raises:
        RequestError: when the budget does not pay for one sample.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1)
    require("bon", nfe, steps, f"one sample of {steps} steps")
    return _search(nfe, steps)


def _search(left: int, steps: int) -> Search:
    chosen: list[Evaluated] = []  # the best so far
    while left:
        party = left if left // steps <= SIDE_BY_SIDE else SIDE_BY_SIDE * steps
        chosen = [best([*chosen, *(yield from samples(party, steps))])]
        left -= party
    return chosen[0]
