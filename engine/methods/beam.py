"""Beam search: several survivors a level."""

from __future__ import annotations

from rollflow.methods.budget import Search, best, require, whole, worth
from rollflow.particle import Draw


def beam(nfe: int, steps: int, survivors: int = 4, finish: int = 0) -> Search:
    """At every level the best `survivors` of all candidates live on, and share the next level's candidates evenly.

    Diffusion latent beam search (Oshima et al. 2025, arXiv 2501.19252) without lookahead. SVDD has one survivor.

    Args:
        nfe: budget of function evaluations; each level has `nfe // steps` candidates, the last also what is left over.
        steps: levels; the first draws from the prior.
        survivors: how many, fewer where a level has fewer candidates.
        finish: evaluations that the engine keeps for the finish of the chosen particle.

    Raises:
        RequestError: when the budget does not pay for one candidate a level.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("survivors", survivors, 1), whole("finish", finish, 0)
    require("beam", nfe, steps + finish, f"one candidate at each of {steps} levels and a finish of {finish}")
    return _search(nfe - finish, steps, survivors)


def _search(budget: int, steps: int, survivors: int) -> Search:
    each = budget // steps
    (particles,) = yield [Draw(None, each if steps > 1 else budget)]
    for level in range(1, steps):
        count = each if level < steps - 1 else budget - each * (steps - 1)
        parents = sorted(particles, key=worth, reverse=True)[: min(survivors, count)]
        share, more = divmod(count, len(parents))
        drawn = yield [Draw(parent, share + (i < more)) for i, parent in enumerate(parents)]
        particles = [child for children in drawn for child in children]
    return best(particles)
