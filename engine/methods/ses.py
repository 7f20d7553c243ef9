"""SES: evolution of the coarse part of the initial noise."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat, route, shared, walk


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once: the noises of the elites and their ends, and of each candidate of a generation its
    noise, where it is and where it goes next.
    """
    count, short = divmod(nfe - steps, steps)
    most = -(-count // options.generations)  # the largest generation
    candidates = min(most, options.elites) if steps == 1 else min(steps, 3) * (most + bool(short))
    return max(min(steps, 3), 2 * options.elites + candidates)


@method(branches=False, holds=held)
def ses(nfe: int, steps: int, generations: int = 4, elites: int = 3) -> Search:
    """Spectral evolution search (arXiv 2602.03208): a cross-entropy search over the low frequencies of the initial
    noise, to which the image is most sensitive; the high ones stay those of the first sample.

    The low band is the mean of each patch of the latent that makes a token. A generation's candidates are drawn around
    the sum of the last one's `elites`, brought back to the norm of noise; the share of fresh noise falls from
    generation to generation. Every candidate is solved to its image.

    Args:
        nfe: budget of function evaluations; what is left after whole samples pays for one of fewer, longer steps.
        steps: evaluations a sample; few are usually best. It is meant for the ODE, `diffusion=0`.
        generations: fewer where the budget pays for fewer samples.
        elites: the candidates that the next generation is drawn around.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one sample.
    """
    for name, value in (("nfe", nfe), ("steps", steps), ("generations", generations), ("elites", elites)):
        whole(name, value, 1)
    require("ses", nfe, steps, f"one sample of {steps} steps")
    return _search(nfe, steps, generations, elites)


def _search(budget: int, steps: int, generations: int, elites: int) -> Search:
    best_first = yield from _solve([Draw(None, scored=steps == 1)], [route(steps - 1, steps)])
    count, short = divmod(budget - steps, steps)
    sizes = [size for size in shared(count, generations) if size] or [0]
    for i, size in enumerate(sizes):
        noises = [noise for noise, _ in best_first[:elites]]
        around = partial(Draw, noises[0], move="rotate", mix=tuple(noises[1:]), coarse=True)
        angle = (1 - i / len(sizes)) * math.pi / 2
        keep = elites if steps == 1 else None
        draws = [around(size, angle=angle, scored=steps == 1, keep=keep)] if size else []
        routes = [route(steps - 1, steps)] * size
        if short and i == len(sizes) - 1:
            draws.append(around(1, angle=angle, scored=short == 1))
            routes.append(route(short - 1, steps))
        if draws:
            best_first += yield from _solve(draws, routes)
            best_first.sort(key=lambda pair: worth(pair[1]), reverse=True)
            del best_first[elites:]
    return best_first[0][1]


def _solve(
    draws: list[Draw], routes: list[list[int]]
) -> Generator[list[Draw], Sequence[Sequence[Evaluated]], list[tuple[Evaluated, Evaluated]]]:
    """Initial noises, and what became of each."""
    noises = flat((yield draws))
    return list(zip(noises, (yield from walk(noises, routes)), strict=True))
