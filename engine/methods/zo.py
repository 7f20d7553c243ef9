"""Zero-order search: a hill climb over the initial noise."""

from __future__ import annotations

import math
from typing import Any

from rollflow.draw import Draw
from rollflow.errors import RequestError
from rollflow.methods.budget import Search, best, number, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat, route, walk


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once: the pivot, the best image, and of each neighbour its noise, where it is and where it
    goes next.
    """
    count = min(options.neighbours, (nfe - steps) // steps)
    return 2 + (1 if steps == 1 else min(steps, 3) * max(1, count))


@method(branches=False, holds=held)
def zo(nfe: int, steps: int, neighbours: int = 4, angle: float = 0.3) -> Search:
    """Zero-order search (Ma et al. 2025, arXiv 2501.09732): draws `neighbours` of the pivot, an initial noise, solves
    each to its image, and moves the pivot to the best one if that is better; repeats.

    A neighbour is the pivot turned towards fresh noise, `cos(a) x + sin(a) z`, so that it is noise again.

    Args:
        nfe: budget of function evaluations; what is left after whole samples pays for one of fewer, longer steps.
        steps: evaluations a sample; few are usually best. It is meant for the ODE, `diffusion=0`, where the noise
            decides the image.
        neighbours: of the pivot in one round.
        angle: of the turn, in right angles: 0 is the pivot itself, 1 fresh noise.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one sample.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("neighbours", neighbours, 1)
    require("zo", nfe, steps, f"one sample of {steps} steps")
    return _search(nfe, steps, neighbours, turn(angle))


def turn(angle: float) -> float:
    """Radians of an angle in right angles; raises `RequestError` outside (0, 1]."""
    if not 0 < number("angle", angle) <= 1:
        raise RequestError(
            f"angle={angle!r}: the turn of a noise is above 0, the noise itself, and at most 1, fresh noise"
        )
    return angle * math.pi / 2


def _search(budget: int, steps: int, neighbours: int, angle: float) -> Search:
    (pivot,) = flat((yield [Draw(None, scored=steps == 1)]))
    (chosen,) = yield from walk([pivot], [route(steps - 1, steps)])
    left = budget - steps
    while left >= steps:
        count = min(neighbours, left // steps)
        keep = 1 if steps == 1 else None
        (near,) = yield [Draw(pivot, count, move="rotate", angle=angle, scored=steps == 1, keep=keep)]
        ends = yield from walk(near, [route(steps - 1, steps)] * count)
        left -= count * steps
        top = best(ends)
        if worth(top) > worth(chosen):
            pivot, chosen = near[ends.index(top)], top
        del near, ends, top
    if left:
        near = flat((yield [Draw(pivot, 1, move="rotate", angle=angle, scored=left == 1)]))
        chosen = best([chosen, *(yield from walk(near, [route(left - 1, steps)]))])
    return chosen
