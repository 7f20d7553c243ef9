"""Resampling, SMC and FK steering against closed forms: a Gaussian flow and a quadratic reward, no model."""

import math
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow import interpolant, methods, sde
from rollflow.draw import Note
from rollflow.errors import RequestError
from rollflow.methods import resampling
from rollflow.methods.das import tempered
from rollflow.methods.smc import POTENTIALS, population

das = import_module("rollflow.methods.das")  # the module, not the function of the same name

MEAN, DEVIATION, GOAL, TEMPERATURE, STEPS = 0.5, 0.7, 1.2, 0.4, 6


@pytest.mark.parametrize("name", resampling.SCHEMES)
def test_resampling_is_unbiased(name):
    rng = np.random.default_rng(0)
    weights = np.array([0.0, 0.05, 0.4, 0.0, 0.3, 0.25])
    copies = [np.bincount(resampling.scheme(name)(weights, 7, rng), minlength=6) for _ in range(4000)]
    assert all(c.sum() == 7 and c[0] == c[3] == 0 for c in copies)
    error = np.std(copies, axis=0) / math.sqrt(4000)
    assert (np.abs(np.mean(copies, axis=0) - 7 * weights) <= 5 * error + 1e-12).all()
    if name != "multinomial":  # systematic: within 1 of the expectation; the others within a stratum more
        assert np.abs(np.array(copies) - 7 * weights).max() < {"systematic": 1, "stratified": 2, "residual": 3}[name]


def test_weights():
    assert np.array_equal(resampling.normalised(np.full(4, -np.inf)), np.full(4, 0.25))
    weights = resampling.normalised(np.array([-np.inf, 1000.0, 1000.0 + math.log(3)]))
    assert weights == pytest.approx([0, 0.25, 0.75])
    assert resampling.effective_sample_size(weights) == pytest.approx(1 / (0.25**2 + 0.75**2))


@dataclass(eq=False)
class Point:
    x: float
    step: int
    reward: float


class Flow:
    """One-dimensional particles of the VP-SDE on data N(MEAN, DEVIATION^2), judged by -(x0_hat - GOAL)^2 / 2."""

    def __init__(self, seed):
        self.rng, self.path, self.notes = np.random.default_rng(seed), interpolant.VP(), []
        self.grid = sde.time_grid(STEPS)[:-1]
        pairs = list(zip(self.grid, self.grid[1:], strict=False))
        self.moves = [sde.step_coefficients(self.path, t, after, sde.Power()) for t, after in pairs]
        self.means = [sde.posterior_coefficients(self.path, t) for t in self.grid]

    def velocity(self, level):
        """u = slope x + offset of the exact model at a grid point."""
        tau, scale = self.path.linear_time(self.grid[level]), self.path.scale(self.grid[level])
        gain = (1 - tau) * DEVIATION**2 / ((1 - tau) ** 2 * DEVIATION**2 + tau**2)
        # x0_hat = MEAN + gain (y - (1 - tau) MEAN) with y = x / scale, and u = (y - x0_hat) / tau
        return (1 - gain) / (tau * scale), -(1 - gain * (1 - tau)) * MEAN / tau

    def point(self, x, level):
        slope, offset = self.velocity(level)
        p, q = self.means[level]
        return Point(x, level, -((p * x + q * (slope * x + offset) - GOAL) ** 2) / 2)

    def child(self, parent):
        if parent is None:
            return self.point(self.rng.normal(), 0)
        a, b, k = self.moves[parent.step]
        slope, offset = self.velocity(parent.step)
        x = a * parent.x + b * (slope * parent.x + offset) + k * self.rng.normal()
        return self.point(x, parent.step + 1)

    def image(self, particle):
        slope, offset = self.velocity(particle.step)
        p, q = self.means[particle.step]
        return p * particle.x + q * (slope * particle.x + offset)

    def tilted(self):
        """Mean of p(x0) exp(r(x0) / TEMPERATURE) and its normalising constant, for the sampler's own Gaussian p."""
        mean, variance = 0.0, 1.0
        for level, (a, b, k) in enumerate(self.moves):
            slope, offset = self.velocity(level)
            mean, variance = (a + b * slope) * mean + b * offset, (a + b * slope) ** 2 * variance + k**2
        slope, offset = self.velocity(STEPS - 1)
        p, q = self.means[-1]
        mean, variance = (p + q * slope) * mean + q * offset, (p + q * slope) ** 2 * variance
        constant = math.exp(-((mean - GOAL) ** 2) / (2 * (variance + TEMPERATURE)))
        constant *= math.sqrt(TEMPERATURE / (variance + TEMPERATURE))
        return (mean * TEMPERATURE + GOAL * variance) / (variance + TEMPERATURE), constant

    def run(self, search):
        reply = None
        try:
            while True:
                draws = search.send(reply)
                if isinstance(draws, Note):
                    self.notes.append(draws.values)
                    reply = None
                else:
                    reply = [[self.child(draw.parent) for _ in range(draw.count)] for draw in draws]
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize(
    ("potential", "threshold"), [("difference", 0.0), ("difference", 0.5), ("max", 0.5), ("max", 1.0), ("sum", 0.5)]
)
def test_particles_follow_the_tilted_distribution(potential, threshold):
    """The weighted mean converges like 1 / sqrt(N), and the normalising constant is unbiased at every N."""
    errors = {}
    for count, repetitions in ((8, 200), (128, 40)):
        means, constants = [], []
        for seed in range(repetitions):
            flow = Flow(seed)
            search = population(count * STEPS + 3, STEPS, potential, TEMPERATURE, "systematic", threshold, seed)
            particles, log_weights, log_constant = flow.run(search)
            assert flow.notes[-1]["log_evidence"] == log_constant
            means.append(np.dot(resampling.normalised(log_weights), [flow.image(p) for p in particles]))
            constants.append(math.exp(log_constant))
        mean, constant = flow.tilted()
        errors[count] = math.sqrt(np.mean(np.square(np.array(means) - mean)))
        assert abs(np.mean(constants) / constant - 1) < 4.5 * np.std(constants) / constant / math.sqrt(repetitions)
    assert errors[128] < 0.06 and 2 < errors[8] / errors[128] < 8  # 4 is the square root of 128 / 8


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_tempered_particles_follow_the_tilted_distribution(threshold):
    """Tempering adapts to the particles, so that the constant is only nearly unbiased: both errors fall with N."""
    errors = {}
    for count, repetitions in ((8, 200), (128, 40)):
        means, constants = [], []
        for seed in range(repetitions):
            flow = Flow(seed)
            search = tempered(count * STEPS + 3, STEPS, TEMPERATURE, "systematic", threshold, seed)
            particles, log_weights, log_constant = flow.run(search)
            assert flow.notes[-1]["log_evidence"] == log_constant
            means.append(np.dot(resampling.normalised(log_weights), [flow.image(p) for p in particles]))
            constants.append(math.exp(log_constant))
        mean, constant = flow.tilted()
        errors[count] = math.sqrt(np.mean(np.square(np.array(means) - mean)))
        standard_error = np.std(constants) / math.sqrt(repetitions)
        assert abs(np.mean(constants) - constant) < 4.5 * standard_error + 0.2 * constant / math.sqrt(count)
    assert errors[128] < 0.06 and 2 < errors[8] / errors[128] < 8  # 4 is the square root of 128 / 8


@pytest.mark.parametrize("name", ["smc", "fk", "das"])
@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_every_level_is_noted(name, threshold):
    """What is noted gives the weights back: of SMC without resampling they are those of the last rewards alone."""
    flow = Flow(3)
    flow.run(methods.make(name, 20 * STEPS + 3, STEPS, seed=5, temperature=TEMPERATURE, threshold=threshold))
    assert [note["level"] for note in flow.notes] == list(range(STEPS))
    *levels, last = flow.notes
    assert levels[0]["resampled"] and len(levels[0]["ancestors"]) == 20  # the first level has three particles more
    for note in levels:
        before = 23 if note["level"] == 0 else 20
        assert 1 <= note["effective_sample_size"] <= before + 1e-9
        assert note["ancestors"] == sorted(note["ancestors"]) and max(note["ancestors"]) < before
        if note["level"]:
            low = note["effective_sample_size"] < threshold * 20 * (1 + 1e-6)
            assert note["resampled"] is low
            assert note["resampled"] or note["ancestors"] == list(range(20))
    assert set(last) - {"share"} == {"level", "effective_sample_size", "log_evidence"}
    assert ("share" in last) is (name == "das") and last.get("share", 1.0) == 1.0


def test_the_evidence_without_resampling_is_the_mean_weight():
    flow = Flow(1)
    search = population(16 * STEPS, STEPS, "difference", TEMPERATURE, "systematic", 0.0, 0)
    particles, _, log_constant = flow.run(search)
    weights = np.exp([particle.reward / TEMPERATURE for particle in particles])
    assert log_constant == pytest.approx(math.log(weights.mean()))
    assert not any(note["resampled"] for note in flow.notes[:-1])
    size = weights.sum() ** 2 / np.square(weights).sum()
    assert flow.notes[-1] == {
        "level": STEPS - 1, "effective_sample_size": pytest.approx(size), "log_evidence": log_constant
    }  # fmt: skip


def test_tempering_keeps_the_effective_sample_size():
    rng = np.random.default_rng(0)
    reward = rng.normal(size=50) * 20
    base = np.zeros(50)
    share = das.share_of(base, reward, 0.0, 0.5)
    size = resampling.effective_sample_size(resampling.normalised(base + share * reward))
    assert 0 < share < 1 and size == pytest.approx(25, rel=0.01)
    assert das.share_of(base, reward / 1e6, 0.0, 0.5) == 1.0  # rewards that hardly differ
    assert das.share_of(base, reward, 0.9, 0.5) == 0.9  # never back


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 12), st.integers(1, 300), st.sampled_from(POTENTIALS), st.sampled_from(list(resampling.SCHEMES)))
def test_rewards_that_are_no_numbers_are_never_chosen(steps, nfe, potential, scheme):
    if nfe < steps:
        return
    rng = np.random.default_rng(nfe)

    def child(parent):
        return Point(0.0, 0 if parent is None else parent.step + 1, rng.choice([math.nan, math.inf, -2.0, -1.0, 0.0]))

    search = methods.make("fk", nfe, steps, seed=3, potential=potential, resampling=scheme)
    reply, last = None, []
    try:
        while True:
            draws = search.send(reply)
            reply = None
            if not isinstance(draws, Note):
                reply = last = [[child(draw.parent) for _ in range(draw.count)] for draw in draws]
    except StopIteration as stop:
        finite = [p.reward for children in last for p in children if math.isfinite(p.reward)]
        assert not finite or stop.value.reward == max(finite)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "a temperature is above 0"),
        ({"threshold": 1.5}, r"a threshold in \[0, 1\]"),
        ({"resampling": "even"}, "unknown resampling 'even': choose one of multinomial, systematic"),
        ({"potential": "min"}, "has no option 'potential'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(RequestError, match=message):
        methods.make("smc", 20, 2, **options)
