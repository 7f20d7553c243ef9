"""DAS: tempered SMC, whose temperature falls as fast as the particles can follow."""

from __future__ import annotations

import numpy as np

from rollflow.draw import Draw
from rollflow.errors import RequestError
from rollflow.methods.budget import Search, number, require, whole, worth
from rollflow.methods.catalog import method
from rollflow.methods.paths import flat
from rollflow.methods.resampling import effective_sample_size, normalised, scheme
from rollflow.methods.smc import Population, Steps, best_of, held, last_note, less, log_mean, note


@method(branches=True, holds=lambda nfe, steps, options: held(nfe, steps))
def das(
    nfe: int,
    steps: int,
    temperature: float = 1.0,
    resampling: str = "systematic",
    threshold: float = 0.5,
    seed: int = 0,
) -> Search:
    """Tempered sequential Monte Carlo (DAS, Kim et al. 2025, arXiv 2501.05803): the target of a level is
    `p(x) exp(s r / temperature)`, where s grows to 1 at the last level; elsewhere it is the largest for which the
    effective sample size stays at `threshold` of the particles (bisection). The best particle is chosen.

    Args:
        nfe: budget of function evaluations; what division leaves over are further samples of the prior.
        steps: evaluations a path.
        temperature: of the rewards; lower is greedier.
        resampling: "multinomial", "systematic", "stratified" or "residual".
        threshold: of the effective sample size, a share of the particles in (0, 1).
        seed: of the resampling; a request's own.

    Raises:
        RequestError: an option out of range, or a budget that does not pay for one particle.
    """
    whole("nfe", nfe, 1), whole("steps", steps, 1)
    if number("temperature", temperature) <= 0 or not 0 < number("threshold", threshold) < 1:
        raise RequestError(
            f"temperature={temperature!r}, threshold={threshold!r}: a temperature is above 0, a threshold within (0, 1)"
        )
    scheme(resampling)
    require("das", nfe, steps, f"one particle of {steps} steps")
    return best_of(tempered(nfe, steps, temperature, resampling, threshold, seed))


def tempered(
    budget: int, steps: int, temperature: float, resampling: str, threshold: float, seed: int
) -> Steps[Population]:
    """The search itself; returns the last particles, the logarithms of their weights, and an estimate of that of
    `E exp(r(x0) / temperature)`. It notes what `rollflow.methods.smc.population` does, and `share`, the level's s.
    """
    rng, count = np.random.default_rng(seed % 2**64), budget // steps
    particles = flat((yield [Draw(None, budget - count * (steps - 1), keep=1 if steps == 1 else None)]))
    base = np.zeros(len(particles))  # log weights, but for this level's s r / temperature
    share, log_constant = 0.0, 0.0  # s
    for level in range(steps):
        reward = np.array([worth(p) for p in particles]) / temperature
        share = 1.0 if level == steps - 1 else share_of(base, reward, share, threshold)
        log_weights = base + _scaled(reward, share)
        if level == steps - 1:
            break
        if log_weights.max() == -np.inf:  # no reward was a number: begin again from here, all alike
            reward, log_weights = np.zeros(len(particles)), np.zeros(len(particles))
        weights = normalised(log_weights)
        resampled = len(particles) != count or effective_sample_size(weights) < threshold * count * (1 + 1e-6)
        chosen = scheme(resampling)(weights, count, rng) if resampled else np.arange(count)
        yield note(level, weights, resampled, chosen, share=share)
        if resampled:
            log_constant += log_mean(log_weights)
            particles, reward, log_weights = [particles[i] for i in chosen], reward[chosen], np.zeros(count)
        base = less(log_weights, _scaled(reward, share))
        particles = flat((yield [Draw(particle) for particle in particles]))
    log_constant += log_mean(log_weights)
    yield last_note(steps - 1, log_weights, log_constant, share=share)
    return particles, log_weights, log_constant


def _scaled(reward: np.ndarray, share: float) -> np.ndarray:
    return share * reward if share else np.where(np.isneginf(reward), -np.inf, 0.0)


def share_of(base: np.ndarray, reward: np.ndarray, least: float, threshold: float) -> float:
    """The largest s in [least, 1] whose weights have an effective sample size of `threshold`; `least` if none has."""

    def enough(share: float) -> bool:
        weights = normalised(base + _scaled(reward, share))
        return effective_sample_size(weights) >= threshold * len(base)

    if enough(1.0):
        return 1.0
    low, high = least, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low
