"""Interpolants: the pair `(alpha, sigma)` of `x_t = alpha(t) x0 + sigma(t) eps`, with `x0 ~ data` and `eps ~ N(0, I)`.

Time runs from 1 (noise) to 0 (data), as in diffusers. Everything is float64 on the host: the numbers here become the
coefficients of a sampler's step (`rollflow.sde`), one row of a batch at a time.

One model serves every interpolant. A flow model is trained on the linear path, `u(x, t) = E[eps - x0 | x_t = x]`. At
any time `t` of any interpolant let `c = alpha + sigma` (`scale`) and `tau = sigma / c` (`linear_time`). Then `x_t / c`
lies on the linear path at time `tau`, because it has the same signal-to-noise ratio; so `u(x_t / c, tau)` is enough:

    x0_hat  = x_t / c - tau u              the posterior mean of the data
    eps_hat = x_t / c + (1 - tau) u        the posterior mean of the noise

Source: the interpolant conversion of Kim et al., arXiv 2503.19385; the scale-time transformation of Lipman et al.,
arXiv 2412.06264.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from rollflow.errors import FunctionError, RequestError, RollflowError, said, shown
from rollflow.values import real


def check_time(t: float) -> float:
    """Return `t` as a float, or raise `RequestError` where it is not a number in [0, 1]."""
    given = t if type(t) is float else real(t)
    if given is None or not 0.0 <= given <= 1.0:  # also catches NaN
        raise RequestError(f"time {shown(t)} is outside [0, 1]: times run from 1 (noise) to 0 (data)")
    return given


class Interpolant(ABC):
    """A path from noise to data. To define one, subclass and give `alpha`, `sigma` and their time derivatives.

    Required: `alpha(0) = 1`, `sigma(0) = 0`, both non-negative, and `sigma / alpha` increasing in time. `make` checks
    an object of yours once, the derivatives included. All methods take a time in [0, 1] and return a float.
    """

    @abstractmethod
    def alpha(self, t: float) -> float:
        """Coefficient of the data at time `t`."""

    @abstractmethod
    def sigma(self, t: float) -> float:
        """Coefficient of the noise at time `t`."""

    @abstractmethod
    def alpha_dot(self, t: float) -> float:
        """Derivative of `alpha` with respect to time."""

    @abstractmethod
    def sigma_dot(self, t: float) -> float:
        """Derivative of `sigma` with respect to time. Raises `RequestError` at a time where it is infinite."""

    def scale(self, t: float) -> float:
        """`c = alpha + sigma`: a state divided by it lies on the linear path."""
        return self.alpha(t) + self.sigma(t)

    def linear_time(self, t: float) -> float:
        """`tau = sigma / (alpha + sigma)`: the time of the linear path that has the same signal-to-noise ratio."""
        return self.sigma(t) / self.scale(t)

    def log_snr(self, t: float) -> float:
        """`log(alpha^2 / sigma^2)`, natural; +inf where there is no noise, -inf where there is no data left."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        if sigma == 0.0:
            return math.inf
        return 2.0 * (math.log(alpha) - math.log(sigma)) if alpha > 0.0 else -math.inf


@dataclass(frozen=True)
class Linear(Interpolant):
    """`alpha = 1 - t`, `sigma = t`: what FLUX, SD3, Wan and Qwen-Image are trained on (rectified flow)."""

    def alpha(self, t: float) -> float:
        return 1.0 - check_time(t)

    def sigma(self, t: float) -> float:
        return check_time(t)

    def alpha_dot(self, t: float) -> float:
        check_time(t)
        return -1.0

    def sigma_dot(self, t: float) -> float:
        check_time(t)
        return 1.0


@dataclass(frozen=True)
class VP(Interpolant):
    """Variance preserving, `alpha^2 + sigma^2 = 1`, with the linear noise rate of DDPM.

    `alpha = exp(-T / 2)`, `sigma = sqrt(1 - exp(-T))`, `T(t) = t^2 (beta_max - beta_min) / 2 + t beta_min`.
    At `t = 1` the data has not vanished: with the defaults `linear_time(1) = 0.9935`. At `t = 0` sigma grows like
    `sqrt(t)`, so `sigma_dot(0)` raises (with `beta_min = 0` as well, where it grows like `t`: no step starts there).
    Source: the VP SDE of Song et al., arXiv 2011.13456; the path of Kim et al.'s VP-SDE, arXiv 2503.19385.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        rates = [real(rate) for rate in (self.beta_min, self.beta_max)]
        if not all(rate is not None and 0.0 <= rate < math.inf for rate in rates) or not rates[1]:
            raise RequestError(
                f"VP(beta_min={shown(self.beta_min)}, beta_max={shown(self.beta_max)}): noise rates are finite, "
                "beta_min at least 0 and beta_max above 0; the usual choice is VP(0.1, 20.0)"
            )
        for name, rate in zip(("beta_min", "beta_max"), rates, strict=True):
            object.__setattr__(self, name, rate)

    def _integral(self, t: float) -> float:
        t = check_time(t)
        return t * (0.5 * t * (self.beta_max - self.beta_min) + self.beta_min)

    def _rate(self, t: float) -> float:
        return check_time(t) * (self.beta_max - self.beta_min) + self.beta_min

    def alpha(self, t: float) -> float:
        return math.exp(-0.5 * self._integral(t))

    def sigma(self, t: float) -> float:
        return math.sqrt(-math.expm1(-self._integral(t)))  # expm1: 1 - exp(-T) loses every digit near t = 0

    def alpha_dot(self, t: float) -> float:
        return -0.5 * self._rate(t) * self.alpha(t)

    def sigma_dot(self, t: float) -> float:
        sigma = self.sigma(t)
        if sigma == 0.0:
            raise RequestError(
                f"sigma_dot of {self} at t = {t!r} is singular: it is T' exp(-T) / (2 sigma) and sigma is 0"
            )
        return 0.5 * self._rate(t) * math.exp(-self._integral(t)) / sigma


@dataclass(frozen=True)
class Cosine(Interpolant):
    """`alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)`: variance preserving at constant speed along a circle.

    Source: the trigonometric interpolant of Albergo and Vanden-Eijnden, arXiv 2209.15571; Nichol and Dhariwal, arXiv
    2102.09672, without their offset.
    """

    def alpha(self, t: float) -> float:
        return math.sin(0.5 * math.pi * (1.0 - check_time(t)))  # exactly 0 at t = 1, where cos(pi / 2) is 6e-17

    def sigma(self, t: float) -> float:
        return math.sin(0.5 * math.pi * check_time(t))

    def alpha_dot(self, t: float) -> float:
        return -0.5 * math.pi * self.sigma(t)

    def sigma_dot(self, t: float) -> float:
        return 0.5 * math.pi * self.alpha(t)


@dataclass(frozen=True)
class Polynomial(Interpolant):
    """`alpha = (1 - t)^degree`, `sigma = 1 - (1 - t)^degree`: the polynomial convex path; degree 1 is `Linear`.

    It visits the points of the linear path at other times (`scale` is 1): as an ODE it is a time grid, as an SDE it
    changes how noise and step go together. Derivatives at `t = 1` are finite for `degree >= 1`, and less is refused.
    Source: PolynomialConvexScheduler of Lipman et al., arXiv 2412.06264, with time reversed (there 1 is data).
    """

    degree: float = 2.0

    def __post_init__(self) -> None:
        degree = real(self.degree)
        if degree is None or not 1.0 <= degree < math.inf:
            raise RequestError(
                f"Polynomial(degree={shown(self.degree)}): the degree is a finite number of at least 1; below 1 the "
                "velocity is infinite at t = 1, where every sampler starts"
            )
        object.__setattr__(self, "degree", degree)

    def alpha(self, t: float) -> float:
        return (1.0 - check_time(t)) ** self.degree

    def sigma(self, t: float) -> float:
        t = check_time(t)
        return 1.0 if t == 1.0 else -math.expm1(self.degree * math.log1p(-t))  # accurate relative to sigma as t -> 0

    def alpha_dot(self, t: float) -> float:
        return -self.sigma_dot(t)

    def sigma_dot(self, t: float) -> float:
        return self.degree * (1.0 - check_time(t)) ** (self.degree - 1.0)


_NAMED: dict[str, type[Interpolant]] = {"linear": Linear, "vp": VP, "cosine": Cosine, "polynomial": Polynomial}


class Guarded(Interpolant):
    """An interpolant of the user's own, whose values are checked whenever they are used.

    What it raises comes back as the cause of a `FunctionError` that names it; errors of rollflow pass. A value that is
    no finite number, or a negative coefficient, is a `RequestError`.
    """

    def __init__(self, path: Interpolant):
        self.path = path

    def __repr__(self) -> str:
        return shown(self.path)

    def alpha(self, t: float) -> float:
        return self._value("alpha", t, 0.0)

    def sigma(self, t: float) -> float:
        return self._value("sigma", t, 0.0)

    def alpha_dot(self, t: float) -> float:
        return self._value("alpha_dot", t)

    def sigma_dot(self, t: float) -> float:
        return self._value("sigma_dot", t)

    def scale(self, t: float) -> float:
        """As `Interpolant.scale`; it is above 0."""
        own = type(self.path).scale is not Interpolant.scale
        function = partial(self.path.scale if own else partial(Interpolant.scale, self), t)
        return called(f"scale of the interpolant {self!r}", function, t, 5e-324, math.inf)

    def linear_time(self, t: float) -> float:
        """As `Interpolant.linear_time`; it is in [0, 1]."""
        own = type(self.path).linear_time is not Interpolant.linear_time
        function = partial(self.path.linear_time if own else partial(Interpolant.linear_time, self), t)
        return called(f"linear_time of the interpolant {self!r}", function, t, 0.0, 1.0)

    def log_snr(self, t: float) -> float:
        """As `Interpolant.log_snr`, of the checked coefficients."""
        return Interpolant.log_snr(self, t)

    def _value(self, name: str, t: float, least: float = -math.inf) -> float:
        return called(f"{name} of the interpolant {self!r}", lambda: getattr(self.path, name)(t), t, least, math.inf)


def called(
    name: str, function: Callable[[], object], t: float, least: float, most: float, finite: bool = True
) -> float:
    """What a user's function gives at time `t`, as a plain float.

    Raises:
        FunctionError: the function raised; its error is the cause.
        RequestError: it gave something else than a number from `least` to `most`, or an infinite one.
    """
    try:
        value = function()
    except RollflowError:
        raise
    except Exception as error:
        raise FunctionError(f"{name} raised {said(error)} at t = {t!r}") from error
    given = real(value)
    if given is None or not least <= given <= most or (finite and math.isinf(given)):
        kind = "a finite number" if finite else "a number, not NaN"
        bounds = f", from {least:g} to {most:g}" if most < math.inf else ", not negative" if least >= 0.0 else ""
        raise RequestError(f"{name} is {shown(value)} at t = {t!r}: it must be {kind}{bounds}")
    return given


def make(value: str | Interpolant) -> Interpolant:
    """Turn "linear", "vp", "cosine" or "polynomial" (degree 2) into an interpolant; check one that is an object.

    Raises `RequestError` for another name, for something that is no `Interpolant`, and for one of the user's own whose
    ends are wrong or whose derivatives do not belong to its coefficients: its samples would be silently wrong. One of
    the user's own comes back as a `Guarded` one. What it raises is the cause of a `FunctionError`.
    """
    if isinstance(value, str):
        if value not in _NAMED:
            raise RequestError(
                f"unknown interpolant {shown(value)}: choose one of {', '.join(_NAMED)}, or pass an Interpolant"
            )
        return _NAMED[value]()
    if not isinstance(value, Interpolant):
        raise RequestError(
            f"{shown(value)} is no interpolant: pass one of {', '.join(_NAMED)}, or an instance of a subclass of "
            "rollflow.interpolant.Interpolant"
        )
    if type(value) in _NAMED.values() or isinstance(value, Guarded):
        return value
    guarded = Guarded(value)
    _check(guarded)
    return guarded


def _check(path: Interpolant) -> None:
    """Raise where a user's interpolant breaks the contract in a way that a few evaluations can show."""
    times = (0.13, 0.37, 0.61, 0.89)
    levels = [(path.alpha(t), path.sigma(t)) for t in (0.0, *times, 1.0)]
    if not (abs(levels[0][0] - 1.0) <= 1e-9 and abs(levels[0][1]) <= 1e-9):
        raise RequestError(f"{path!r} has alpha(0), sigma(0) = {levels[0]}: the data end is alpha = 1, sigma = 0")
    # sigma / alpha increases, written without the division: alpha may be 0 at t = 1
    rising = all(before[1] * after[0] < after[1] * before[0] for before, after in pairwise(levels))
    if not (rising and min(min(level) for level in levels) >= 0.0):
        raise RequestError(
            f"{path!r} has alpha, sigma = {levels} at t = {(0.0, *times, 1.0)}: they must not be negative, and "
            "sigma / alpha must increase in time"
        )
    h = 1e-5
    for name, value, slope in (("alpha", path.alpha, path.alpha_dot), ("sigma", path.sigma, path.sigma_dot)):
        for t in times:
            expected, given = (value(t + h) - value(t - h)) / (2.0 * h), slope(t)
            if not abs(given - expected) <= 1e-4 * (1.0 + abs(expected)):
                raise RequestError(
                    f"{path!r}: {name}_dot({t}) is {given!r}, but {name} changes there at a rate of {expected:.6g}"
                )
