"""SMC and FK steering: a population whose weights follow the reward, resampled when they degenerate."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np

from rollflow.draw import Draw, Evaluated, Note
from rollflow.errors import RequestError, shown
from rollflow.methods.budget import Search, best, number, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat
from rollflow.methods.resampling import effective_sample_size, normalised, scheme

POTENTIALS = ("difference", "max", "sum")
Population = tuple[list[Evaluated], np.ndarray, float]
Result = TypeVar("Result")
Steps = Generator[list[Draw] | Note, Any, Result]  # it is sent the particles of its draws, and None for a note


def held(nfe: int, steps: int) -> int:
    """The most particles at once: the first ones, or each and its child."""
    count = nfe // steps
    return 1 if steps == 1 else max(nfe - count * (steps - 1), 2 * count)


@method(branches=True, holds=lambda nfe, steps, options: held(nfe, steps))
def smc(
    nfe: int,
    steps: int,
    temperature: float = 1.0,
    resampling: str = "systematic",
    threshold: float = 0.5,
    seed: int = 0,
) -> Search:
    """Sequential Monte Carlo with target `p(x0) exp(r(x0) / temperature)` (Kim et al. 2025, arXiv 2503.19385, table 2):
    FK steering with the potential "difference". The particle with the best last reward is chosen.

    Args:
        nfe: budget of function evaluations; see `fk`.
        steps: evaluations a path.
        temperature: of the rewards; lower is greedier.
        resampling: "multinomial", "systematic", "stratified" or "residual".
        threshold: resample when the effective sample size falls below this share of the particles; 1 is always.
        seed: of the resampling; a request's own.

    Raises:
        RequestError: an option out of range, or a budget that does not pay for one particle.
    """
    return fk(nfe, steps, "difference", temperature, resampling, threshold, seed)


@method(branches=True, holds=lambda nfe, steps, options: held(nfe, steps))
def fk(
    nfe: int,
    steps: int,
    potential: str = "max",
    temperature: float = 1.0,
    resampling: str = "systematic",
    threshold: float = 1.0,
    seed: int = 0,
) -> Search:
    """Feynman-Kac steering (Singhal et al. 2025, arXiv 2501.06848): `nfe // steps` particles, one child each a level.

    Args:
        nfe: budget of function evaluations; what division leaves over are further samples of the prior, all of which
            take part in a first resampling.
        steps: evaluations a path.
        potential: what a particle's weight grows by, with r its reward over the temperature: "difference", r less its
            parent's; "max", the largest r on its path; "sum", the sum of r over its path. The last level takes out
            what came before, so that the target is the same for all.
        temperature: of the rewards; lower is greedier.
        resampling: "multinomial", "systematic", "stratified" or "residual".
        threshold: resample when the effective sample size falls below this share of the particles; 1 is always.
        seed: of the resampling; a request's own.

    Raises:
        RequestError: an option out of range, or a budget that does not pay for one particle.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1)
    if not isinstance(potential, str) or potential not in POTENTIALS:
        raise RequestError(f"unknown potential {shown(potential)}: choose one of {', '.join(POTENTIALS)}")
    if number("temperature", temperature) <= 0 or not 0 <= number("threshold", threshold) <= 1:
        raise RequestError(
            f"temperature={temperature!r}, threshold={threshold!r}: a temperature is above 0, a threshold in [0, 1]"
        )
    scheme(resampling)
    require("smc and fk", nfe, steps, f"one particle of {steps} steps")
    return best_of(population(nfe, steps, potential, temperature, resampling, threshold, seed))


def best_of(search: Steps[Population]) -> Search:
    """A population's search that returns its best particle."""
    particles, _, _ = yield from search
    return best(particles)


def population(
    budget: int, steps: int, potential: str, temperature: float, resampling: str, threshold: float, seed: int
) -> Steps[Population]:
    """The search itself; returns the last particles, the logarithms of their weights, and that of the normalising
    constant `E exp(r(x0) / temperature)`, whose estimate is unbiased.

    It notes the effective sample size of every level, `resampled`, whether the level was resampled, and `ancestors`,
    of which of the level's particles each of the next level's is the child; at the last level `log_evidence`, the
    logarithm of that estimate.
    """
    rng, count = np.random.default_rng(seed % 2**64), budget // steps
    particles = flat((yield [Draw(None, budget - count * (steps - 1), keep=1 if steps == 1 else None)]))
    reward = np.array([worth(p) for p in particles]) / temperature
    score = reward.copy()  # the last potential's logarithm but for "difference", whose product telescopes to it
    log_weights, spent = reward.copy(), reward.copy()  # spent: the logarithm of all potentials on the path
    log_constant = 0.0
    for level in range(1, steps):
        if log_weights.max() == -np.inf:  # no reward was a number: begin again from here, all alike
            reward, score, spent, log_weights = (np.zeros(len(particles)) for _ in range(4))
        weights = normalised(log_weights)
        resampled = len(particles) != count or effective_sample_size(weights) < threshold * count * (1 - 1e-12)
        chosen = scheme(resampling)(weights, count, rng) if resampled else np.arange(count)
        yield note(level - 1, weights, resampled, chosen)
        if resampled:
            log_constant += log_mean(log_weights)
            particles = [particles[i] for i in chosen]
            reward, score, spent, log_weights = reward[chosen], score[chosen], spent[chosen], np.zeros(count)
        particles = flat((yield [Draw(particle) for particle in particles]))
        before, reward = reward, np.array([worth(p) for p in particles]) / temperature
        if level == steps - 1:
            gain = less(reward, spent)
        elif potential == "difference":
            gain = less(reward, before)
        else:
            score = np.maximum(score, reward) if potential == "max" else score + reward
            gain = score
        log_weights, spent = log_weights + gain, spent + gain
    log_constant += log_mean(log_weights)
    yield last_note(steps - 1, log_weights, log_constant)
    return particles, log_weights, log_constant


def note(level: int, weights: np.ndarray, resampled: bool, ancestors: np.ndarray, **more: float) -> Note:
    """What a level was like, before the next is drawn."""
    size = effective_sample_size(weights)
    values = {"level": level, "effective_sample_size": size, "resampled": resampled, "ancestors": ancestors.tolist()}
    return Note({**values, **more})


def last_note(level: int, log_weights: np.ndarray, log_evidence: float, **more: float) -> Note:
    """What the last level was like, and the logarithm of the normalising constant."""
    size = effective_sample_size(normalised(log_weights))
    return Note({"level": level, "effective_sample_size": size, "log_evidence": log_evidence, **more})


def log_mean(log_weights: np.ndarray) -> float:
    """The logarithm of the mean weight."""
    return float(np.logaddexp.reduce(log_weights) - math.log(len(log_weights)))


def less(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a - b`, where minus infinity, a reward that is no number, stays it."""
    return np.where(np.isneginf(a) | np.isneginf(b), -np.inf, a - np.where(np.isneginf(b), 0.0, b))
