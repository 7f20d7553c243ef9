"""Beam search: several survivors a level."""

from __future__ import annotations

from typing import Any

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat, shared


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once, over all levels: parents and those candidates that may survive; with a look ahead all
    candidates, where each is ahead, and where it goes next.
    """
    ahead, cost = looks(steps, options.lookahead)
    each, most, parents = nfe // cost, 0, 0
    for level, further in enumerate(ahead):
        count = each if level < steps - 1 else nfe - each * (cost - 1)
        following = 1 if level == steps - 1 else each if level < steps - 2 else nfe - each * (cost - 1)
        kept = min(options.survivors, following)
        now = count * (1 + min(further, 2)) if further else min(count, kept * max(1, parents))
        most, parents = max(most, parents + now), kept
    return most


@method(branches=True, holds=held, parents=lambda nfe, steps, options: options.survivors * max(0, steps - 2))
def beam(nfe: int, steps: int, survivors: int = 4, lookahead: int = 0) -> Search:
    """At every level the best `survivors` of all candidates live on, and share the next level's candidates evenly.

    Diffusion latent beam search (Oshima et al. 2025, arXiv 2501.19252). SVDD has one survivor.

    Args:
        nfe: budget of function evaluations; each level has as many candidates, the last also what is left over.
        steps: levels; the first draws from the prior.
        survivors: how many, fewer where a level has fewer candidates.
        lookahead: steps of the ODE that each candidate is taken ahead, at most to the last level, before it is judged;
            they are charged, and the candidate lives on from where it was.

    Raises:
        RequestError: when the budget does not pay for one candidate a level.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("survivors", survivors, 1)
    whole("lookahead", lookahead, 0)
    ahead, cost = looks(steps, lookahead)
    require("beam", nfe, cost, f"one candidate at each of {steps} levels")
    return _search(nfe, steps, survivors, ahead, nfe // cost)


def looks(steps: int, lookahead: int) -> tuple[list[int], int]:
    """How far ahead the candidates of each level are taken, and what one candidate a level costs."""
    ahead = [min(lookahead, steps - 1 - level) for level in range(steps)]
    return ahead, steps + sum(ahead)


def _search(left: int, steps: int, survivors: int, ahead: list[int], each: int) -> Search:
    parents: list[Evaluated | None] = [None]
    for level in range(steps):
        count = each if level < steps - 1 else left
        left -= count * (1 + ahead[level])
        kept = 1 if level == steps - 1 else min(survivors, each if level < steps - 2 else left)
        particles = flat((yield _candidates(parents, count, None if ahead[level] else kept)))
        fronts = particles
        for i in range(ahead[level]):
            last = i == ahead[level] - 1
            fronts = flat((yield [Draw(p, move="ode", scored=last, decides=count > 1) for p in fronts]))
        order = sorted(range(count), key=lambda i: worth(fronts[i]), reverse=True)
        parents = [particles[i] for i in order[:kept]]
        del particles, fronts
    (chosen,) = parents
    assert chosen is not None
    return chosen


def _candidates(parents: list[Evaluated | None], count: int, keep: int | None) -> list[Draw]:
    """`count` candidates, shared among the parents; they are judged at once if the best are to be kept."""
    shares = zip(parents, shared(count, len(parents)), strict=True)
    return [Draw(parent, n, scored=keep is not None, decides=count > 1, keep=keep) for parent, n in shares]
