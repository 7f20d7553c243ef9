"""CoDe: blockwise control, best of several partial paths at the end of each block."""

from __future__ import annotations

from typing import Any

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, best, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once: a survivor, where each path is and where it goes next."""
    return 2 if options.block == 1 or steps == 1 else 1 + 2 * (nfe // steps)


@method(branches=True, holds=held)
def code(nfe: int, steps: int, block: int = 2) -> Search:
    """CoDe (Singh et al. 2025, arXiv 2502.00968): the survivor of a block starts `nfe // steps` independent paths of
    `block` levels, of which the best at the end survives. Only ends of blocks are judged. `block=1` is SVDD.

    Args:
        nfe: budget of function evaluations; what division leaves over are further samples of the prior, of which as
            many as there are paths stay.
        steps: evaluations from noise to image; the last block may be shorter.
        block: levels a block.

    Raises:
        RequestError: when the budget does not pay for one path.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1), whole("block", block, 1)
    require("code", nfe, steps, f"one path of {steps} steps")
    return _search(nfe, steps, block)


def _search(budget: int, steps: int, block: int) -> Search:
    paths, survivor, particles = budget // steps, list[Evaluated](), list[Evaluated]()
    for level in range(steps):
        last = (level + 1) % block == 0 or level == steps - 1
        extra = budget % steps if level == 0 else 0
        if level % block == 0:
            keep = 1 if last else paths if extra else None
            parent = survivor[0] if survivor else None
            count = paths + extra
            draw = Draw(parent, count, scored=last or extra > 0, decides=count > 1, keep=keep)
            particles = flat((yield [draw]))
            if extra:
                particles = sorted(particles, key=worth, reverse=True)[:paths]
        else:
            particles = flat((yield [Draw(particle, scored=last, decides=paths > 1) for particle in particles]))
        if last:
            survivor, particles = [best(particles)], []
    return survivor[0]
