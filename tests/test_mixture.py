"""Both SDEs, both solvers and both ways between the paths, on a two-dimensional mixture in closed form (float64)."""

import itertools
import math

import numpy as np
import pytest

from rollflow import interpolant, sde
from rollflow.draw import Note
from rollflow.methods import resampling
from rollflow.methods.smc import population

MEANS = np.array([[-1.0, 0.0], [1.0, 0.6], [0.4, -1.2]])
SPREADS = np.array([0.3, 0.4, 0.35])
WEIGHTS = np.array([0.5, 0.3, 0.2])
N, STEPS = 20_000, 160


def posterior(y, tau):
    """`E[x0 | y]` and the responsibilities of the parts, for points y [n, 2] of the linear path at time tau."""
    variance = (1 - tau) ** 2 * SPREADS**2 + tau**2
    away = y[:, None] - (1 - tau) * MEANS
    log_weight = np.log(WEIGHTS) - np.square(away).sum(2) / (2 * variance) - np.log(variance)
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    x0 = MEANS + ((1 - tau) * SPREADS**2 / variance)[:, None] * away
    return (weight[..., None] * x0).sum(1), weight


def velocity(y, tau):
    return (y - posterior(y, tau)[0]) / tau


def moments(path, t):
    """Mean and covariance of the marginal at time t."""
    mean = WEIGHTS @ MEANS
    covariance = np.einsum("i,ij,ik->jk", WEIGHTS, MEANS, MEANS) - np.outer(mean, mean)
    covariance += np.eye(2) * (WEIGHTS @ SPREADS**2)
    return path.alpha(t) * mean, path.alpha(t) ** 2 * covariance + path.sigma(t) ** 2 * np.eye(2)


def step(x, path, start, end, diffusion, solver, rng=None):
    a, b, k = sde.step_coefficients(path, start, end, diffusion, solver)
    z = rng.standard_normal(x.shape) if k else 0.0
    return a * x + b * velocity(x / path.scale(start), path.linear_time(start)) + k * z


@pytest.mark.parametrize("name", ["linear", "vp"])
@pytest.mark.parametrize("solver", ["euler", "cps"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_marginals_at_every_grid_point(name, solver, scale):
    """Mean, covariance and share of the parts: five standard errors of 20,000 particles plus the error of 160 steps."""
    path, rng = interpolant.make(name), np.random.default_rng(0)
    grid = sde.time_grid(STEPS, "uniform")
    x = rng.standard_normal((N, 2)) * path.sigma(1.0) + path.alpha(1.0) * WEIGHTS @ MEANS
    for start, end in itertools.pairwise(grid[:-1]):
        x = step(x, path, start, end, sde.Power(scale), solver, rng)
        mean, covariance = moments(path, end)
        deviation = math.sqrt(np.trace(covariance) / 2)
        assert np.abs(x.mean(0) - mean).max() < (5 / math.sqrt(N) + 0.03) * deviation
        assert np.abs(np.cov(x.T) - covariance).max() < (10 / math.sqrt(N) + 0.05) * deviation**2
        share = posterior(x / path.scale(end), path.linear_time(end))[1].mean(0)
        assert np.abs(share - WEIGHTS).max() < 5 * 0.5 / math.sqrt(N) + 0.015


@pytest.mark.parametrize(("solver", "tolerance"), [("cps", 1e-10), ("euler", 0.02)])
def test_linear_to_vp_and_back_lands_on_the_same_sample(solver, tolerance):
    """The probability flow is the same on both paths: with cps to rounding, with Euler to its own error."""
    linear, vp = interpolant.make("linear"), interpolant.make("vp")
    x = np.random.default_rng(0).standard_normal((500, 2))
    times = np.linspace(0.99, 0.01, 800)

    def vp_time(tau):
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if vp.linear_time(middle) < tau else (low, middle)
        return high

    straight = x.copy()
    for start, end in itertools.pairwise(times):
        straight = step(straight, linear, start, end, sde.Zero(), solver)
    there = x.copy()
    for i, (start, end) in enumerate(itertools.pairwise(times)):
        if i % 400 < 200:  # linear, VP, linear, VP
            there = step(there, linear, start, end, sde.Zero(), solver)
        else:
            start, end = vp_time(start), vp_time(end)
            there = step(there * vp.scale(start), vp, start, end, sde.Zero(), solver) / vp.scale(end)
    assert np.abs(there - straight).max() < tolerance


class Point:
    def __init__(self, x, step, reward):
        self.x, self.step, self.reward = x, step, reward


GOAL, TEMPERATURE, LEVELS = np.array([0.3, 0.3]), 0.5, 8


class Flow:
    """Particles of the VP-SDE on the mixture, judged by -|x0_hat - GOAL|^2 / 2."""

    def __init__(self, seed):
        self.path, self.rng = interpolant.make("vp"), np.random.default_rng(seed)
        self.grid = sde.time_grid(LEVELS)[:-1]

    def points(self, x, level):
        t = self.grid[level]
        x0 = posterior(x / self.path.scale(t), self.path.linear_time(t))[0]
        return [Point(a, level, -((b - GOAL) ** 2).sum() / 2) for a, b in zip(x, x0, strict=True)]

    def reply(self, draws):
        level = draws[0].arrives
        if draws[0].parent is None:
            return [self.points(self.rng.standard_normal((draws[0].count, 2)) * self.path.sigma(1.0), 0)]
        x = np.stack([draw.parent.x for draw in draws])
        x = step(x, self.path, self.grid[level - 1], self.grid[level], sde.Power(), "euler", self.rng)
        return [[point] for point in self.points(x, level)]

    def run(self, search):
        reply = None
        try:
            while True:
                yielded = search.send(reply)
                reply = None if isinstance(yielded, Note) else self.reply(yielded)
        except StopIteration as stop:
            return stop.value


def image(flow, particles):
    t = flow.grid[-1]
    return posterior(np.stack([p.x for p in particles]) / flow.path.scale(t), flow.path.linear_time(t))[0]


def tilted_mean():
    """The sampler's own distribution, reweighted: plain importance sampling with 200,000 particles."""
    flow = Flow(99)
    x = flow.rng.standard_normal((200_000, 2)) * flow.path.sigma(1.0)
    for start, end in itertools.pairwise(flow.grid):
        x = step(x, flow.path, start, end, sde.Power(), "euler", flow.rng)
    t = flow.grid[-1]
    x0 = posterior(x / flow.path.scale(t), flow.path.linear_time(t))[0]
    weight = np.exp(-np.square(x0 - GOAL).sum(1) / (2 * TEMPERATURE))
    return weight @ x0 / weight.sum(), weight.mean()


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_smc_on_the_mixture(potential):
    """The weighted mean and the normalising constant; errors fall like 1 / sqrt(N)."""
    truth, constant = tilted_mean()
    errors = {}
    for count, repetitions in ((16, 60), (256, 16)):
        means, constants = [], []
        for seed in range(repetitions):
            flow = Flow(seed)
            search = population(count * LEVELS, LEVELS, potential, TEMPERATURE, "systematic", 0.5, seed)
            particles, log_weights, log_constant = flow.run(search)
            means.append(resampling.normalised(log_weights) @ image(flow, particles))
            constants.append(math.exp(log_constant))
        errors[count] = np.sqrt(np.square(np.array(means) - truth).mean())
        standard_error = np.std(constants) / math.sqrt(repetitions)
        assert abs(np.mean(constants) - constant) < 4 * standard_error + 0.005 * constant
    assert errors[256] < 0.06 and 2 < errors[16] / errors[256] < 8  # 4 is the square root of 256 / 16
