"""DPS: samples that follow the gradient of a differentiable reward."""

from __future__ import annotations

from rollflow.draw import GUIDED_NFE, Draw, Evaluated, Guide
from rollflow.methods.budget import Search, best, require, whole
from rollflow.methods.catalog import method
from rollflow.methods.paths import SIDE_BY_SIDE, flat, held, samples


def most(nfe: int, steps: int) -> int:
    """The most particles at once: those of the guided samples; or the best and two plain samples, which may follow."""
    count, left = divmod(nfe, GUIDED_NFE * (steps - 1) + 1)
    return max(held(count * steps, steps), 1 + held(left, steps) if left else 0)


@method(branches=False, guided=lambda options: True, holds=lambda nfe, steps, options: most(nfe, steps))
def dps(nfe: int, steps: int, gradient: float = 1.0, clip: float | None = None, normalise: bool = False) -> Search:
    """Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687; Kim et al. 2025, arXiv 2503.19385, table 4):
    independent samples, each step moved by the gradient of the reward of the posterior mean; the best one wins.

    A guided evaluation is charged `rollflow.draw.GUIDED_NFE`; the last of a sample guides nothing and costs one.

    Args:
        nfe: budget of function evaluations; what whole guided samples leave over pays for plain ones.
        steps: evaluations a sample.
        gradient: 1 / temperature of the target `p(x0) exp(gradient r(x0))`; see `rollflow.draw.Guide`.
        clip: the largest root mean square by which the posterior mean is moved at one step; none by default.
        normalise: move it by a root mean square of `gradient` at every step, whatever the size of the gradient.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one guided sample.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1)
    guide, cost = Guide(gradient, normalise, clip), GUIDED_NFE * (steps - 1) + 1
    require("dps", nfe, cost, f"one sample of {steps - 1} guided steps and one that is not")
    return _search(nfe, steps, guide, cost)


def _search(budget: int, steps: int, guide: Guide, cost: int) -> Search:
    count, left = divmod(budget, cost)
    chosen: list[Evaluated] = []  # the best so far
    while count:
        party = min(count, SIDE_BY_SIDE)
        first = Draw(None, party, guide=guide if steps > 1 else None, keep=1 if steps == 1 else None)
        particles = flat((yield [first]))
        for level in range(1, steps):
            particles = flat((yield [Draw(p, guide=guide if level < steps - 1 else None) for p in particles]))
        chosen, particles = [best([*chosen, *particles])], []
        count -= party
    if left:
        chosen = [best([*chosen, *(yield from samples(left, steps))])]
    return chosen[0]
