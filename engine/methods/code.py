"""CoDe: blockwise control, best of several partial paths at the end of each block."""

from __future__ import annotations

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, best, require, whole, worth


def code(nfe: int, steps: int, block: int = 2, finish: int = 0) -> Search:
    """CoDe (Singh et al. 2025, arXiv 2502.00968): the survivor of a block starts `nfe // steps` independent paths of
    `block` levels, of which the best at the end survives. Only ends of blocks are judged. `block=1` is SVDD.

    Args:
        nfe: budget of function evaluations; what division leaves over are further samples of the prior, of which as
            many as there are paths stay.
        steps: evaluations from noise to image; the last block may be shorter.
        block: levels a block.
        finish: evaluations that the engine keeps for the finish of the chosen particle.

    Raises:
        RequestError: when the budget does not pay for one path.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("block", block, 1), whole("finish", finish, 0)
    require("code", nfe, steps + finish, f"one path of {steps} steps and a finish of {finish}")
    return _search(nfe - finish, steps, block)


def _search(budget: int, steps: int, block: int) -> Search:
    paths, survivor, particles = budget // steps, None, list[Evaluated]()
    for level in range(steps):
        last = (level + 1) % block == 0 or level == steps - 1
        extra = budget % steps if level == 0 else 0
        if level % block == 0:
            (drawn,) = yield [Draw(survivor, paths + extra, scored=last or extra > 0)]
            particles = sorted(drawn, key=worth, reverse=True)[:paths] if extra else list(drawn)
        else:
            children = yield [Draw(particle, scored=last) for particle in particles]
            particles = [child for (child,) in children]
        if last:
            survivor = best(particles)
    assert survivor is not None
    return survivor
