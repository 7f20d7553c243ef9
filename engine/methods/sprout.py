"""Sprout: seeds are pruned as they grow, and new ones sown around the best."""

from __future__ import annotations

from rollflow.draw import Draw, Evaluated
from rollflow.errors import RequestError
from rollflow.methods.budget import Search, number, require, whole, worth
from rollflow.methods.paths import flat, shared
from rollflow.methods.psp import levels
from rollflow.methods.zo import turn


def sprout(
    nfe: int,
    steps: int,
    explore: float = 0.5,
    rounds: int = 2,
    factor: float = 2.0,
    elites: int = 2,
    angle: float = 0.3,
    first: int = 0,
    finish: int = 0,
) -> Search:
    """Our own: progressive seed pruning in rounds. The first round prunes fresh initial noises, as `psp` does; each
    later one prunes noises that are turned a little from the best so far, `cos(a) x + sin(a) z`, as in `zo`. A noise is
    worth the best reward that was seen on its way.

    Under the ODE the noise decides the image and its neighbours give similar ones, so that a later round searches where
    good images are dense; pruning makes each neighbour cheap. Its parts: arXiv 2607.21591 (pruning), arXiv 2501.09732
    (neighbours of a noise).

    Args:
        nfe: budget of function evaluations.
        steps: evaluations of a noise that is never pruned.
        explore: share of the budget for fresh noises; 1 is `psp`.
        rounds: of neighbours; fewer where the budget does not pay for a whole sample in each.
        factor: how many times fewer noises each point of the grid has than the one before; 1 prunes nothing.
        elites: noises that a round's neighbours are shared among.
        angle: of the turn, in right angles: 0 is the noise itself, 1 a fresh one.
        first: the first point of the grid that is judged, and after which noises are pruned; see `psp`.
        finish: evaluations that the engine keeps for the finish of the chosen particle.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one whole sample.
    """
    for name, value, least in (("nfe", nfe, 1), ("steps", steps, 1), ("rounds", rounds, 0), ("elites", elites, 1)):
        whole(name, value, least)
    whole("first", first, 0), whole("finish", finish, 0)
    if not 0 < number("explore", explore) <= 1 or number("factor", factor) < 1:
        raise RequestError(f"explore={explore!r}, factor={factor!r}: a share in (0, 1], and a factor of at least 1")
    require("sprout", nfe, steps + finish, f"one sample of {steps} steps and a finish of {finish}")
    budget = nfe - finish
    fresh = min(budget, max(steps, round(explore * budget)))
    rounds = min(rounds, (budget - fresh) // steps)
    shares = [fresh, *shared(budget - fresh, rounds)] if rounds else [budget]
    return _search(
        [levels(share, steps, factor, first) for share in shares], elites, turn(angle), min(first, steps - 1)
    )


def _search(plan: list[list[int]], elites: int, angle: float, first: int) -> Search:
    seeds: list[tuple[Evaluated, Evaluated]] = []  # initial noises and the best particle on the way of each, best first
    for counts in plan:
        if seeds:
            parents = [seed for seed, _ in seeds[: min(elites, counts[0])]]
            near = zip(parents, shared(counts[0], len(parents)), strict=True)
            draws = [Draw(p, n, move="rotate", angle=angle, scored=not first) for p, n in near]
        else:
            draws = [Draw(None, counts[0], scored=not first)]
        growing = [(seed, seed, seed) for seed in flat((yield draws))]  # noise, where it is, the best on its way
        for level, count in enumerate(counts[1:], 1):
            if len(growing) > count:
                growing.sort(key=lambda way: worth(way[1]), reverse=True)
                seeds += [(seed, top) for seed, _, top in growing[count:]]
                del growing[count:]
            children = flat((yield [Draw(at, scored=level >= first) for _, at, _ in growing]))
            growing = [
                (seed, child, max(child, top, key=worth))  # on ties the sharper, later one
                for (seed, _, top), child in zip(growing, children, strict=True)
            ]
        seeds += [(seed, top) for seed, _, top in growing]
        seeds.sort(key=lambda pair: (worth(pair[1]), pair[1].step), reverse=True)
        del seeds[elites:]
    return seeds[0][1]
