"""Sprout: seeds are pruned as they grow, and new ones sown around the best."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from rollflow.draw import Draw, Evaluated
from rollflow.errors import RequestError
from rollflow.methods.budget import Search, number, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat, shared
from rollflow.methods.psp import levels
from rollflow.methods.zo import turn


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once, over all rounds: the elites and their best; and the first noises of a round that may
    stay, or of each noise that grows itself, its best, where it is and where it goes next.
    """
    elites, most = options.elites, 0
    for sown, counts in enumerate(rounds_of(nfe, steps, options)):
        near = min(elites, counts[0]) if sown else 1
        grow = [count * min(level + 1, 4) for level, count in enumerate(counts)]
        grow[0] = counts[0] if options.first and steps > 1 else min(counts[0], near * _kept(counts, elites))
        most = max(most, *grow)
    return 2 * elites + most


@method(branches=False, trusts="first", holds=held)
def sprout(
    nfe: int,
    steps: int,
    explore: float = 0.5,
    rounds: int = 2,
    factor: float = 2.0,
    elites: int = 2,
    angle: float = 0.3,
    first: int = 0,
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

    Raises:
        RequestError: a bad option, or a budget that does not pay for one whole sample.
    """
    for name, value, least in (("nfe", nfe, 1), ("steps", steps, 1), ("rounds", rounds, 0), ("elites", elites, 1)):
        whole(name, value, least)
    whole("first", first, 0)
    if not 0 < number("explore", explore) <= 1 or number("factor", factor) < 1:
        raise RequestError(f"explore={explore!r}, factor={factor!r}: a share in (0, 1], and a factor of at least 1")
    require("sprout", nfe, steps, f"one sample of {steps} steps")
    options = SimpleNamespace(explore=explore, rounds=rounds, factor=factor, first=first)
    return _search(rounds_of(nfe, steps, options), elites, turn(angle), min(first, steps - 1))


def rounds_of(nfe: int, steps: int, options: Any) -> list[list[int]]:
    """How many noises each round evaluates at each level."""
    fresh = min(nfe, max(steps, round(options.explore * nfe)))
    rounds = min(options.rounds, (nfe - fresh) // steps)
    shares = [fresh, *shared(nfe - fresh, rounds)] if rounds else [nfe]
    return [levels(share, steps, options.factor, options.first) for share in shares]


Seed = tuple[Evaluated, Evaluated]  # an initial noise and the best particle on its way


def _search(plan: list[list[int]], elites: int, angle: float, first: int) -> Search:
    seeds: list[Seed] = []  # best first
    for counts in plan:
        sown = flat((yield _sow(seeds, counts, elites, angle, not first)))
        growing = [(seed, seed, seed) for seed in sown]  # noise, where it is, the best on its way
        del sown
        for level, count in enumerate(counts[1:], 1):
            if len(growing) > count:
                growing.sort(key=lambda way: worth(way[1]), reverse=True)
                seeds = _elite([*seeds, *((seed, top) for seed, _, top in growing[count:])], elites)
                del growing[count:]
            children = flat((yield [Draw(at, scored=level >= first) for _, at, _ in growing]))
            growing = [
                (seed, child, max(child, top, key=worth))  # on ties the sharper, later one
                for (seed, _, top), child in zip(growing, children, strict=True)
            ]
            del children
        seeds = _elite([*seeds, *((seed, top) for seed, _, top in growing)], elites)
        del growing
    return seeds[0][1]


def _kept(counts: list[int], elites: int) -> int:
    """How many of the noises of a round's first level may still be needed: those that grow on, and the elite."""
    return elites + (counts[1] if len(counts) > 1 else 0)


def _sow(seeds: list[Seed], counts: list[int], elites: int, angle: float, judged: bool) -> list[Draw]:
    """The first noises of a round: fresh ones, or neighbours of the best seeds."""
    keep = _kept(counts, elites) if judged else None
    if not seeds:
        return [Draw(None, counts[0], scored=judged, keep=keep)]
    parents = [seed for seed, _ in seeds[: min(elites, counts[0])]]
    near = zip(parents, shared(counts[0], len(parents)), strict=True)
    return [Draw(p, n, move="rotate", angle=angle, scored=judged, keep=keep) for p, n in near]


def _elite(seeds: list[Seed], elites: int) -> list[Seed]:
    """The best seeds; of equal ones those that went further, then those that came first."""
    return sorted(seeds, key=lambda pair: (worth(pair[1]), pair[1].step), reverse=True)[:elites]
