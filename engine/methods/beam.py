"""Beam search: several survivors a level."""

from __future__ import annotations

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, require, whole, worth
from rollflow.methods.paths import flat, shared


def beam(nfe: int, steps: int, survivors: int = 4, lookahead: int = 0, finish: int = 0) -> Search:
    """At every level the best `survivors` of all candidates live on, and share the next level's candidates evenly.

    Diffusion latent beam search (Oshima et al. 2025, arXiv 2501.19252). SVDD has one survivor.

    Args:
        nfe: budget of function evaluations; each level has as many candidates, the last also what is left over.
        steps: levels; the first draws from the prior.
        survivors: how many, fewer where a level has fewer candidates.
        lookahead: steps of the ODE that each candidate is taken ahead, at most to the last level, before it is judged;
            they are charged, and the candidate lives on from where it was.
        finish: evaluations that the engine keeps for the finish of the chosen particle.

    Raises:
        RequestError: when the budget does not pay for one candidate a level.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("survivors", survivors, 1)
    whole("lookahead", lookahead, 0), whole("finish", finish, 0)
    ahead = [min(lookahead, steps - 1 - level) for level in range(steps)]
    cost = steps + sum(ahead)
    require("beam", nfe, cost + finish, f"one candidate at each of {steps} levels, {finish} to finish")
    return _search(nfe - finish, steps, survivors, ahead, (nfe - finish) // cost)


def _search(left: int, steps: int, survivors: int, ahead: list[int], each: int) -> Search:
    parents: list[Evaluated | None] = [None]
    for level in range(steps):
        count = each if level < steps - 1 else left
        shares = zip(parents, shared(count, len(parents)), strict=True)
        particles = flat((yield [Draw(parent, n, scored=not ahead[level]) for parent, n in shares]))
        fronts = particles
        for i in range(ahead[level]):
            fronts = flat((yield [Draw(p, move="ode", scored=i == ahead[level] - 1) for p in fronts]))
        left -= count * (1 + ahead[level])
        order = sorted(range(count), key=lambda i: worth(fronts[i]), reverse=True)
        parents = [particles[i] for i in order[: min(survivors, each if level < steps - 2 else left)]]
    return particles[order[0]]
