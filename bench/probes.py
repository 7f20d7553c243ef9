"""What a search relies on, measured without one: how far a posterior mean's reward can be trusted, and how far
particles that share a beginning come apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from rollflow import interpolant
from rollflow.bench import contenders, intervals
from rollflow.draw import Draw
from rollflow.engine import Engine
from rollflow.methods.budget import Search
from rollflow.methods.paths import flat
from rollflow.request import Request

Row = dict[str, Any]
STEPS, PATHS_A_PROMPT, CHILDREN = 10, 12, 6


def judged_paths(nfe: int, steps: int) -> Search:
    """`nfe // steps` independent paths, judged at every point: a method for `Request.method`."""
    (particles,) = yield [Draw(None, nfe // steps)]
    for _ in range(1, steps):
        particles = flat((yield [Draw(particle) for particle in particles]))
    return particles[0]


def fidelity(engine: Engine, reward: Any, prompts: Sequence[str], path: dict[str, Any]) -> list[Row]:
    """The correlation of the reward of the posterior mean with the final reward of the same path, at each point.

    Of `PATHS_A_PROMPT` paths a prompt, Pearson's coefficient and Spearman's within each prompt (where both rewards
    vary), averaged, with a bootstrap interval over prompts. On an SDE the way from a point to the end is drawn at
    random, as it is for a search; the last point's own reward is the final one.

    Args:
        engine: of the model.
        reward: as `Request.reward`.
        prompts: at least two.
        path: the fields of requests that say on which path, and of which size.
    """
    nfe = STEPS * PATHS_A_PROMPT
    requests = [
        Request(p, reward=reward, method=judged_paths, nfe=nfe, steps=STEPS, seed=i, **path)
        for i, p in enumerate(prompts)
    ]
    pearson: list[list[float]] = [[] for _ in range(STEPS)]
    spearman: list[list[float]] = [[] for _ in range(STEPS)]
    for result in engine.generate(requests):
        values = np.empty((PATHS_A_PROMPT, STEPS))
        start: dict[int, int] = {}  # the path that a record belongs to
        for record in result.history:
            start[record.index] = record.index if record.parent is None else start[record.parent]
            values[start[record.index], record.level] = np.nan if record.reward is None else record.reward
        final = values[:, -1]
        for level in range(STEPS):
            if np.ptp(values[:, level]) > 0 and np.ptp(final) > 0:
                pearson[level].append(float(np.corrcoef(values[:, level], final)[0, 1]))
                spearman[level].append(float(stats.spearmanr(values[:, level], final)[0]))
    times = {record.level: record.time for record in result.history}
    return [
        {
            "level": level,
            "time": times[level],
            "linear_time": linear_time(path, times[level]),
            "pearson": float(np.mean(pearson[level])),
            "pearson_95": intervals.bootstrap(pearson[level]),
            "spearman": float(np.mean(spearman[level])),
            "prompts": len(pearson[level]),
        }
        for level in range(STEPS - 1)
        if len(pearson[level]) > 1
    ]


def trusted_from(rows: Sequence[Row], least: float = 0.5) -> float:
    """The linear time from which on, towards the image, the correlation is at least `least` at every point of the ODE,
    on average over prompt sets; 0 if it never is. It is what `rollflow.models.Traits` asks for.
    """
    levels: dict[int, list[Row]] = {}
    for row in rows:
        if row["path"] == contenders.ODE:
            levels.setdefault(row["level"], []).append(row)
    trusted = 0.0
    for level in sorted(levels, reverse=True):
        if np.mean([row["pearson"] for row in levels[level]]) < least:
            break
        trusted = levels[level][0]["linear_time"]
    return trusted


def linear_time(path: dict[str, Any], time: float) -> float:
    """The linear path's time of the same signal-to-noise ratio."""
    return interpolant.make(path["interpolant"]).linear_time(time)


class Album:
    """A reward that keeps the images it is shown, and finds them all alike."""

    name = "album"

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []

    def check(self, prompt: str) -> None:
        """Accepts every prompt."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Zeros."""
        self.images += list(images.detach().to("cpu", torch.float32))
        return torch.zeros(len(images))


def siblings(nfe: int, steps: int) -> Search:
    """Children of one sample of the prior at point 1, each taken on to the end: a method for `Request.method`."""
    (particles,) = yield [Draw(None, scored=False)]
    (particles,) = yield [Draw(particles[0], (nfe - 1) // (steps - 1))]
    for level in range(2, steps):
        particles = flat((yield [Draw(particle, scored=level == steps - 1) for particle in particles]))
    return particles[0]


def diversity(engine: Engine, reward: Any, prompts: Sequence[str], path: dict[str, Any]) -> list[Row]:
    """How far `CHILDREN` children of one initial latent differ: the root mean square of the difference of two posterior
    means, in pixel values, over all pairs; at point 1 and at the end. Means over prompts with bootstrap intervals.

    The paper's Figure 3 and Table 1 show the same with LPIPS. `reward` is not used.
    """
    first, last = [], []
    for i, prompt in enumerate(prompts):
        album = Album()
        nfe = 1 + CHILDREN * (STEPS - 1)
        engine.generate(Request(prompt, reward=album, method=siblings, nfe=nfe, steps=STEPS, seed=i, **path))
        images = torch.stack(album.images)  # at point 1, at the end, and the result's own
        first.append(_distance(images[:CHILDREN]))
        last.append(_distance(images[CHILDREN : 2 * CHILDREN]))
    return [
        {"point": point, "rms": float(np.mean(values)), "rms_95": intervals.bootstrap(values), "prompts": len(values)}
        for point, values in (("first", first), ("last", last))
    ]


def _distance(images: torch.Tensor) -> float:
    pairs = torch.pdist(images.flatten(1)) / images[0].numel() ** 0.5
    return float(pairs.mean())
