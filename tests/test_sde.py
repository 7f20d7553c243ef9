"""Time grids, diffusions and the coefficients of a step, against closed forms.

The data is Gaussian (or a mixture), so the exact model is known. For a Gaussian it is affine in the state: the mean and
the standard deviation of a sampler's output follow from `(a, b, k)` without drawing a sample.
"""

import inspect
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollflow import sde
from rollflow.errors import RequestError
from rollflow.interpolant import VP, Cosine, Interpolant, Linear, Polynomial

PATHS = [Linear(), VP(), Cosine(), Polynomial(2)]
DIFFUSIONS = [sde.Zero(), sde.Power(), sde.Constant(0.7), sde.SigmaProportional(1.5), sde.Function(lambda t: 2.0 * t)]
paths = pytest.mark.parametrize("path", PATHS, ids=repr)
diffusions = pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: type(d).__name__)
solvers = pytest.mark.parametrize("solver", sde.SOLVERS)
inner = st.floats(min_value=1e-3, max_value=1.0)


def marginal(path: Interpolant, t: float, m: float, s: float) -> tuple[float, float]:
    """Mean and standard deviation of x_t for x0 ~ N(m, s^2)."""
    return path.alpha(t) * m, math.hypot(path.alpha(t) * s, path.sigma(t))


def posterior(path: Interpolant, t: float, x: float, m: float, s: float) -> tuple[float, float]:
    """E[x0 | x_t = x] and E[eps | x_t = x] for x0 ~ N(m, s^2)."""
    mean, std = marginal(path, t, m, s)
    pull = (x - mean) / (std * std)
    return m + path.alpha(t) * s * s * pull, path.sigma(t) * pull


def model(x: float, tau: float, m: float, s: float) -> float:
    """The exact linear velocity u(x, tau) = E[eps - x0 | x] for x0 ~ N(m, s^2)."""
    x0_hat, eps_hat = posterior(Linear(), tau, x, m, s)
    return eps_hat - x0_hat


def sample(
    path: Interpolant, times: tuple[float, ...], diffusion: sde.Diffusion, solver: str, m: float, s: float
) -> tuple[float, float]:
    """Mean and standard deviation of a sampler's state at the last of `times`, from the exact marginal at the first."""
    mean, std = marginal(path, times[0], m, s)
    for t, t_next in pairwise(times):
        a, b, k = sde.step_coefficients(path, t, t_next, diffusion, solver)
        c, tau = path.scale(t), path.linear_time(t)
        offset = model(0.0, tau, m, s)
        factor = a + b * (model(1.0, tau, m, s) - offset) / c
        mean, std = factor * mean + b * offset, math.hypot(factor * std, k)
    return mean, std


def pair_of_times(draw: st.DrawFn) -> tuple[float, float]:
    t = draw(inner)
    return t, t * draw(st.floats(0.0, 0.999))


steps = st.composite(pair_of_times)()


# --- time grids


def test_paper_grid() -> None:
    assert sde.time_grid(10) == pytest.approx([math.sqrt(1 - (i / 10) ** 2) for i in range(11)], abs=1e-15)
    assert sde.time_grid(1) == (1.0, 0.0)


def test_uniform_grid() -> None:
    assert sde.time_grid(4, "uniform") == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert sde.time_grid(7, "shifted", shift=1.0) == sde.time_grid(7, "uniform")


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (4, 3.0), (28, 3.0), (10, 1.15), (9, 0.5)])
def test_shifted_grid_is_that_of_diffusers(steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())  # as FluxPipeline does
    assert sde.time_grid(steps, "shifted", shift) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)  # float32 there


@given(steps=st.integers(1, 400), kind=st.sampled_from(sde.GRIDS), shift=st.floats(0.1, 12))
def test_grids_fall_strictly_from_one_to_zero(steps: int, kind: str, shift: float) -> None:
    times = sde.time_grid(steps, kind, shift)
    assert len(times) == steps + 1 and times[0] == 1.0 and times[-1] == 0.0
    assert all(later < earlier for earlier, later in pairwise(times))


def test_grid_errors() -> None:
    for steps in (0, -3, True):
        with pytest.raises(RequestError, match=f"{steps} steps.*at least 1"):
            sde.time_grid(steps)
    with pytest.raises(RequestError, match=r"2\.5 steps"):
        inspect.unwrap(sde.time_grid)(2.5)
    with pytest.raises(RequestError, match="'karras': choose one of paper, uniform, shifted"):
        sde.time_grid(10, "karras")
    for shift in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(RequestError, match="positive and finite"):
            sde.time_grid(10, "shifted", shift)


# --- diffusions


def test_diffusion_coefficients() -> None:
    assert sde.Power().g(0.5) == 0.75 and sde.Power(2.0, 1.0).g(0.25) == 0.5 and sde.Power(2.0, 0.0).g(0.0) == 2.0
    assert sde.Constant(0.7).g(0.1) == 0.7 and sde.Zero().g(1.0) == 0.0
    assert sde.SigmaProportional(2.0).g(0.3, VP()) == 2.0 * VP().sigma(0.3)
    assert sde.Power().std(VP(), 0.5, 0.25) == 0.75 * 0.5


def test_memoryless_is_ddpm_on_vp_and_flow_grpo_on_the_linear_path() -> None:
    for t in (0.1, 0.5, 0.9):
        assert sde.Memoryless().g(t, VP()) ** 2 == pytest.approx(0.1 + 19.9 * t, rel=1e-12)
        assert sde.Memoryless(0.7 / math.sqrt(2)).g(t, Linear()) == pytest.approx(
            0.7 * math.sqrt(t / (1 - t)), rel=1e-12
        )
    assert sde.Memoryless().g(1.0, Linear()) == math.inf


def test_diffusion_from_a_number_a_function_or_an_object() -> None:
    assert sde.diffusion(3.0) == sde.Power(3.0, 2.0) and sde.diffusion(2) == sde.Power(2.0)
    assert sde.diffusion(0.0) == sde.Zero() == sde.diffusion(0)
    own = sde.Constant(1.0)
    assert sde.diffusion(own) is own
    assert sde.diffusion(lambda t: 0.5 + t).g(0.25) == 0.75


def test_diffusion_errors() -> None:
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(RequestError, match="finite number of at least 0"):
            sde.diffusion(scale)
        for kind in (sde.Constant, sde.SigmaProportional, sde.Memoryless):
            with pytest.raises(RequestError, match=f"{kind.__name__}.*finite number of at least 0"):
                kind(scale)
    convert = inspect.unwrap(sde.diffusion)
    with pytest.raises(RequestError, match=r"'big' is no diffusion: pass a scale"):
        convert("big")
    with pytest.raises(RequestError, match=r"did you mean Power\(\)\?"):
        convert(sde.Power)
    with pytest.raises(RequestError, match="True is no diffusion"):
        convert(True)
    with pytest.raises(RequestError, match=r"call g\(t, interpolant\)"):
        sde.SigmaProportional().g(0.5)
    with pytest.raises(RequestError, match=r"is -0\.5 at t = 0\.5"):
        sde.diffusion(lambda t: -t).g(0.5)
    with pytest.raises(RequestError, match="exponent"):
        sde.Power(3.0, -1.0)
    with pytest.raises(RequestError, match="between 0"):
        sde.CPS(1.5)
    with pytest.raises(RequestError, match="outside"):
        sde.Power().g(1.5)


# --- the posterior mean


@paths
@given(t=st.floats(0, 1), x=st.floats(-4, 4), m=st.floats(-2, 2), s=st.floats(0.05, 3))
def test_posterior_mean_of_a_gaussian(path: Interpolant, t: float, x: float, m: float, s: float) -> None:
    p, q = sde.posterior_coefficients(path, t)
    u = model(x / path.scale(t), path.linear_time(t), m, s)
    assert abs(p * x + q * u - posterior(path, t, x, m, s)[0]) <= 1e-12 * (1 + abs(p * x) + abs(q * u) + abs(m))


@paths
@given(t=st.floats(0.02, 1), x=st.floats(-2, 2))
def test_posterior_mean_of_a_mixture(path: Interpolant, t: float, x: float) -> None:
    components = [(0.3, -1.2, 0.4), (0.7, 0.9, 0.25)]  # weight, mean, standard deviation

    def responsible(on: Interpolant, time: float, at: float) -> list[float]:
        logs = []
        for weight, m, s in components:
            mean, std = marginal(on, time, m, s)
            logs.append(math.log(weight / std) - 0.5 * ((at - mean) / std) ** 2)
        shares = [math.exp(value - max(logs)) for value in logs]
        return [share / sum(shares) for share in shares]

    c, tau = path.scale(t), path.linear_time(t)
    # The model knows the linear path alone; the expected value is Bayes' rule on `path` itself.
    shares = responsible(Linear(), tau, x / c)
    u = sum(w * model(x / c, tau, m, s) for w, (_, m, s) in zip(shares, components, strict=True))
    shares = responsible(path, t, x)
    expected = sum(w * posterior(path, t, x, m, s)[0] for w, (_, m, s) in zip(shares, components, strict=True))
    p, q = sde.posterior_coefficients(path, t)
    assert p * x + q * u == pytest.approx(expected, abs=1e-10)


# --- one step


@paths
@diffusions
@given(step=steps, x=st.floats(-4, 4))
def test_euler_is_the_reverse_sde_with_the_exact_velocity_and_score(
    path: Interpolant, diffusion: sde.Diffusion, step: tuple[float, float], x: float
) -> None:
    (t, t_next), m, s = step, 0.4, 0.6
    d, g = t - t_next, diffusion.g(t, path)
    mean, std = marginal(path, t, m, s)
    # Velocity and score of the marginal of `path`, straight from its mean and standard deviation.
    growth = path.alpha_dot(t) * path.alpha(t) * s * s + path.sigma_dot(t) * path.sigma(t)  # std * d std / dt
    velocity = path.alpha_dot(t) * m + growth / (std * std) * (x - mean)
    score = -(x - mean) / (std * std)
    a, b, k = sde.step_coefficients(path, t, t_next, diffusion, "euler")
    u = model(x / path.scale(t), path.linear_time(t), m, s)
    size = (1 + abs(x)) * (1 + d * (abs(path.alpha_dot(t)) + abs(path.sigma_dot(t)) + g * g / path.sigma(t)))
    assert abs(a * x + b * u - (x - d * velocity + 0.5 * d * g * g * score)) <= 1e-12 * size
    assert k == pytest.approx(g * math.sqrt(d), rel=1e-15)


@paths
@diffusions
@given(step=steps, x=st.floats(-4, 4))
def test_cps_keeps_the_coefficients_of_data_and_noise(
    path: Interpolant, diffusion: sde.Diffusion, step: tuple[float, float], x: float
) -> None:
    (t, t_next), m, s = step, 0.4, 0.6
    x0_hat, eps_hat = posterior(path, t, x, m, s)
    a, b, k = sde.step_coefficients(path, t, t_next, diffusion, "cps")
    noise = path.sigma(t_next)
    assert k == min(diffusion.g(t, path) * math.sqrt(t - t_next), noise)
    u = model(x / path.scale(t), path.linear_time(t), m, s)
    expected = path.alpha(t_next) * x0_hat + math.sqrt((noise - k) * (noise + k)) * eps_hat
    assert abs(a * x + b * u - expected) <= 1e-12 * (1 + abs(x) + abs(u))


@given(step=steps)
def test_the_linear_ode_is_the_euler_step_of_diffusers(step: tuple[float, float]) -> None:
    t, t_next = step
    assert sde.step_coefficients(Linear(), t, t_next, sde.Zero()) == (1.0, -(t - t_next), 0.0)
    assert sde.step_coefficients(Linear(), t, t_next, sde.Zero(), "cps") == pytest.approx(
        (1.0, t_next - t, 0.0), abs=4e-16
    )


@paths
@diffusions
@given(t=inner)
def test_a_step_to_zero_with_cps_is_the_posterior_mean(path: Interpolant, diffusion: sde.Diffusion, t: float) -> None:
    p, q = sde.posterior_coefficients(path, t)
    assert sde.step_coefficients(path, t, 0.0, diffusion, "cps") == pytest.approx((p, q, 0.0), rel=1e-15)


@given(t=inner)
def test_a_linear_euler_ode_step_to_zero_is_the_posterior_mean(t: float) -> None:
    assert sde.step_coefficients(Linear(), t, 0.0, sde.Zero()) == (*sde.posterior_coefficients(Linear(), t), 0.0)


@paths
@pytest.mark.parametrize("diffusion", [sde.Zero(), sde.Power(), sde.SigmaProportional()], ids=repr)
def test_both_solvers_are_the_same_sde_to_first_order(path: Interpolant, diffusion: sde.Diffusion) -> None:
    gaps = []
    for d in (1e-3, 5e-4):
        euler = sde.step_coefficients(path, 0.6, 0.6 - d, diffusion, "euler")
        cps = sde.step_coefficients(path, 0.6, 0.6 - d, diffusion, "cps")
        assert euler[2] == cps[2]
        gaps.append(abs(euler[0] - cps[0]) + abs(euler[1] - cps[1]))
    assert gaps[1] <= 1e-14 or math.log2(gaps[0] / gaps[1]) == pytest.approx(2.0, abs=0.01)  # the gap is O(d^2)


def test_cps_share_of_noise() -> None:
    for h, share in ((0.0, 0.0), (1 / 3, 0.5), (1.0, 1.0)):
        _, _, k = sde.step_coefficients(VP(), 0.8, 0.5, sde.CPS(h), "cps")
        assert k == pytest.approx(share * VP().sigma(0.5), rel=1e-14)
    with pytest.raises(RequestError, match="use it with solver 'cps'"):
        sde.step_coefficients(VP(), 0.8, 0.5, sde.CPS(0.5), "euler")


def test_more_noise_than_the_child_has_is_all_of_it() -> None:
    a, b, k = sde.step_coefficients(Linear(), 0.5, 0.1, sde.Constant(5.0), "cps")
    assert k == 0.1 and (a, b) == pytest.approx((0.9, -0.45), rel=1e-15)  # alpha(0.1) x0_hat
    assert sde.step_coefficients(Linear(), 1.0, 0.9, sde.Memoryless(), "cps")[2] == 0.9


def test_step_errors() -> None:
    with pytest.raises(RequestError, match=r"from t = 0\.5 to 0\.5: time runs"):
        sde.step_coefficients(Linear(), 0.5, 0.5, sde.Zero())
    with pytest.raises(RequestError, match=r"from t = 0\.0 to 0\.0"):
        sde.step_coefficients(VP(), 0.0, 0.0, sde.Zero())
    for t, t_next in ((1.1, 0.5), (0.5, -0.1), (math.nan, 0.5), (0.5, math.nan)):
        with pytest.raises(RequestError, match=r"outside \[0, 1\]"):
            sde.step_coefficients(Linear(), t, t_next, sde.Zero())
    with pytest.raises(RequestError, match="'heun': choose one of euler, cps"):
        sde.step_coefficients(Linear(), 0.5, 0.4, sde.Zero(), "heun")
    with pytest.raises(RequestError, match=r"t = 1\.0 to 0\.9 of Linear\(\) with Memoryless.*singular.*'cps'"):
        sde.step_coefficients(Linear(), 1.0, 0.9, sde.Memoryless())
    with pytest.raises(RequestError, match=r"pass rollflow\.sde\.diffusion\(3\.0\)"):
        inspect.unwrap(sde.step_coefficients)(Linear(), 0.5, 0.4, 3.0)
    with pytest.raises(RequestError, match=r"no step can start at t = 1e-200: sigma is 0 and the score"):
        sde.step_coefficients(VP(0.0, 8.0), 1e-200, 0.0, sde.Zero())  # t^2 is 0 in float64


# --- many steps: what the sampler's output is


@paths
@pytest.mark.parametrize("diffusion", [sde.Zero(), sde.Power(), sde.SigmaProportional(1.5)], ids=repr)
@solvers
def test_the_sampler_converges_to_the_data_with_order_one(
    path: Interpolant, diffusion: sde.Diffusion, solver: str
) -> None:
    m, s = 1.0, 0.5
    errors = []
    for count in (600, 1200):
        mean, std = sample(path, sde.time_grid(count, "uniform"), diffusion, solver, m, s)
        errors.append((abs(mean - m), abs(std - s)))
    assert max(errors[-1]) <= 3e-3
    for coarse, fine in zip(*errors, strict=True):
        assert fine <= 1e-12 or 0.85 <= math.log2(coarse / fine) <= 1.15


@paths
@solvers
def test_noise_that_does_not_fade_still_converges_but_slower(path: Interpolant, solver: str) -> None:
    """With a constant g the score's weight g^2 / (2 sigma) grows without bound towards t = 0: no clean order there."""
    errors = []
    for count in (100, 400):
        _, std = sample(path, sde.time_grid(count, "uniform"), sde.Constant(0.7), solver, 1.0, 0.5)
        errors.append(abs(std - 0.5))
    assert errors[1] <= 0.03 and errors[1] <= 0.5 * errors[0]


@paths
@diffusions
@settings(max_examples=20)
@given(steps=st.integers(1, 40), m=st.floats(-3, 3), s=st.floats(0.05, 3))
def test_cps_keeps_a_gaussians_mean_exactly(
    path: Interpolant, diffusion: sde.Diffusion, steps: int, m: float, s: float
) -> None:
    mean, _ = sample(path, sde.time_grid(steps), diffusion, "cps", m, s)
    assert mean == pytest.approx(m, abs=1e-11)


@pytest.mark.parametrize(("path", "excess"), [(VP(), 0.056), (Linear(), 0.080)], ids=["vp", "linear"])
def test_euler_inflates_a_gaussian_on_the_papers_grid(path: Interpolant, excess: float) -> None:
    """At the last of ten evaluations (grid point 9), g = 3 t^2, data of standard deviation 0.7."""
    times = sde.time_grid(10)[:-1]
    _, std = sample(path, times, sde.Power(), "euler", 0.0, 0.7)
    assert std / marginal(path, times[-1], 0.0, 0.7)[1] - 1 == pytest.approx(excess, abs=5e-4)
