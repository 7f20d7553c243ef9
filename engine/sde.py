"""Time grids, diffusion, and the affine coefficients of a sampler's step: float64 on the host, no tensors.

Between two evaluations of the model a sampler does nothing but

    child  = a x + b u + k z,     z ~ N(0, I),     u = u_theta(x / c, tau) at the parent's time
    x0_hat = p x + q u

so a solver is a function from two times to `(a, b, k)`. With `x0_hat = x / c - tau u` and
`eps_hat = x / c + (1 - tau) u` (see `rollflow.interpolant`), a step from `t` to `t_next` of length `d = t - t_next` is

    euler   x - d (alpha' x0_hat + sigma' eps_hat) - (d g^2 / (2 sigma)) eps_hat + g sqrt(d) z
    cps     alpha(t_next) x0_hat + sqrt(sigma(t_next)^2 - k^2) eps_hat + k z,   k = min(g sqrt(d), sigma(t_next))

`euler` is Euler-Maruyama for the reverse SDE with diffusion `g` (Kim et al., arXiv 2503.19385, the SDE conversion;
Song et al., arXiv 2011.13456). `cps` is coefficient-preserving sampling (arXiv 2509.05952; in DDIM's form, arXiv
2010.02502): old and fresh noise add up to exactly `sigma(t_next)`. Both are of first order and have the same limit, the
SDE with diffusion `g`: expanding the square root to `sigma(t_next) - k^2 / (2 sigma)` gives `euler` back. `g = 0` is
the ODE.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from rollflow.errors import RequestError, shown, titled
from rollflow.interpolant import Interpolant, called, check_time
from rollflow.values import plain, real

GRIDS = ("paper", "uniform", "shifted")
SOLVERS = ("euler", "cps")


def time_grid(steps: int, kind: str = "paper", shift: float = 3.0) -> tuple[float, ...]:
    """The `steps + 1` times of a sampler, decreasing from 1 to 0.

    With `v` the uniform grid 1, 1 - 1 / steps, ..., 0:
    - "paper": `sqrt(1 - (1 - v)^2)`, many steps near the noise (Kim et al., arXiv 2503.19385);
    - "uniform": `v`;
    - "shifted": `shift v / (1 + (shift - 1) v)`, that of diffusers' FlowMatchEulerDiscreteScheduler (Esser et al.,
      arXiv 2403.03206, the resolution-dependent shift). `shift` is used here alone; 1 is "uniform".

    Raises `RequestError` for fewer than one step, an unknown kind, or a shift that is not positive and finite.
    """
    count, by = plain(steps), real(shift)
    if type(count) is not int or count < 1:
        raise RequestError(f"a time grid of {shown(steps)} steps: the number of steps is a whole number of at least 1")
    if not isinstance(kind, str) or kind not in GRIDS:
        raise RequestError(
            f"unknown time grid {shown(kind)}: choose one of {', '.join(GRIDS)} (of a request also model)"
        )
    if by is None or not 0.0 < by < math.inf:
        raise RequestError(
            f"a time grid shifted by {shown(shift)}: the shift is positive and finite; 1 is the uniform grid"
        )
    steps, shift = count, by
    if kind == "paper":
        return tuple(math.sqrt((steps - i) * (steps + i)) / steps for i in range(steps + 1))
    uniform = [(steps - i) / steps for i in range(steps + 1)]
    return tuple(uniform if kind == "uniform" else [shift * v / (shift * v + (1.0 - v)) for v in uniform])


class Diffusion(ABC):
    """How much noise a sampler adds: the diffusion coefficient `g` of the reverse SDE, per square root of time.

    The marginals do not depend on it in continuous time; a discrete sampler and a search do. Subclass and give `g`, or
    hand a plain function `g(t)` to `diffusion`.
    """

    @abstractmethod
    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        """The coefficient at time `t`: non-negative, `inf` where it diverges. Some need to know the interpolant."""

    def std(self, interpolant: Interpolant, t: float, t_next: float) -> float:
        """Standard deviation of the noise that one step from `t` to `t_next` adds: `g(t) sqrt(t - t_next)`."""
        return self.g(t, interpolant) * math.sqrt(t - t_next)


@dataclass(frozen=True)
class Power(Diffusion):
    """`g = scale t^exponent`. The default, `3 t^2`, is that of Kim et al., arXiv 2503.19385; exponent 1 is linear."""

    scale: float = 3.0
    exponent: float = 2.0

    def __post_init__(self) -> None:
        _check_scale(self, self.scale)
        exponent = real(self.exponent)
        if exponent is None or not 0.0 <= exponent < math.inf:
            raise RequestError(f"{shown(self)}: the exponent is finite and not negative")
        object.__setattr__(self, "exponent", exponent)

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        return self.scale * check_time(t) ** self.exponent


@dataclass(frozen=True)
class Constant(Diffusion):
    """`g = scale` at every time."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self, self.scale)

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        check_time(t)
        return self.scale


@dataclass(frozen=True)
class Zero(Diffusion):
    """`g = 0`: the probability-flow ODE."""

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        check_time(t)
        return 0.0


@dataclass(frozen=True)
class SigmaProportional(Diffusion):
    """`g = scale sigma(t)` of the interpolant in use, which `g` therefore needs to be given."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self, self.scale)

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        return self.scale * _given(self, interpolant).sigma(t)


@dataclass(frozen=True)
class Memoryless(Diffusion):
    """`g^2 = 2 scale^2 sigma (sigma' - sigma alpha' / alpha)`: at scale 1, where a sample ends forgets where it began.

    For VP it is DDPM's `g^2 = beta(t)`; on the linear path it is `2 t / (1 - t)`, infinite at `t = 1`: there take
    solver "cps", whose noise saturates. Source: Domingo-Enrich et al., Adjoint Matching, arXiv 2409.08861 (the
    memoryless schedule); `Memoryless(a / sqrt(2))` on the linear path is Flow-GRPO's `a sqrt(t / (1 - t))`, arXiv
    2505.05470.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_scale(self, self.scale)

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        path = _given(self, interpolant)
        alpha, sigma = path.alpha(t), path.sigma(t)
        if alpha == 0.0:
            return math.inf if self.scale > 0.0 else 0.0
        return self.scale * math.sqrt(2.0 * sigma * (path.sigma_dot(t) - sigma * path.alpha_dot(t) / alpha))


@dataclass(frozen=True)
class CPS(Diffusion):
    """A fixed share of each child's noise is fresh: `k = sigma(t_next) sin(h pi / 2)`, `0 <= h <= 1`.

    For solver "cps" alone. The noise belongs to the step, whatever its length, so there is no rate `g`, and more steps
    mean more noise in all. `h = 0` is DDIM, `h = 1` forgets the old noise. Source: coefficient-preserving sampling,
    arXiv 2509.05952.
    """

    h: float = 0.5

    def __post_init__(self) -> None:
        h = real(self.h)
        if h is None or not 0.0 <= h <= 1.0:
            raise RequestError(f"{shown(self)}: h is between 0 (no noise) and 1 (nothing but fresh noise)")
        object.__setattr__(self, "h", h)

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        raise RequestError(f"{self} sets the noise of a step, not a rate g: use it with solver 'cps'")

    def std(self, interpolant: Interpolant, t: float, t_next: float) -> float:
        return interpolant.sigma(t_next) * math.sin(0.5 * math.pi * self.h)


@dataclass(frozen=True)
class Function(Diffusion):
    """A plain function of time as the diffusion coefficient `g`."""

    function: Callable[[float], float]

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        time = check_time(t)
        name = f"the diffusion {titled(self.function)}"
        return called(name, lambda: self.function(time), time, 0.0, math.inf, finite=False)


@dataclass(frozen=True)
class Guarded(Diffusion):
    """A diffusion of the user's own, whose values are checked whenever they are used.

    What it raises comes back as the cause of a `FunctionError` that names it; errors of rollflow pass. A value that is
    no number, NaN or negative is a `RequestError`.
    """

    diffusion: Diffusion

    def __repr__(self) -> str:
        return shown(self.diffusion)

    def g(self, t: float, interpolant: Interpolant | None = None) -> float:
        function = self.diffusion.g
        return called(f"g of the diffusion {self!r}", lambda: function(t, interpolant), t, 0.0, math.inf, finite=False)

    def std(self, interpolant: Interpolant, t: float, t_next: float) -> float:
        """As `Diffusion.std`, checked."""
        if type(self.diffusion).std is Diffusion.std:
            return Diffusion.std(self, interpolant, t, t_next)
        function = self.diffusion.std
        name = f"std of the diffusion {self!r}"
        return called(name, lambda: function(interpolant, t, t_next), t, 0.0, math.inf, finite=False)


_OWN = (Power, Constant, Zero, SigmaProportional, Memoryless, CPS, Function, Guarded)


def diffusion(value: float | Diffusion | Callable[[float], float]) -> Diffusion:
    """A scale becomes `Power(scale)`, 0 `Zero()`, a plain function `g(t)` is wrapped, a `Diffusion` stays what it is,
    but that the values of one of the user's own are checked (`Guarded`).

    Raises `RequestError` for anything else: a negative or non-finite scale, a class in place of an instance.
    """
    if isinstance(value, Diffusion):
        return value if type(value) in _OWN else Guarded(value)
    if (scale := real(value)) is not None:
        return Power(scale) if scale else Zero()
    if callable(value) and not isinstance(value, type):
        return Function(value)
    hint = f"; did you mean {titled(value)}()?" if isinstance(value, type) else ""
    raise RequestError(
        f"{shown(value)} is no diffusion: pass a scale (3.0: g = 3 t^2), a Diffusion or a function g(t){hint}"
    )


@dataclass(frozen=True)
class Step:
    """The coefficients of arriving at one point of the grid and of judging there (float64 on the host)."""

    time: float
    tau: float
    scale: float
    a: float
    b: float
    k: float
    p: float
    q: float


def step_coefficients(
    interpolant: Interpolant, t: float, t_next: float, diffusion: Diffusion, solver: str = "euler"
) -> tuple[float, float, float]:
    """`(a, b, k)` of `child = a x + b u + k z`, the step from time `t` to `t_next < t`.

    `x` is the state in the interpolant's coordinates, `u = u_theta(x / scale(t), linear_time(t))`, `z ~ N(0, I)`. The
    formulas of both solvers stand at the top of this file. For "cps", a diffusion that asks for more noise than the
    child has gets `k = sigma(t_next)`: the child's noise is then all fresh; at `t_next = 0` the child is `x0_hat`.

    Raises `RequestError` for times outside [0, 1] or not decreasing, for a step that starts where `sigma = 0` (the
    score is singular), where a coefficient is not finite, for an unknown solver, and for `CPS` with solver "euler".
    """
    t, t_next = check_time(t), check_time(t_next)
    if not t_next < t:
        raise RequestError(f"a step from t = {t!r} to {t_next!r}: time runs from 1 (noise) down to 0 (data)")
    if not isinstance(diffusion, Diffusion):
        raise RequestError(f"{shown(diffusion)} is no Diffusion: pass rollflow.sde.diffusion({shown(diffusion)})")
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise RequestError(f"unknown solver {shown(solver)}: choose one of {', '.join(SOLVERS)}")
    alpha, sigma, c = interpolant.alpha(t), interpolant.sigma(t), interpolant.scale(t)
    if sigma == 0.0:
        raise RequestError(f"no step can start at t = {t!r}: sigma is 0 and the score -eps_hat / sigma is singular")
    # Both solvers are  child = keep x + length (on_x0 x0_hat + on_eps eps_hat) + k z.
    if solver == "euler":
        g = diffusion.g(t, interpolant)
        keep, length = 1.0, t - t_next
        on_x0, on_eps = -interpolant.alpha_dot(t), -(interpolant.sigma_dot(t) + 0.5 * g * g / sigma)
        k = g * math.sqrt(length)
    else:
        noise = interpolant.sigma(t_next)
        k = min(diffusion.std(interpolant, t, t_next), noise)
        keep, length = 0.0, 1.0
        on_x0, on_eps = interpolant.alpha(t_next), math.sqrt((noise - k) * (noise + k))
    a = keep + length * ((on_x0 + on_eps) / c)
    b = length * (on_eps * (alpha / c) - on_x0 * (sigma / c))  # alpha / c is 1 - tau without cancellation
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(k)):
        raise RequestError(
            f"the step from t = {t!r} to {t_next!r} of {shown(interpolant)} with {shown(diffusion)} and solver "
            f"{solver!r} is singular: (a, b, k) = {(a, b, k)}; start elsewhere, take a diffusion that is "
            "finite there or solver 'cps'"
        )
    return a, b, k


def posterior_coefficients(interpolant: Interpolant, t: float) -> tuple[float, float]:
    """`(p, q)` of the posterior mean of the data, `x0_hat = p x + q u`, at time `t`: `(1 / scale, -linear_time)`.

    `x` and `u` are those of `step_coefficients`. Raises `RequestError` for a time outside [0, 1]. Source: Tweedie's
    formula.
    """
    return 1.0 / interpolant.scale(t), -interpolant.linear_time(t)


def renoise_coefficients(interpolant: Interpolant, t: float, t_back: float) -> tuple[float, float, float]:
    """`(a, b, k)` of the way back, from time `t` to a noisier `t_back > t`: `x' = a x + k z`, and `b = 0`.

    The Markov kernel of the interpolant, `a = alpha' / alpha`, `k^2 = sigma'^2 - a^2 sigma^2`: a state with the
    marginal of `t` becomes one with the marginal of `t_back`. Source: the forward process of Song et al., arXiv
    2011.13456; used by search over paths (Ma et al., arXiv 2501.09732).

    Raises `RequestError` for times outside [0, 1] or not increasing, and where no data is left at `t`.
    """
    t, t_back = check_time(t), check_time(t_back)
    if not t_back > t:
        raise RequestError(f"renoising from t = {t!r} to {t_back!r}: it goes to a later time, towards the noise")
    if interpolant.alpha(t) == 0.0:
        raise RequestError(f"renoising from t = {t!r}: there is nothing but noise")
    a = interpolant.alpha(t_back) / interpolant.alpha(t)
    kept, noise = a * interpolant.sigma(t), interpolant.sigma(t_back)
    return a, 0.0, math.sqrt((noise - kept) * (noise + kept))


def _given(diffusion: Diffusion, interpolant: Interpolant | None) -> Interpolant:
    if interpolant is None:
        raise RequestError(f"g of {diffusion} depends on the interpolant: call g(t, interpolant)")
    return interpolant


def _check_scale(diffusion: Diffusion, scale: float) -> None:
    given = real(scale)
    if given is None or not 0.0 <= given < math.inf:
        raise RequestError(f"{shown(diffusion)}: the scale of the noise is a finite number of at least 0")
    object.__setattr__(diffusion, "scale", given)
