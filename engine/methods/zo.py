"""Zero-order search: a hill climb over the initial noise."""

from __future__ import annotations

import math

from rollflow.draw import Draw
from rollflow.errors import RequestError
from rollflow.methods.budget import Search, best, number, require, whole, worth
from rollflow.methods.paths import flat, route, samples, walk


def zo(nfe: int, steps: int, neighbours: int = 4, angle: float = 0.3, finish: int = 0) -> Search:
    """Zero-order search (Ma et al. 2025, arXiv 2501.09732): draws `neighbours` of the pivot, an initial noise, solves
    each to its image, and moves the pivot to the best one if that is better; repeats.

    A neighbour is the pivot turned towards fresh noise, `cos(a) x + sin(a) z`, so that it is noise again.

    Args:
        nfe: budget of function evaluations; what is left after whole samples pays for one of fewer, longer steps.
        steps: evaluations a sample; few are usually best. It is meant for the ODE, `diffusion=0`, where the noise
            decides the image.
        neighbours: of the pivot in one round.
        angle: of the turn, in right angles: 0 is the pivot itself, 1 fresh noise.
        finish: evaluations that the engine keeps for the finish of the chosen sample.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one sample.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("neighbours", neighbours, 1), whole("finish", finish, 0)
    require("zo", nfe, steps + finish, f"one sample of {steps} steps and a finish of {finish}")
    return _search(nfe - finish, steps, neighbours, turn(angle))


def turn(angle: float) -> float:
    """Radians of an angle in right angles; raises `RequestError` outside (0, 1]."""
    if not 0 < number("angle", angle) <= 1:
        raise RequestError(
            f"angle={angle!r}: the turn of a noise is above 0, the noise itself, and at most 1, fresh noise"
        )
    return angle * math.pi / 2


def _search(budget: int, steps: int, neighbours: int, angle: float) -> Search:
    (pivot,), ends = yield from samples(steps, steps)
    chosen, left = ends[0], budget - steps
    while left >= steps:
        count = min(neighbours, left // steps)
        (near,) = yield [Draw(pivot, count, move="rotate", angle=angle, scored=steps == 1)]
        ends = yield from walk(near, [route(steps - 1, steps)] * count)
        left -= count * steps
        top = best(ends)
        if worth(top) > worth(chosen):
            pivot, chosen = near[ends.index(top)], top
    if left:
        near = flat((yield [Draw(pivot, 1, move="rotate", angle=angle, scored=left == 1)]))
        chosen = best([chosen, *(yield from walk(near, [route(left - 1, steps)]))])
    return chosen
