"""The moves of a draw, through the whole engine, on a model whose flow is known in closed form."""

import itertools
import math

import pytest
import torch

from rollflow import interpolant, methods, sde
from rollflow.draw import Draw, Guide
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models import FlowModel, Geometry, Traits
from rollflow.models.layout import Layout
from rollflow.plan import plan
from rollflow.request import Request

MEAN, DEVIATION, TOKENS, CHANNELS = 0.5, 0.2, 16, 12


class Gaussian(FlowModel):
    """Data N(MEAN, DEVIATION^2) in every latent element, the exact velocity, an identity decoder."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)

    def geometry(self, height=None, width=None):
        return Geometry(8, 8, 8, 8, TOKENS, CHANNELS)

    def check_prompt(self, prompt):
        pass

    def encode(self, prompts):
        return [torch.zeros(1) for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        tau = tau.double()[:, None, None]
        variance = (1 - tau) ** 2 * DEVIATION**2 + tau**2
        centred = (x.double() - (1 - tau) * MEAN) / variance
        return (tau * centred - MEAN - (1 - tau) * DEVIATION**2 * centred).float()

    def decode(self, latents):
        return latents


class Emptied(interpolant.Linear):
    """No data left from the middle on."""

    def alpha(self, t):
        return max(0.0, 1 - 2 * t)


class Particle:
    """All that a `Draw` looks at."""

    def __init__(self, step):
        self.step, self.reward = step, 0.0


def state(engine, particle):
    return engine._host.runner.storage(engine.model.geometry()).x[particle.slot.index].clone()


def run(draws_of, seeds=range(1), reward=lambda images, prompts: images.mean((1, 2, 3)), **options):
    """Runs a method that yields the draws that `draws_of(particles so far)` gives; returns each request's states."""
    found = []

    def method(nfe, steps):
        particles, states = [], []
        while draws := draws_of(particles):
            drawn = yield draws
            new = [child for children in drawn for child in children]
            particles += new
            states += [state(engine, particle) for particle in new]
        found.append(torch.stack(states))
        return particles[-1]

    engine = Engine(Gaussian())
    fields = {"nfe": 50, "steps": 5, "interpolant": "linear", "reward": reward, **options}
    engine.generate([Request("a", method=method, seed=s, **fields) for s in seeds])
    return torch.stack(found).double()


def then(*draws):
    """Draws one after another, each from the last particle."""

    def draws_of(particles):
        if len(particles) == len(draws) + 1:
            return []
        return [draws[len(particles) - 1](particles[-1]) if particles else Draw(None)]

    return draws_of


def test_a_rotation_is_noise_again_and_as_far_as_asked():
    angle = 0.7
    before, after = run(then(lambda p: Draw(p, move="rotate", angle=angle)), range(40)).transpose(0, 1)
    n = before.numel()
    assert abs(after.std() - 1) < 5 / math.sqrt(2 * n) and abs(after.mean()) < 5 / math.sqrt(n)
    assert abs((before * after).mean() - math.cos(angle)) < 5 * math.sqrt(2 / n)


def test_a_coarse_rotation_changes_patch_means_alone():
    before, after = run(then(lambda p: Draw(p, move="rotate", angle=1.0, coarse=True)), range(20)).transpose(0, 1)
    patches = (after - before).reshape(20, TOKENS, CHANNELS // 4, 4)
    assert (patches - patches.mean(-1, keepdim=True)).abs().max() < 1e-5 and patches.abs().min() > 0
    assert abs(after.std() - 1) < 5 / math.sqrt(2 * after.numel())


def test_a_coarse_mixture_keeps_the_variance_of_its_band():
    """The fine band is shared, and adds up coherently: the norm is that of the coarse band alone."""

    def draws_of(particles):
        if not particles:
            return [Draw(None)]
        if len(particles) == 1:
            return [Draw(particles[0], 2, move="rotate", coarse=True, angle=math.pi / 2)]
        mix = tuple(particles[1:3])
        return [Draw(particles[0], move="rotate", coarse=True, mix=mix, angle=0.5)] if len(particles) == 3 else []

    states = run(draws_of, range(60))
    means = states.reshape(60, 4, TOKENS, CHANNELS // 4, 4).mean(-1) * 2  # of unit variance for noise
    for coarse in means.transpose(0, 1):
        assert abs(coarse.std() - 1) < 5 / math.sqrt(2 * coarse.numel())


def test_a_mixture_has_the_direction_of_the_sum_and_the_norm_of_the_parent():
    def draws_of(particles):
        if not particles:
            return [Draw(None, 3)]
        return [Draw(particles[0], move="rotate", mix=tuple(particles[1:3]))] if len(particles) == 3 else []

    (first, second, third, child) = run(draws_of)[0]
    total = first + second + third
    assert torch.allclose(child, total * (first.norm() / total.norm()), atol=1e-5)


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_jumps_apply_their_coefficients(path):
    made = interpolant.make(path)
    grid = sde.time_grid(5, "uniform")
    moves = [lambda p: Draw(p, move="ode", level=3), lambda p: Draw(p, move="sde", level=4)]
    start, there, _ = run(then(*moves), interpolant=path, grid="uniform")[0]
    c, tau = made.scale(grid[0]), torch.tensor([made.linear_time(grid[0])])
    u = Gaussian().velocity((start / c)[None].float(), tau, None, None, None)[0].double()
    a, b, _ = sde.step_coefficients(made, grid[0], grid[3], sde.Zero(), "cps")
    assert torch.allclose(there, a * start + b * u, atol=1e-4)


@pytest.mark.parametrize("path", ["linear", "vp", "cosine"])
def test_renoising_has_the_marginal_of_where_it_goes(path):
    made, t, back = interpolant.make(path), 0.3, 0.8
    a, b, k = sde.renoise_coefficients(made, t, back)
    variance = made.alpha(t) ** 2 * DEVIATION**2 + made.sigma(t) ** 2
    assert b == 0 and a * made.alpha(t) == pytest.approx(made.alpha(back))
    assert a**2 * variance + k**2 == pytest.approx(made.alpha(back) ** 2 * DEVIATION**2 + made.sigma(back) ** 2)
    moves = then(lambda p: Draw(p, move="ode", level=2), lambda p: Draw(p, move="renoise"))
    states = run(moves, range(30), interpolant=path, times=[1.0, back, t])
    assert abs(states[:, 2].std() / math.sqrt(made.alpha(back) ** 2 * DEVIATION**2 + made.sigma(back) ** 2) - 1) < 0.05
    with pytest.raises(RequestError, match="towards the noise"):
        sde.renoise_coefficients(made, 0.8, 0.3)
    with pytest.raises(RequestError, match="nothing but noise"):
        sde.renoise_coefficients(Emptied(), 0.5, 0.8)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        ({"parent": None, "count": 0}, "at least 1"),
        ({"parent": None, "scored": False, "until": 1.0}, "must be scored"),
        ({"parent": None, "scored": False, "guide": Guide()}, "must be scored"),
        ({"parent": Particle(2), "level": 1}, "from point 2 of the grid to 1"),
        ({"parent": Particle(0), "move": "renoise"}, "from point 0 of the grid to -1"),
        ({"parent": Particle(1), "move": "rotate"}, "rotate stays at 0"),
        ({"parent": None, "move": "ode"}, "from point -1 of the grid"),
        ({"parent": None, "level": 1}, "the prior .* is at 0"),
        ({"parent": Particle(1), "angle": 0.3}, "belong to the move 'rotate'"),
        ({"parent": Particle(1), "coarse": True}, "belong to the move 'rotate'"),
        ({"parent": Particle(0), "move": "rotate", "mix": (Particle(1),)}, "first point"),
    ],
)
def test_draws_that_make_no_sense(draw, message):
    with pytest.raises(RequestError, match=message):
        Draw(**draw)


def test_a_draw_beyond_the_grid():
    made = plan(Request("a", reward=lambda images, prompts: images.mean((1, 2, 3)), nfe=10, steps=3))
    with pytest.raises(RequestError, match="point 3 of a grid of 3"):
        made.arrival(Draw(Particle(2)))


# Guidance: data N(m, v); target p(x0) exp(scale r(x0)).


def linear_reward(images, prompts):
    return images.sum((1, 2, 3))


def quadratic(goal):
    def reward(images, prompts):
        return -(images - goal).square().sum((1, 2, 3)) / 2

    return reward


def guided_mean(reward, scale, path="linear", steps=80, **options):
    reward.differentiable = True
    requests = [
        Request(
            "a", reward=reward, method="dps", nfe=2 * steps - 1, steps=steps, seed=i, interpolant=path, diffusion=0.0,
            grid="uniform", options={"gradient": scale, **options},
        )
        for i in range(16)
    ]  # fmt: skip
    results = Engine(Gaussian()).generate(requests)
    assert all(r.committed_nfe == 2 * steps - 1 for r in results)
    return torch.stack([r.pixels for r in results]).double().mean().item()


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_guidance_reaches_the_tilted_mean_of_a_linear_reward(path):
    """exp(s x0) moves N(m, v) to N(m + s v, v), and for it guidance through the posterior mean is exact."""
    shift = guided_mean(linear_reward, 5.0, path, steps=160) - MEAN
    assert shift == pytest.approx(5.0 * DEVIATION**2, rel=0.04)  # 0.2; discretisation of 160 steps


def test_guidance_reaches_the_tilted_mean_of_a_quadratic_reward():
    """Target mean (m lambda + g v) / (lambda + v). DPS takes r(x0_hat) for the mean reward, so it overshoots by at most
    a factor of 1 + v / lambda, which vanishes for weak guidance."""
    goal, v = 1.5, DEVIATION**2
    for temperature in (1.0, 0.4):
        closed = (MEAN * temperature + goal * v) / (temperature + v) - MEAN
        shift = guided_mean(quadratic(goal), 1 / temperature) - MEAN
        assert 0.97 < shift / closed < 1.03 + v / temperature


def test_clipped_and_normalised_guidance():
    small = guided_mean(linear_reward, 5.0, steps=40, clip=1e-4) - MEAN
    assert 0 < small < 0.02
    one, two = (guided_mean(linear_reward, s, steps=40, normalise=True) - MEAN for s in (0.01, 0.02))
    assert two / one == pytest.approx(2, rel=0.1)


def test_guided_particles_are_charged_and_recorded():
    linear_reward.differentiable = True
    e = Engine(Gaussian())
    plain = Request("a", reward=linear_reward, nfe=21, steps=3)
    guided = Request("a", reward=linear_reward, nfe=21, steps=3, method="svdd", options={"gradient": 1.0})
    first, second = e.generate([plain, guided])
    assert (first.committed_nfe, second.committed_nfe) == (21, 21)
    kinds = [(r.kind, r.nfe, r.level) for r in second.history]
    assert kinds == [("guided", 2, 0)] * 4 + [("guided", 2, 1)] * 4 + [("committed", 1, 2)] * 5
    assert e.ledger.executed["guided"] == 8 and e.ledger.seconds["backward"] > 0
    assert e.stats().live == 0


def test_what_a_reward_loads_in_a_plain_search_can_be_used_in_a_guided_one():
    loaded = []

    def lazy(images, prompts):
        if not loaded:
            loaded.append(torch.full((1, 3, 1, 1), 0.5))
        return (images * loaded[0]).sum((1, 2, 3))

    lazy.differentiable = True
    e = Engine(Gaussian())
    for options in ({}, {"gradient": 1.0}):
        assert e.generate(Request("a", reward=lazy, method="rbf", nfe=30, steps=4, options=options)).committed_nfe == 30


@pytest.mark.parametrize(("method", "options"), [("svdd", {"interpolant": "linear"}), ("dps", {"interpolant": "vp"})])
def test_a_guided_particle_is_what_was_judged(method, options):
    """Its children move, it does not: however strong the guidance, the image has the reward of the record."""
    reward = quadratic(0.5)
    reward.differentiable = True
    fields = {"nfe": 31, "steps": 4, "diffusion": 3.0, "grid": "paper", "options": {"gradient": 100.0}, **options}
    result = Engine(Gaussian()).generate(Request("a", reward=reward, method=method, **fields))
    judged = [r for r in result.history if r.reward is not None]
    assert max(judged, key=lambda r: r.reward).kind == "guided"
    assert result.reward == pytest.approx(max(r.reward for r in judged), abs=0.1)  # 192 pixels in 8 bits


def test_gradients_that_are_no_numbers_guide_nothing_and_are_counted():
    def torn(images, prompts):
        return (images.sum((1, 2, 3)) * 0).sqrt()  # 0, whose slope is infinite times 0

    torn.differentiable = True
    with pytest.warns(RuntimeWarning, match="no finite number"):
        result = Engine(Gaussian()).generate(Request("a", reward=torn, method="dps", nfe=9, steps=5))
    assert result.invalid_rewards == 3 and result.reward == 0  # of four guided ones; pure noise moves nothing


def test_guided_methods_need_a_reward_with_a_gradient():
    def plain(images, prompts):
        return images.mean((1, 2, 3))

    for method, options in (("dps", {}), ("rbf", {"gradient": 1.0}), ("svdd", {"gradient": 0.5})):
        with pytest.raises(RequestError, match=f"{method} follows the gradient of the reward, and plain has none: use"):
            Engine(Gaussian()).generate(Request("a", reward=plain, method=method, options=options))

    def cut(images, prompts):
        return images.detach().mean((1, 2, 3))

    cut.differentiable = True
    with pytest.raises(RequestError, match="does not reach the latents"):
        Engine(Gaussian()).generate(Request("a", reward=cut, method="dps"))


# How a search ends.


def brightness(images, prompts):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("finish", [0, 3])
def test_finalists_compete_in_the_end(finish):
    results = {}
    for finalists in (1, 4):
        fields = {"method": "rbf", "nfe": 60, "steps": 5, "finish": finish, "finalists": finalists}
        request = Request("a", reward=brightness, **fields)
        results[finalists] = result = Engine(Gaussian()).generate(request)
        assert result.committed_nfe == 60 == len(result.history)
        assert sum(r.kind == "finish" for r in result.history) == finish * finalists
    judged = [r.reward for r in results[4].history if r.reward is not None and (not finish or r.kind == "finish")]
    assert results[4].reward == pytest.approx(max(judged), abs=1 / 255)
    by_default = Engine(Gaussian()).generate(
        Request("a", reward=brightness, method="rbf", nfe=60, steps=5, finish=finish)
    )
    kept = max(r.reward for r in by_default.history if r.reward is not None)
    assert finish or by_default.reward == pytest.approx(kept, abs=1 / 255)  # it never loses what it saw


def test_stop_at_ends_the_search_and_leaves_the_rest():
    whole = Engine(Gaussian()).generate(Request("a", reward=brightness, nfe=60, steps=5))
    bar = sorted(r.reward for r in whole.history)[-10]
    for finish in (0, 2):
        request = Request("a", reward=brightness, nfe=60, steps=5, stop_at=bar, finish=finish, finalists=2)
        result = Engine(Gaussian()).generate(request)
        searched = [r for r in result.history if r.kind != "finish"]
        assert searched[-1].reward >= bar and all(r.reward < bar for r in searched[:-1])
        assert result.committed_nfe == len(searched) + finish and result.unspent_nfe == 60 - result.committed_nfe > 0
        assert result.reward >= bar - 1 / 255  # the particle that was good enough outlives a finish that is worse
    never = Engine(Gaussian()).generate(Request("a", reward=brightness, nfe=60, steps=5, stop_at=9.0))
    assert never.unspent_nfe == 0
    with pytest.raises(RequestError, match="stop_at=nan"):
        Engine(Gaussian()).generate(Request("a", reward=brightness, stop_at=math.nan))


def test_rewards_that_are_no_numbers_are_counted_and_warned_of_once():
    calls = itertools.count()

    def odd(images, prompts):
        scores = images.mean((1, 2, 3))
        scores[0] = [math.nan, math.inf, -math.inf][next(calls) % 3]
        return scores

    e = Engine(Gaussian())
    with pytest.warns(RuntimeWarning, match="no finite number: these count as worst") as warned:
        first, second = e.generate([Request("a", reward=odd, nfe=40, steps=4, seed=s) for s in (0, 1)])
    assert len(warned) == 1
    for result in (first, second):
        bad = sum(not math.isfinite(r.reward) for r in result.history)
        assert result.invalid_rewards == bad > 0


def test_particles_compete_only_where_rewards_can_be_trusted():
    def smoothness(images, prompts):
        return -images.std((1, 2, 3))  # best where nothing is drawn yet

    fields = {"method": "rbf", "nfe": 60, "steps": 10, "interpolant": "linear", "grid": "uniform", "reward": smoothness}
    for trusted, level in ((1.0, 0), (0.4, 6)):
        e = Engine(Gaussian(), traits=Traits(10, trusted))
        result = e.generate(Request("a", **fields))
        rewards = [r.reward for r in result.history if r.level >= level]
        assert result.reward == pytest.approx(max(rewards), abs=1 / 255)


def test_a_choice_that_was_not_judged_stands():
    def mine(nfe, steps):
        (particles,) = yield [Draw(None, nfe - 1)]
        ((last,),) = yield [Draw(particles[0], scored=False)]
        return last

    one, two = (
        Engine(Gaussian()).generate(Request("a", reward=brightness, method=mine, nfe=9, steps=2, finalists=n))
        for n in (1, 2)
    )
    assert torch.equal(one.pixels, two.pixels) and one.history[-1].reward is None


def test_methods_that_break_give_their_memory_back():
    def empty(nfe, steps):
        yield [Draw(None, 3)]
        yield []

    def beyond(nfe, steps):
        (particles,) = yield [Draw(None, 3)]
        yield [Draw(particles[0], level=7)]

    def greedy(nfe, steps):
        return (yield [Draw(None, nfe + 1)])[0][0]

    def silent(nfe, steps):
        yield [Draw(None, nfe)]

    e = Engine(Gaussian())
    for method, message in (
        (greedy, "greedy drew more than its budget of 9"),
        (silent, "silent returned None"),
        (empty, r"the method empty yielded \[\]: it must yield lists"),
        (beyond, "point 7 of a grid of 3"),
    ):
        with pytest.raises(RequestError, match=message) as kept:  # noqa: F841, its traceback must not hold slots
            e.generate([Request("a", reward=brightness, method=m, nfe=9, steps=3) for m in ("rbf", method)])
        assert e.stats().live == e.stats().promised == 0


def test_built_in_methods_can_be_given_as_functions():
    with pytest.raises(RequestError, match="the method rbf branches"):
        plan(Request("a", reward=brightness, method=methods.rbf, diffusion=0))
    with pytest.raises(RequestError, match="dps follows the gradient"):
        plan(Request("a", reward="count", method=methods.dps))
    assert plan(Request("a", reward=brightness, method=methods.psp), Traits(5, 0.7)).request.options == {"first": 2}

    def own(nfe, steps, first=7):
        return (yield [Draw(None, nfe)])[0][0]

    made = plan(Request("a", reward=brightness, method=own, nfe=10))
    assert made.request.options == {} and made.steps[1].k > 0
