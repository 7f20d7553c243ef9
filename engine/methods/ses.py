"""SES: evolution of the coarse part of the initial noise."""

from __future__ import annotations

import math
from functools import partial

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, require, whole, worth
from rollflow.methods.paths import flat, route, shared, walk


def ses(nfe: int, steps: int, generations: int = 4, elites: int = 3, finish: int = 0) -> Search:
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
        finish: evaluations that the engine keeps for the finish of the chosen sample.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one sample.
    """
    for name, value in (("nfe", nfe), ("steps", steps), ("generations", generations), ("elites", elites)):
        whole(name, value, 1)
    whole("finish", finish, 0)
    require("ses", nfe, steps + finish, f"one sample of {steps} steps and a finish of {finish}")
    return _search(nfe - finish, steps, generations, elites)


def _search(budget: int, steps: int, generations: int, elites: int) -> Search:
    first = flat((yield [Draw(None, scored=steps == 1)]))
    ends = yield from walk(first, [route(steps - 1, steps)])
    best_first: list[tuple[Evaluated, Evaluated]] = list(zip(first, ends, strict=True))  # noise, and what became of it
    count, short = divmod(budget - steps, steps)
    sizes = [size for size in shared(count, generations) if size] or [0]
    for i, size in enumerate(sizes):
        noises = [noise for noise, _ in best_first[:elites]]
        around = partial(Draw, noises[0], move="rotate", mix=tuple(noises[1:]), coarse=True)
        angle = (1 - i / len(sizes)) * math.pi / 2
        draws = [around(size, angle=angle, scored=steps == 1)] if size else []
        routes = [route(steps - 1, steps)] * size
        if short and i == len(sizes) - 1:
            draws.append(around(1, angle=angle, scored=short == 1))
            routes.append(route(short - 1, steps))
        if draws:
            near = flat((yield draws))
            ends = yield from walk(near, routes)
            best_first += zip(near, ends, strict=True)
            best_first.sort(key=lambda pair: worth(pair[1]), reverse=True)
    return best_first[0][1]
