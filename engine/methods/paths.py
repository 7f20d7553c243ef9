"""Walking particles along points of the grid, judged only where they arrive."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import chain

from rollflow.draw import Draw, Evaluated, Move

Route = Sequence[int]
SIDE_BY_SIDE = 1024  # independent samples that are on their way at a time, the bound of what is held for them


def route(evaluations: int, steps: int, start: int = 0) -> list[int]:
    """The points that a path visits after `start` with `evaluations` evaluations, evenly spread, the last one last."""
    stretch = steps - 1 - start
    return [start + round(stretch * i / evaluations) for i in range(1, evaluations + 1)]


def shared(count: int, parts: int) -> list[int]:
    """`count` in `parts` whole numbers that differ by at most 1, the larger first."""
    each, more = divmod(count, parts)
    return [each + (i < more) for i in range(parts)]


def flat(children: Sequence[Sequence[Evaluated]]) -> list[Evaluated]:
    """The particles of all draws, in order."""
    return list(chain.from_iterable(children))


def trails(
    starts: Sequence[Evaluated | None], routes: Sequence[Route]
) -> Generator[list[Draw], Sequence[Sequence[Evaluated]], list[list[Evaluated]]]:
    """Takes each particle (None: a new sample of the prior) along its route; returns the particles of each, in order.

    Only where a route ends is its particle judged. A step to the next point is one of the request's solver and
    diffusion; one that skips points is one of the ODE.
    """
    visited: list[list[Evaluated]] = [[] for _ in starts]
    for i in range(max(map(len, routes), default=0)):
        moving = [j for j, points in enumerate(routes) if i < len(points)]
        drawn = yield [_step(visited[j][-1] if i else starts[j], routes[j], i) for j in moving]
        for j, (child,) in zip(moving, drawn, strict=True):
            visited[j].append(child)
    return visited


def walk(
    particles: Sequence[Evaluated], routes: Sequence[Route]
) -> Generator[list[Draw], Sequence[Sequence[Evaluated]], list[Evaluated]]:
    """`trails`, of which only the ends are returned; a particle with an empty route stays what it is.

    It holds each particle where it is and where it goes next, and those that it starts from only while the caller does.
    """
    where = list(particles)
    del particles
    for i in range(max(map(len, routes), default=0)):
        moving = [j for j, points in enumerate(routes) if i < len(points)]
        drawn = flat((yield [_step(where[j], routes[j], i) for j in moving]))
        after = dict(zip(moving, drawn, strict=True))
        where = [after.get(j, particle) for j, particle in enumerate(where)]
    return where


def _step(particle: Evaluated | None, points: Route, i: int) -> Draw:
    where = -1 if particle is None else particle.step
    move: Move = "ode" if points[i] > where + 1 else "sde"
    return Draw(particle, move=move, level=points[i], scored=i == len(points) - 1)


def samples(budget: int, steps: int) -> Generator[list[Draw], Sequence[Sequence[Evaluated]], list[Evaluated]]:
    """As many whole samples as `budget` pays for, and with what is left one more of fewer, longer steps.

    Returns where each arrived; of samples of one step, which are judged at once, only the best may still be used.
    """
    whole, short = divmod(budget, steps)
    draws = [Draw(None, whole, scored=steps == 1, keep=1 if steps == 1 else None)] if whole else []
    draws += [Draw(None, 1, scored=short == 1)] if short else []
    routes = [route(steps - 1, steps)] * whole + [route(short - 1, steps)] * bool(short)
    return (yield from walk(flat((yield draws)), routes))


def held(budget: int, steps: int) -> int:
    """The most particles at once of `samples` in parties of `SIDE_BY_SIDE`: of each sample where it is and where it
    goes next, and the best of the parties before.
    """
    count, short = divmod(budget, steps)
    earlier = count > SIDE_BY_SIDE
    return 1 + earlier if steps == 1 else 2 * (min(count, SIDE_BY_SIDE) + bool(short)) + earlier
