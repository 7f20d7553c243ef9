"""SoP: search over paths, back into the noise and down again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from rollflow.draw import Draw, Evaluated
from rollflow.methods.budget import Search, best, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat, shared, walk


def held(nfe: int, steps: int, options: Any) -> int:
    """The most particles at once: the survivors, where each candidate is, and where it goes next."""
    if steps == 1:
        return 1
    rounds = stations(steps, options.back, options.ahead)
    count = nfe // sum(1 + len(points) for _, points in rounds)
    return 2 * count + (min(options.survivors, count) if len(rounds) > 1 else 0)


@method(branches=False, holds=held)
def sop(nfe: int, steps: int, survivors: int = 2, back: int = 1, ahead: int = 2) -> Search:
    """Search over paths (Ma et al. 2025, arXiv 2501.09732): each round noises copies of the survivors `back` points by
    the interpolant's Markov kernel, takes them `ahead` points down the grid, judges them there and keeps the best.

    Args:
        nfe: budget of function evaluations, every one on the way counted; what division leaves over are further samples
            of the prior, judged at once, of which as many as there are candidates a round stay.
        steps: points of the grid that are evaluated. Under the ODE, `diffusion=0`, the way down is deterministic, as
            published.
        survivors: how many live on, fewer where a round has fewer candidates.
        back: points of the grid to noise.
        ahead: points to go down again, more than `back`.

    Raises:
        RequestError: a bad option, or a budget that does not pay for one candidate a round.
    """
    for name, value, least in (("nfe", nfe, 1), ("steps", steps, 1), ("survivors", survivors, 1), ("back", back, 1)):
        whole(name, value, least)
    whole("ahead", ahead, back + 1)
    rounds = stations(steps, back, ahead)
    cost = sum(1 + len(points) for _, points in rounds)
    require("sop", nfe, cost, f"one candidate in each of {len(rounds)} rounds")
    return _search(nfe, rounds, cost, survivors)


def stations(steps: int, back: int, ahead: int) -> list[tuple[int, list[int]]]:
    """For each round the point that its candidates are noised to and the points that they visit from there."""
    rounds = [(0, list(range(1, min(ahead, steps - 1) + 1)))]
    while rounds[-1][1] and rounds[-1][1][-1] < steps - 1:
        start = max(0, rounds[-1][1][-1] - back)
        rounds.append((start, list(range(start + 1, min(start + ahead, steps - 1) + 1))))
    return rounds


def _search(budget: int, rounds: list[tuple[int, list[int]]], cost: int, survivors: int) -> Search:
    count, extra = divmod(budget, cost)
    first = rounds[0][1]
    keep = 1 if not first else count if extra else None
    particles = yield from _descend([Draw(None, count + extra, scored=keep is not None, keep=keep)], count, first)
    for start, points in rounds[1:]:
        kept = sorted(particles, key=worth, reverse=True)[: min(survivors, count)]
        del particles
        copies = zip(kept, shared(count, len(kept)), strict=True)
        noised = [Draw(p, n, scored=False, move="renoise", level=start) for p, n in copies]
        particles = yield from _descend(noised, count, points)
    return best(particles)


def _descend(
    draws: list[Draw], count: int, points: list[int]
) -> Generator[list[Draw], Sequence[Sequence[Evaluated]], list[Evaluated]]:
    """Takes the children of `draws`, of more than `count` the best, down these points of the grid."""
    return (yield from walk(sorted(flat((yield draws)), key=worth, reverse=True)[:count], [points] * count))
