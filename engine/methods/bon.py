"""Best of N: independent samples, the best final reward wins."""

from __future__ import annotations

from rollflow.methods.budget import Search, best, require, whole
from rollflow.methods.paths import samples


def bon(nfe: int, steps: int, finish: int = 0) -> Search:
    """Best-of-N sampling: N = (nfe - finish) // steps samples of the whole path; only their last evaluation is judged.

    Args:
        nfe: budget of function evaluations; what is left after N whole samples pays for one of fewer, longer steps.
        steps: evaluations a sample.
        finish: evaluations that the engine keeps for the finish of the chosen sample.

    Raises:
        RequestError: when the budget does not pay for one sample.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("finish", finish, 0)
    require("bon", nfe, steps + finish, f"one sample of {steps} steps and a finish of {finish}")
    return _search(nfe - finish, steps)


def _search(budget: int, steps: int) -> Search:
    _, ends = yield from samples(budget, steps)
    return best(ends)
