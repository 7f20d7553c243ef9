"""EvoSearch: evolution of a population along the denoising path."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, best, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat
from rollflow.methods.zo import turn


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once: the population and its next step, or its parents, itself and its mutants."""
    if steps == 1:
        return 1
    points = len(mutations(steps, options.generations))
    count, elites = population(nfe, steps, points, options.elites)
    return 2 * count if points == 1 else 3 * count - elites


@method(branches=True, holds=held)
def evosearch(nfe: int, steps: int, generations: int = 3, elites: int = 2, angle: float = 0.3, seed: int = 0) -> Search:
    """Evolutionary search (He et al. 2025, arXiv 2505.17618): at a few points of the grid, the first one included,
    the population is judged; the `elites` live on, and the others are replaced by mutations of tournament winners (the
    better of two). Initial noise mutates by a turn towards fresh noise; a later particle by another step of the SDE
    from the same parent.

    Args:
        nfe: budget of function evaluations; what division leaves over are further samples of the prior.
        steps: points of the grid that are evaluated.
        generations: points at which the population mutates, evenly spread over all but the last.
        elites: particles that no mutation replaces; smaller populations keep one.
        angle: of the turn of initial noise, in right angles.
        seed: of the tournaments; a request's own.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one particle.
    """
    for name, value in (("nfe", nfe), ("steps", steps), ("generations", generations), ("elites", elites)):
        whole(name, value, 1)
    require("evosearch", nfe, steps, f"one particle of {steps} steps")
    rng = np.random.default_rng(seed % 2**64)
    return _search(nfe, steps, mutations(steps, generations), elites, turn(angle), rng)


def mutations(steps: int, generations: int) -> list[int]:
    """The points of the grid at which the population mutates."""
    return sorted({i * (steps - 1) // generations for i in range(generations)}) if steps > 1 else []


def population(budget: int, steps: int, points: int, elites: int) -> tuple[int, int]:
    """How many particles the budget pays for, and how many of them are elites."""
    count = max(n for n in range(1, budget // steps + 1) if n * steps + points * (n - min(elites, n)) <= budget)
    return count, min(elites, count)


def _search(budget: int, steps: int, points: list[int], elites: int, angle: float, rng: np.random.Generator) -> Search:
    count, elites = population(budget, steps, len(points), elites)
    extra = budget - count * steps - len(points) * (count - elites)
    particles = flat((yield [Draw(None, count + extra, keep=count if steps > 1 else 1)]))
    if steps > 1:
        particles = sorted(particles, key=worth, reverse=True)[:count]
    above: list[Evaluated | None] = [None] * count  # each particle's parent
    for point, after in pairwise([*points, steps - 1]):
        particles, above = yield from _mutate(particles, above, elites, angle, rng)
        for level in range(point + 1, after + 1):
            above = list(particles)
            particles = flat((yield [Draw(particle, scored=level == after) for particle in particles]))
    return best(particles)


def _mutate(
    particles: list[Evaluated], above: list[Evaluated | None], elites: int, angle: float, rng: np.random.Generator
) -> Generator[list[Draw], Sequence[Sequence[Evaluated]], tuple[list[Evaluated], list[Evaluated | None]]]:
    """The next generation, and each one's parent."""
    order = sorted(range(len(particles)), key=lambda i: worth(particles[i]), reverse=True)
    winners = [order[min(rng.integers(len(order), size=2))] for _ in order[elites:]]  # ranks: the smaller is better
    around = partial(Draw, move="rotate", angle=angle, decides=False)  # mutants are compared only where they arrive
    draws = [around(particles[i]) if above[i] is None else Draw(above[i], decides=False) for i in winners]
    mutants = flat((yield draws)) if draws else []
    kept = order[:elites]
    return [*(particles[i] for i in kept), *mutants], [*(above[i] for i in kept), *(above[i] for i in winners)]
