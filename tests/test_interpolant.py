"""Interpolants against closed forms: the coefficients, their derivatives, and the conversion from the linear path."""

import inspect
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollflow.errors import RequestError, RollflowError
from rollflow.interpolant import VP, Cosine, Interpolant, Linear, Polynomial, make

PATHS = [Linear(), VP(), VP(0.0, 8.0), Cosine(), Polynomial(2), Polynomial(1.5), Polynomial(4)]
METHODS = ("alpha", "sigma", "alpha_dot", "sigma_dot", "linear_time", "scale", "log_snr")
times = st.floats(min_value=1e-3, max_value=1.0 - 1e-3)
paths = pytest.mark.parametrize("path", PATHS, ids=repr)


@dataclass(frozen=True)
class Squared(Interpolant):
    """A path of a user's own, from four methods: alpha = 1 - t^2, sigma = t."""

    slope: float = 1.0

    def alpha(self, t: float) -> float:
        return 1.0 - t * t

    def sigma(self, t: float) -> float:
        return t

    def alpha_dot(self, t: float) -> float:
        return -2.0 * t

    def sigma_dot(self, t: float) -> float:
        return self.slope


def gaussian_velocity(path: Interpolant, t: float, x: float, m: float, s: float) -> float:
    """E[alpha' x0 + sigma' eps | x_t = x] for x0 ~ N(m, s^2), by regression of Gaussian variables, not conversion."""
    alpha, sigma, da, ds = path.alpha(t), path.sigma(t), path.alpha_dot(t), path.sigma_dot(t)
    covariance = da * alpha * s * s + ds * sigma
    return da * m + covariance / (alpha * alpha * s * s + sigma * sigma) * (x - alpha * m)


@paths
@given(t=times)
def test_derivatives_are_those_of_the_coefficients(path: Interpolant, t: float) -> None:
    h = 1e-4 * min(t, 1.0 - t)
    for value, slope in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        assert slope(t) == pytest.approx((value(t + h) - value(t - h)) / (2.0 * h), rel=1e-6, abs=1e-6)


@paths
@given(t=times, x=st.floats(-4, 4), m=st.floats(-2, 2), s=st.floats(0.05, 3))
def test_the_linear_velocity_gives_the_velocity_of_every_path(
    path: Interpolant, t: float, x: float, m: float, s: float
) -> None:
    c, tau = path.scale(t), path.linear_time(t)
    u = gaussian_velocity(Linear(), tau, x / c, m, s)
    x0_hat, eps_hat = x / c - tau * u, x / c + (1.0 - tau) * u
    got = path.alpha_dot(t) * x0_hat + path.sigma_dot(t) * eps_hat
    size = (abs(path.alpha_dot(t)) + abs(path.sigma_dot(t))) * (abs(x0_hat) + abs(eps_hat) + abs(x) + abs(m))
    assert abs(got - gaussian_velocity(path, t, x, m, s)) <= 1e-12 * (1.0 + size)


@paths
@given(t=times)
def test_a_scaled_state_has_the_coefficients_of_the_linear_path(path: Interpolant, t: float) -> None:
    c, tau = path.scale(t), path.linear_time(t)
    assert path.alpha(t) / c == pytest.approx(Linear().alpha(tau), abs=1e-15)
    assert path.sigma(t) / c == pytest.approx(Linear().sigma(tau), abs=1e-15)
    assert path.log_snr(t) == pytest.approx(Linear().log_snr(tau), rel=1e-12, abs=1e-12 + 4e-16 / (1 - tau))


@paths
def test_ends_and_monotone_noise(path: Interpolant) -> None:
    assert (path.alpha(0.0), path.sigma(0.0), path.linear_time(0.0), path.scale(0.0)) == (1.0, 0.0, 0.0, 1.0)
    assert path.log_snr(0.0) == math.inf
    grid = [i / 200 for i in range(201)]
    ratios = [path.log_snr(t) for t in grid]
    assert all(high > low for high, low in pairwise(ratios))
    if not isinstance(path, VP):
        assert (path.alpha(1.0), path.sigma(1.0), path.linear_time(1.0), path.log_snr(1.0)) == (
            0.0,
            1.0,
            1.0,
            -math.inf,
        )


def test_formulas_at_a_few_times() -> None:
    assert [Linear().alpha(0.3), Linear().sigma(0.3), Linear().alpha_dot(0.3), Linear().sigma_dot(0.3)] == [
        0.7,
        0.3,
        -1,
        1,
    ]
    integral = 0.5**2 * 19.9 / 2 + 0.05
    assert VP().alpha(0.5) == pytest.approx(math.exp(-integral / 2), rel=1e-15)
    assert VP().sigma(0.5) == pytest.approx(math.sqrt(1 - math.exp(-integral)), rel=1e-15)
    assert Cosine().alpha(1 / 3) == pytest.approx(math.sqrt(3) / 2, rel=1e-15)
    assert Cosine().sigma(1 / 3) == pytest.approx(0.5, rel=1e-15)
    assert (Polynomial(2).alpha(0.25), Polynomial(2).sigma(0.25)) == pytest.approx((0.5625, 0.4375), rel=1e-15)
    assert Linear().log_snr(0.25) == pytest.approx(math.log(9), rel=1e-15)


@given(t=st.floats(0, 1))
def test_identities(t: float) -> None:
    assert Linear().scale(t) == 1.0 and Linear().linear_time(t) == t
    for path in (VP(), Cosine()):
        assert path.alpha(t) ** 2 + path.sigma(t) ** 2 == pytest.approx(1.0, abs=4e-16)
    one = Polynomial(1)
    for name in METHODS[:4]:
        assert getattr(one, name)(t) == pytest.approx(getattr(Linear(), name)(t), rel=1e-14, abs=1e-300)


def test_vp_reaches_neither_end_of_the_linear_path_early() -> None:
    assert VP().linear_time(1.0) == pytest.approx(0.99347, abs=5e-6)
    # the paper's ten evaluation times: what they are on the linear path
    taus = [VP().linear_time(math.sqrt(1 - (i / 10) ** 2)) for i in range(10)]
    assert [round(tau, 3) for tau in taus] == [0.993, 0.993, 0.992, 0.99, 0.986, 0.978, 0.962, 0.929, 0.859, 0.709]


def test_small_times_keep_their_digits() -> None:
    t = 1e-12  # 1 - exp(-T) would keep four digits here
    integral = t * (t * 19.9 / 2 + 0.1)
    assert VP().sigma(t) == pytest.approx(math.sqrt(integral) * (1 - integral / 4), rel=1e-14)
    assert VP().sigma_dot(t) == pytest.approx(0.5 * math.sqrt(0.1 / t), rel=1e-9)
    assert Polynomial(2).sigma(t) == pytest.approx(2 * t - t * t, rel=1e-14)


@paths
@pytest.mark.parametrize("t", [-1e-9, 1.0 + 1e-9, math.nan, math.inf])
def test_times_outside_the_path_are_refused(path: Interpolant, t: float) -> None:
    for name in METHODS:
        with pytest.raises(RequestError, match=r"outside \[0, 1\].*1 \(noise\) to 0 \(data\)"):
            getattr(path, name)(t)


def test_a_singular_time_is_named_with_its_reason() -> None:
    with pytest.raises(RequestError, match=r"sigma_dot of VP.* at t = 0\.0 is singular.*sigma is 0"):
        VP().sigma_dot(0.0)
    assert issubclass(RequestError, ValueError) and issubclass(RequestError, RollflowError)


@pytest.mark.parametrize(
    "build", [lambda: VP(-0.1), lambda: VP(0.1, 0.0), lambda: VP(math.nan), lambda: VP(0.1, math.inf)]
)
def test_vp_refuses_rates_that_are_none(build) -> None:
    with pytest.raises(RequestError, match=r"VP\(beta_min=.*the usual choice is VP\(0.1, 20.0\)"):
        build()


@pytest.mark.parametrize("degree", [0.5, 0, -1, math.nan, math.inf])
def test_polynomial_refuses_degrees_below_one(degree: float) -> None:
    with pytest.raises(RequestError, match="at least 1"):
        Polynomial(degree)


def test_make_knows_names_and_objects() -> None:
    assert [make(name) for name in ("linear", "vp", "cosine", "polynomial")] == [
        Linear(),
        VP(),
        Cosine(),
        Polynomial(2),
    ]
    own = VP(0.5, 4.0)
    assert make(own) is own
    with pytest.raises(RequestError, match=r"unknown interpolant 'VP'.*linear, vp, cosine, polynomial"):
        make("VP")
    unchecked = inspect.unwrap(make)  # without the test run's own check of argument types
    with pytest.raises(RequestError, match=r"3 is no interpolant"):
        unchecked(3)
    with pytest.raises(RequestError, match=r"is no interpolant.*instance"):
        unchecked(Linear)


def test_an_interpolant_of_the_users_own_takes_four_methods() -> None:
    path = make(Squared())
    assert path.scale(0.5) == 1.25 and path.linear_time(0.5) == 0.4
    assert path.log_snr(0.5) == pytest.approx(2 * math.log(1.5), rel=1e-15)


def test_make_finds_what_is_wrong_with_a_users_interpolant() -> None:
    with pytest.raises(RequestError, match=r"sigma_dot\(0\.13\) is 2\.0, but sigma changes there at a rate of 1"):
        make(Squared(slope=2.0))

    class Backwards(Squared):
        def alpha(self, t: float) -> float:
            return t

        def sigma(self, t: float) -> float:
            return 1.0 - t

    with pytest.raises(
        RequestError, match=r"alpha\(0\), sigma\(0\) = \(0\.0, 1\.0\): the data end is alpha = 1, sigma = 0"
    ):
        make(Backwards())

    class Returning(Squared):
        def sigma(self, t: float) -> float:
            return t * (1.0 - t)

    with pytest.raises(RequestError, match="sigma / alpha must increase in time"):
        make(Returning())
