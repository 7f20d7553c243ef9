"""The engine on a model whose flow is known in closed form: Gaussian data, exact velocity, identity decoder."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import rollflow
from rollflow import interpolant, methods, sde
from rollflow.engine import Engine
from rollflow.errors import FunctionError, RequestError
from rollflow.methods import budget
from rollflow.models import FlowModel, Geometry
from rollflow.models.layout import Layout
from rollflow.plan import finish_times, plan
from rollflow.request import Request

MEAN, DEVIATION = 0.5, 0.2


class Gaussian(FlowModel):
    """Data N(MEAN, DEVIATION^2) in every latent element; records the times and the sizes of its forwards."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,) * 3, (0.0,) * 3)

    def __init__(self):
        self.forwards = []

    def geometry(self, height=None, width=None):
        height, width = height or 8, width or 8
        return Geometry(height, width, height, width, height * width // 4, 12)

    def check_prompt(self, prompt):
        if "unknown" in prompt:
            raise RequestError("the model does not know ['unknown']")

    def encode(self, prompts):
        return [torch.zeros(1) for _ in prompts]

    def velocity(self, x, tau, conditioning, guidance, geometry):
        self.forwards.append(tau.tolist())
        tau = tau.double()[:, None, None]
        variance = (1 - tau) ** 2 * DEVIATION**2 + tau**2
        centred = (x.double() - (1 - tau) * MEAN) / variance
        x0 = MEAN + (1 - tau) * DEVIATION**2 * centred
        return (tau * centred - x0).float()  # E[eps | x] - E[x0 | x]

    def decode(self, latents):
        return latents


VP_SDE = {"interpolant": "vp", "grid": "paper", "diffusion": 3.0}


def brightness(images, prompts):
    return images.mean((1, 2, 3))


brightness.differentiable = True


def engine(**options):
    return Engine(Gaussian(), **{"lanes": 1, **options})  # so small a model gains nothing from a second one


def ask(prompt="a", **options):
    return Request(prompt, **{"reward": brightness, "nfe": 30, "steps": 5, "method": "rbf", **options})


@pytest.mark.parametrize("method", methods.names())
@pytest.mark.parametrize("finish", [0, 3])
def test_accounting(method, finish):
    e = engine()
    result = e.generate(ask(method=method, nfe=33, finish=finish))
    history, rows = result.history, sum(len(times) for times in e.model.forwards)
    assert result.committed_nfe == 33 == sum(record.nfe for record in history)
    assert sum(e.ledger.executed.values()) == rows >= len(history)
    assert result.executed_nfe >= 33 and (result.executed_nfe == rows or e.ledger.executed["guided"])
    assert e.ledger.executed["finish"] == finish == sum(r.kind == "finish" for r in history)
    assert e.ledger.executed["guided"] == sum(r.kind == "guided" for r in history)
    assert [r.index for r in history] == list(range(len(history)))
    for record in history:
        assert record.level == 0 if record.parent is None else record.parent < record.index
        assert record.nfe == (2 if record.kind == "guided" else 1)
    assert e.stats().live == e.stats().promised == 0
    judged = history[-1:] if finish else [r for r in history if r.reward is not None]
    assert result.reward == pytest.approx(max(r.reward for r in judged), abs=1 / 255)  # judged again in 8 bits


@pytest.mark.parametrize("path", ["linear", "vp", "cosine", "polynomial"])
@pytest.mark.parametrize(("solver", "diffusion"), [("euler", 0.0), ("cps", 0.0), ("euler", 1.0), ("cps", 1.0)])
def test_marginals_through_the_whole_engine(path, solver, diffusion):
    """Samples have the mean and deviation of the data, on every path, by every solver, each row at its time."""
    e = engine()
    requests = [
        ask(
            interpolant=path,
            solver=solver,
            diffusion=diffusion,
            grid="uniform",
            method="bon",
            steps=60,
            finish=12,  # near t = 0 VP's noise falls steeply, and a posterior mean lacks what is left of it
            nfe=72,
            seed=i,
        )
        for i in range(32)
    ]
    pixels = torch.stack([r.pixels for r in e.generate(requests)]).double()
    n = pixels.numel()  # 32 * 192 independent elements
    # Five standard errors, plus the discretisation error of 72 steps.
    assert abs(pixels.mean() - MEAN) < 5 * DEVIATION / math.sqrt(n) + 0.01
    assert abs(pixels.std() / DEVIATION - 1) < 5 / math.sqrt(2 * n) + 0.06


class Exploding(interpolant.Interpolant):
    """alpha = 1, sigma = 10 t: the noise is not of unit variance at t = 1."""

    def alpha(self, t):
        return 1.0

    def sigma(self, t):
        return 10 * t

    def alpha_dot(self, t):
        return 0.0

    def sigma_dot(self, t):
        return 10.0


def test_the_prior_has_the_noise_of_the_path():
    options = {"interpolant": Exploding(), "diffusion": 0, "solver": "cps", "grid": "shifted", "shift": 0.1}
    given = torch.randn(64, 16, 12, generator=torch.Generator().manual_seed(0))
    requests = [
        ask(**options, method="bon", steps=60, nfe=60, seed=i, latents=given[i] if i % 2 else None) for i in range(64)
    ]
    pixels = torch.stack([r.pixels for r in engine().generate(requests)]).double()
    for drawn_or_given in (pixels[::2], pixels[1::2]):
        assert abs(drawn_or_given.mean() - MEAN) < 0.05  # of it, 0.02 is what is left of the data at t = 1
        assert abs(drawn_or_given.std() / DEVIATION - 1) < 0.1


def test_history_has_the_times_of_the_grid_and_the_model_sees_linear_times():
    e = engine()
    path = interpolant.VP()
    result = e.generate(ask(interpolant=path, nfe=20))
    grid = sde.time_grid(5, "paper")
    assert all(r.time == grid[r.level] for r in result.history)
    seen = {round(t, 6) for times in e.model.forwards for t in times if t != 1.0}
    assert seen == {round(np.float32(path.linear_time(t)).item(), 6) for t in grid[:-1]}


def test_requests_share_forwards_at_different_times():
    e = engine()
    e.generate([ask(f"{i}", seed=i, steps=3 + i, nfe=40) for i in range(8)])
    assert max(len(set(times)) for times in e.model.forwards) > 4


@pytest.mark.parametrize("reward", ["function", "name"])
def test_a_reward_judges_all_requests_of_a_batch_in_one_call(reward, monkeypatch):
    judged = []

    def judge(images, prompts):
        judged.append(len(prompts))
        return brightness(images, prompts)

    if reward == "name":
        monkeypatch.setattr("rollflow.rewards.count.CountReward.__call__", lambda self, i, p: judge(i, p))
    reward = judge if reward == "function" else "count"
    engine(slots=64, lanes=1).generate(
        [
            ask("two red circles", seed=i, method="bon", nfe=2, steps=2, reward=reward, height=64, width=64)
            for i in (1, 2, 3)
        ]
    )
    assert judged == [3, 3]  # the last level of all three, then the returned images


def test_a_result_does_not_depend_on_company():
    """One bucket: the same bits alone, among 32 others of every method and path, and in any order."""
    mine = ask("mine", seed=7, nfe=37, finish=2)
    names, paths = methods.names(), ("linear", "vp", "cosine")
    others = [
        ask(f"other {i}", seed=i, nfe=20 + i, method=names[i % len(names)], interpolant=paths[i % 3], steps=2 + i % 7)
        for i in range(32)
    ]
    alone = engine(buckets=(16,)).generate(mine)
    crowd = engine(buckets=(16,)).generate([*others[:20], mine, *others[20:]])[20]
    assert torch.equal(alone.pixels, crowd.pixels)
    assert alone.history == crowd.history and alone.reward == crowd.reward


def test_seeds_and_latents():
    e = engine()
    first, again, other = e.generate([ask(seed=3), ask(seed=3), ask(seed=4)])
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, other.pixels)
    latents = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    options = {"method": "bon", "nfe": 1, "steps": 1, "interpolant": "linear", "diffusion": 0}
    given = e.generate(ask(latents=latents, **options))
    tau = torch.ones(1)
    u = e.model.velocity(latents[None], tau, None, None, None)
    expected = (latents - u[0]).reshape(4, 4, 3, 2, 2).permute(2, 0, 3, 1, 4).reshape(3, 8, 8)
    torch.testing.assert_close(given.pixels, expected)
    many = e.generate(ask(latents=torch.stack([latents] * 2), method="bon", **VP_SDE, nfe=4, steps=1))
    rewards = [r.reward for r in many.history]
    assert rewards[0] == rewards[1] and len({*rewards}) == 3  # two given, two drawn


def test_resampling_follows_the_seed_of_the_request():
    alike, other = engine().generate([ask(method="smc", seed=s, nfe=60, options={"temperature": 0.01}) for s in (4, 5)])
    again = engine().generate(ask(method="smc", seed=4, nfe=60, options={"temperature": 0.01}))
    assert alike.history == again.history != other.history


def test_explicit_times():
    e = engine()
    result = e.generate(ask(times=[1.0, 0.6, 0.2], interpolant="linear", nfe=12))
    same = e.generate(ask(times=[1.0, 0.6, 0.2, 0.0], interpolant="linear", nfe=12))
    assert {(r.level, r.time) for r in result.history} == {(0, 1.0), (1, 0.6), (2, 0.2)}
    assert torch.equal(result.pixels, same.pixels)


def test_a_finish_sharpens_what_a_noisy_grid_leaves():
    """On the paper's VP grid the posterior mean lacks variance; a finish restores it."""
    e = engine()
    spread = {}
    for finish in (0, 24):
        options = {"method": "bon", **VP_SDE, "steps": 10, "nfe": 10 + finish, "finish": finish, "solver": "cps"}
        results = e.generate([ask(seed=i, **options) for i in range(48)])
        spread[finish] = torch.stack([r.pixels for r in results]).std().item() / DEVIATION
    tau = interpolant.VP().linear_time(sde.time_grid(10, "paper")[-2])
    signal = (1 - tau) * DEVIATION
    assert spread[0] == pytest.approx(signal / math.hypot(signal, tau), abs=0.005)  # closed form: 0.08
    assert 0.9 < spread[24] < 1.02


def test_finish_times_are_equidistant_in_linear_time():
    path = interpolant.VP()
    times = finish_times(path, 0.436, 3)
    linear = [path.linear_time(t) for t in times]
    assert np.diff(linear) == pytest.approx([-linear[0] / 4] * 3, abs=1e-9)


def test_the_pool_bounds_memory_and_admission_waits():
    e = engine(slots=40)
    results = e.generate([ask(seed=i, nfe=30) for i in range(5)])
    free = engine().generate([ask(seed=i, nfe=30) for i in range(5)])
    assert [r.committed_nfe for r in results] == [30] * 5
    assert all(torch.allclose(a.pixels, b.pixels, atol=1e-5) for a, b in zip(results, free, strict=True))
    assert e.stats().free == 40
    with pytest.raises(RequestError, match=r"nfe=60: the method dts may hold 60 particles at once .* holds 40 "):
        e.generate(ask(nfe=60, method="dts"))


def test_progress_is_told_per_request():
    seen = []
    engine().generate([ask(nfe=20), ask(nfe=30)], on_progress=seen.append)
    assert seen[-1].committed_nfe == (20, 30) and all(map(math.isfinite, seen[-1].best_reward))
    assert all(a.committed_nfe <= b.committed_nfe for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("method", ["rbf", "fk"])
def test_infinite_rewards_are_worth_as_little_as_those_that_are_no_numbers(method):
    def without(value):
        def judge(images, prompts):
            scores = brightness(images, prompts)
            return torch.where((scores * 1e4).long() % 3 == 0, value, scores)

        return engine().generate(ask(method=method, reward=judge, nfe=60)).history

    infinite, nan = without(math.inf), without(math.nan)
    assert any(r.reward == math.inf for r in infinite)
    assert [(r.level, r.parent) for r in infinite] == [(r.level, r.parent) for r in nan]


def test_an_error_leaves_the_engine_usable():
    e = engine()

    def broken(images, prompts):
        raise ZeroDivisionError("the reward broke")

    with pytest.raises(FunctionError, match="request 1: the reward broken raised ZeroDivisionError") as kept:
        e.generate([ask(), ask(reward=broken)])
    assert isinstance(kept.value.__cause__, ZeroDivisionError)  # and its traceback must not hold particles
    assert e.stats().live == e.stats().promised == 0
    assert e.generate(ask()).committed_nfe == 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nfe": 0}, "nfe=0: it must be a whole number of at least 1"),
        ({"nfe": 4}, "smallest budget is 5"),
        ({"method": "rfb"}, "unknown method 'rfb': choose one of beam, bon, code, das, dps"),
        ({"interpolant": "vpp"}, "linear, vp"),
        ({"grid": "even"}, "paper, uniform, shifted"),
        ({"solver": "heun"}, "euler, cps"),
        ({"reward": "nice"}, "count"),
        ({"seed": 2**63}, "seed=9223372036854775808: it must be a whole number of 64 bits"),
        ({"times": [0.5, 0.7]}, "decrease"),
        ({"times": []}, "decrease"),
        ({"diffusion": -1.0}, "-1"),
        ({"diffusion": 0}, "branches"),
        ({"latents": torch.zeros(3, 3)}, r"\[16, 12\]"),
        ({"latents": torch.full((16, 12), math.nan)}, "finite"),
        ({"options": {"width": 3}}, "no option 'width'"),
        ({"prompt": "unknown"}, "does not know"),
        ({"prompt": " "}, "prompt"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(options, message):
    e = engine()
    with pytest.raises(RequestError, match=message):
        e.generate([replace(ask(), **options)])
    with pytest.raises(RequestError, match=rf"request 1: .*{message}"):
        e.generate([ask(), replace(ask(), **options)])
    assert not e.model.forwards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intepolant": "vp"}, "no option 'intepolant': did you mean 'interpolant'"),
        ({"wings": 2}, "the method sprout has no option 'wings': its options are explore"),
        ({"prompt": "b"}, "give one"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(RequestError, match=message):
        engine().generate("a", reward=brightness, **options)


@pytest.mark.parametrize("slots", [0, -5, 29])
def test_too_few_slots(slots):
    with pytest.raises(RequestError, match=r"slots=-?\d: it must be" if slots < 1 else "engine holds 29 of this size"):
        engine(slots=slots).generate(ask(method="dts"))


def test_numbers_are_checked():
    assert budget.whole("seed", np.int64(3), 0) == 3 and budget.number("shift", torch.tensor(2.0)) == 2.0
    for value in (True, 2.5, "3", None, -1):
        with pytest.raises(RequestError, match=r"n=.*: it must be a whole number of at least 0"):
            budget.whole("n", value, 0)
    for value in (math.nan, math.inf, "3", None, [1.0]):
        with pytest.raises(RequestError, match=r"x=.*: it must be a finite number"):
            budget.number("x", value)


def test_strings_take_options_and_requests_do_not():
    e = engine()
    result = e.generate("a", reward=brightness, method="rbf", nfe=20, steps=3, initial=7)
    assert sum(r.level == 0 for r in result.history) == 7
    with pytest.raises(RequestError, match="they go with prompts"):
        e.generate(ask(), nfe=3)
    assert rollflow.Request is Request and rollflow.Engine is Engine


def test_a_plan_holds_every_coefficient():
    made = plan(ask(interpolant="linear", diffusion=0, method="bon", grid="uniform", steps=4, nfe=4))
    assert [(s.a, s.b, s.k) for s in made.steps[1:]] == [(1.0, pytest.approx(-0.25), 0.0)] * 3
    assert [(s.p, s.q) for s in made.steps] == [(1.0, pytest.approx(-t)) for t in (1.0, 0.75, 0.5, 0.25)]
