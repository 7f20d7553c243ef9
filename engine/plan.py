"""A request, checked and turned into coefficients: the grid, the path and the affine steps between evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import torch

from rollflow import checks, methods, rewards, sde
from rollflow import interpolant as interpolants
from rollflow.draw import Draw
from rollflow.errors import FunctionError, RequestError, RollflowError, said, shown, titled
from rollflow.models import Traits
from rollflow.request import Request
from rollflow.sde import Step

Own = Callable[[int], Sequence[float]]
PREVIEW_FINALISTS = 8
PILOT = 16  # particles that a normalised term's mean and deviation are taken of, at most
STRENGTH = 0.6  # of a request with an image that names none
LARGEST = 1e18  # of a coefficient: its square is a 32-bit float still


@dataclass(frozen=True)
class Plan:
    """A checked request: its interpolant, its grid and the affine coefficients of each step.

    `steps` are the points of the grid, each as reached from the one before (the first: from nothing). `held` is the
    most particles that it holds at once. `held_out` is the judge that the request names, not the reward's own.
    """

    request: Request
    reward: rewards.Reward
    path: interpolants.Interpolant
    diffusion: sde.Diffusion
    steps: tuple[Step, ...]
    finalists: int
    latents: torch.Tensor | None
    trusted_from: float
    held: int = 1
    held_out: rewards.Reward | None = None
    _arrivals: dict[tuple, Step] = field(default_factory=dict, compare=False, repr=False)

    @property
    def nfe(self) -> int:
        """The whole budget."""
        assert self.request.nfe is not None, "plan() has filled it in"
        return self.request.nfe

    @property
    def finish_nfe(self) -> int:
        """What the finish of all finalists costs."""
        return self.request.finish * self.finalists

    @property
    def again_nfe(self) -> int:
        """What is kept back for particles that were evaluated from a cache: what is drawn from, and all finalists."""
        request = self.request
        if not request.cache:
            return 0
        found = methods.parents(request.method, self.nfe, len(self.steps), self.finish_nfe, **request.options)
        assert found is not None, "plan() has made sure"
        return found + self.finalists

    def search(self) -> methods.Search:
        """The request's method, ready to begin."""
        request = self.request
        counts = self.nfe, len(self.steps), self.finish_nfe, request.seed, self.again_nfe
        return methods.make(request.method, *counts, **request.options)

    def arrival(self, draw: Draw) -> Step:
        """The coefficients of one of the draw's children; see `rollflow.draw.Draw.move`."""
        level, parent = draw.arrives, draw.parent
        if level >= len(self.steps):
            raise RequestError(f"a draw to point {level} of a grid of {len(self.steps)}: they count from 0")
        point = self.steps[level]
        if parent is None or (draw.move == "sde" and level == parent.step + 1):
            return point
        key = (draw.move, parent.step, level, draw.angle)
        if key not in self._arrivals:
            a, b, k = self.move(draw)
            self._arrivals[key] = replace(point, a=a, b=b, k=k)
        return self._arrivals[key]

    def move(self, draw: Draw) -> tuple[float, float, float]:
        """`(a, b, k)` of a draw that has a parent."""
        assert draw.parent is not None
        path, start, end = self.path, self.steps[draw.parent.step].time, self.steps[draw.arrives].time
        if draw.move == "sde":
            return sde.step_coefficients(path, start, end, self.diffusion, self.request.solver)
        if draw.move == "ode":
            return sde.step_coefficients(path, start, end, sde.Zero(), "cps")
        if draw.move == "renoise":
            return sde.renoise_coefficients(path, start, end)
        return math.cos(draw.angle), 0.0, math.sin(draw.angle) * path.sigma(end)

    def finish(self, start: float, count: int) -> tuple[Step, ...]:
        """The steps of `count` deterministic evaluations from a particle at time `start` towards 0."""
        return (_finish_of_known if type(self.path) in _KNOWN else _finish)(self.path, start, count)


def _grid(request: Request, path: interpolants.Interpolant, own: Own | None) -> tuple[float, ...]:
    if request.strength is not None and request.image is None:
        raise RequestError(f"strength={request.strength:g}: it says how much of an image is replaced; give an image")
    if request.times is not None:
        if request.strength is not None:
            raise RequestError(f"strength={request.strength:g} and times: the first time is the start; give one")
        return (*request.times,) if request.times[-1] == 0.0 else (*request.times, 0.0)
    assert request.grid is not None and request.steps is not None, "plan() has filled them in"
    strength = request.strength if request.image is not None else None
    if isinstance(request.grid, str) and request.grid == "model" and own is not None:
        taus = [*own(request.steps)]
        if strength is not None:
            taus = [strength, *(tau for tau in taus if tau < strength - 1e-6)]
        return *dict.fromkeys(time_of(path, tau) for tau in taus), 0.0
    times = tuple(sde.time_grid(request.steps, request.grid, request.shift))
    if strength is None:
        return times
    start = time_of(path, strength)
    return tuple(start * time for time in times)


def _steps(
    path: interpolants.Interpolant, times: tuple[float, ...], diffusion: sde.Diffusion, solver: str
) -> tuple[Step, ...]:
    """One step for each of `times`; the first is where the particle already is, or the prior: x = sigma z."""
    known = type(path) in _KNOWN and type(diffusion) in _KNOWN and len(times) <= 1024
    return (_steps_of_known if known else _computed)(path, times, diffusion, solver)


def _computed(
    path: interpolants.Interpolant, times: tuple[float, ...], diffusion: sde.Diffusion, solver: str
) -> tuple[Step, ...]:
    steps = []
    for i, time in enumerate(times):
        try:
            a, b, k = (
                sde.step_coefficients(path, times[i - 1], time, diffusion, solver)
                if i
                else (0.0, 0.0, path.sigma(time))
            )
            p, q = sde.posterior_coefficients(path, time)
            step = Step(time, path.linear_time(time), path.scale(time), a, b, k, p, q)
        except (ArithmeticError, ValueError) as error:
            if isinstance(error, RollflowError):
                raise
            raise RequestError(f"{shown(path)} with {shown(diffusion)} has no step to t = {time!r}: {error}") from error
        if not all(abs(value) < LARGEST for value in (step.tau, step.scale, a, b, k, p, q)):
            raise RequestError(
                f"{shown(path)} with {shown(diffusion)} has coefficients at t = {time!r} that no particle can follow: "
                f"(a, b, k) = {(a, b, k)}"
            )
        steps.append(step)
    if isinstance(path, interpolants.Guarded):
        for before, after in pairwise(steps):
            if not after.tau < before.tau:
                raise RequestError(
                    f"the linear time of {path!r} is {before.tau!r} at t = {before.time!r} and {after.tau!r} at "
                    f"t = {after.time!r}: it must increase in time, sigma / alpha with it"
                )
    return tuple(steps)


def finish_times(path: interpolants.Interpolant, start: float, count: int) -> tuple[float, ...]:
    """`start` and the times of `count` deterministic evaluations between it and 0, equidistant in linear time."""
    tau = path.linear_time(start)
    wanted = [tau * (1 - i / (count + 1)) for i in range(1, count + 1)]
    return start, *(time_of(path, target, start) for target in wanted)


def time_of(path: interpolants.Interpolant, tau: float, latest: float = 1.0) -> float:
    """The time at which the linear time is `tau`, or `latest` where that is later."""
    low, high = 0.0, latest
    while high - low > 1e-12:  # bisection: linear time increases with time on every interpolant
        middle = (low + high) / 2
        low, high = (middle, high) if path.linear_time(middle) < tau else (low, middle)
    return high


def _finish(path: interpolants.Interpolant, start: float, count: int) -> tuple[Step, ...]:
    return _computed(path, finish_times(path, start, count), sde.Zero(), "cps")[1:]


# Requests of a service differ in prompt and seed, and seldom in these: what is rollflow's own is computed once.
_KNOWN = {
    interpolants.Linear, interpolants.VP, interpolants.Cosine, interpolants.Polynomial,
    sde.Power, sde.Constant, sde.Zero, sde.SigmaProportional, sde.Memoryless, sde.CPS,
}  # fmt: skip
_steps_of_known, _finish_of_known = lru_cache(256)(_computed), lru_cache(1024)(_finish)


def _check_method(made: Plan) -> None:
    """Builds the search once: what its method says of its options and its budget."""
    method = made.request.method
    try:
        search = made.search()
    except RollflowError:
        raise
    except Exception as error:
        if isinstance(method, str):
            given = shown(dict(made.request.options))
            raise RequestError(f"the method {method} cannot work with the options {given} ({said(error)})") from error
        raise FunctionError(f"the method {titled(method)} raised {said(error)} when it was made") from error
    if not all(callable(getattr(search, name, None)) for name in ("send", "close")):
        raise RequestError(
            f"the method {titled(method)} made {shown(search)}: it must make a generator, which yields lists of draws"
        )


def _check_cache(made: Plan) -> None:
    """Whether the method can have a cache at all."""
    method, options = made.request.method, made.request.options
    title, able = methods.title(method), ", ".join(methods.caching())
    try:
        found = methods.parents(method, made.nfe, len(made.steps), made.finish_nfe, **options)
    except RollflowError:
        raise
    except Exception as error:
        raise FunctionError(f"what the method {title} declares that it draws from raised {said(error)}") from error
    if found is None:
        raise RequestError(
            f"cache=True: the method {title} does not say how many particles it draws from, which are evaluated anew: "
            f"use {able} or a method with `parents` (rollflow.methods.method), or leave cache out"
        )
    if methods.guided(method, options):
        raise RequestError(
            f"cache=True: the method {title} is guided with these options, and gradients take evaluations in full: "
            "leave one of the two out"
        )


def _held_out(request: Request) -> rewards.Reward | None:
    if request.held_out is None:
        return None
    return rewards.unscaled(rewards.make(request.held_out))


def _held(made: Plan) -> int:
    """How many particles the method says that it holds, and how many a normalised reward holds back besides."""
    request, method = made.request, made.request.method
    more = PILOT if isinstance(made.reward, rewards.Combined) and made.reward.normalised else 0
    try:
        kept = made.finish_nfe + made.again_nfe
        return more + methods.holds(method, made.nfe, len(made.steps), kept, **request.options)
    except RollflowError:
        raise
    except Exception as error:
        raise FunctionError(f"what the method {titled(method)} declares that it holds raised {said(error)}") from error


def _whole_request(request: Request, traits: Traits) -> Request:
    """The request with what it leaves to the method and the model."""
    method: object = request.method
    if not callable(method) and (not isinstance(method, str) or method not in methods.names()):
        raise RequestError(
            f"unknown method {shown(method)}: choose one of {', '.join(methods.names())}, or give a function; see "
            "rollflow.methods.make"
        )
    given = {"steps": traits.steps, **methods.defaults(request.method)}
    return replace(request, **{name: value for name, value in given.items() if getattr(request, name) is None})


def plan(request: Request, traits: Traits | None = None, preview: bool = False, own: Own | None = None) -> Plan:
    """Checks a request, but for what depends on the model, and computes every coefficient it will need.

    `traits` are those of the model, by default those of any; `preview` says that particles will be judged on previews;
    `own` gives the linear times of the model's own sampler for a number of steps, for the grid "model".

    Raises:
        RequestError: what was given, what is allowed, what to do.
    """
    traits = traits or Traits()
    request = _whole_request(checks.request(request), traits)
    reward = rewards.make(request.reward)
    assert request.interpolant is not None
    path, diffusion = interpolants.make(request.interpolant), sde.diffusion(request.diffusion)
    if request.image is not None and request.strength is None and request.times is None:
        request = replace(request, strength=STRENGTH)
    times = _grid(request, path, own)
    steps = _steps(path, times[:-1], diffusion, request.solver)
    usual = 1 if request.finish else PREVIEW_FINALISTS if preview else 2
    finalists = usual if request.finalists is None else request.finalists
    if (option := methods.trusts(request.method)) is not None:
        first = sum(step.tau > traits.trusted_from + 1e-9 for step in steps[:-1])
        request = replace(request, options={option: first, **request.options})
    made = Plan(request, reward, path, diffusion, steps, finalists, request.latents, traits.trusted_from)
    if request.cache:
        _check_cache(made)
    _check_method(made)
    made = replace(made, held=_held(made), held_out=_held_out(request))
    title = methods.title(request.method)
    if methods.branches(request.method) and len(steps) > 1 and all(step.k == 0.0 for step in steps[1:]):
        raise RequestError(
            f"the method {title} branches, and under an ODE all children of a particle are the same: use one of "
            f"{', '.join(name for name in methods.names() if not methods.branches(name))}, or a diffusion above 0"
        )
    if methods.guided(request.method, request.options) and not rewards.differentiable(reward):
        usable = rewards.with_gradients()
        raise RequestError(
            f"the method {title} follows the gradient of the reward, and {reward.name} has none: use "
            f"{', '.join(usable)}, or a reward with the attribute `differentiable = True`"
        )
    return made
