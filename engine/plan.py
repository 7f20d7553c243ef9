"""A request, checked and turned into coefficients: the grid, the path and the affine steps between evaluations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from rollflow import interpolant as interpolants
from rollflow import methods, rewards, sde
from rollflow.draw import Draw
from rollflow.errors import RequestError
from rollflow.methods.budget import number, whole
from rollflow.models import Traits
from rollflow.request import Request
from rollflow.sde import Step

PREVIEW_FINALISTS = 8


@dataclass(frozen=True)
class Plan:
    """A checked request: its interpolant, its grid and the affine coefficients of each step.

    `steps` are the points of the grid, each as reached from the one before (the first: from nothing). `held` is the
    most particles that the method holds at once.
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
    _arrivals: dict[tuple, Step] = field(default_factory=dict, compare=False, repr=False)

    @property
    def finish_nfe(self) -> int:
        """What the finish of all finalists costs."""
        return self.request.finish * self.finalists

    def search(self) -> methods.Search:
        """The request's method, ready to begin."""
        request = self.request
        return methods.make(
            request.method, request.nfe, len(self.steps), self.finish_nfe, request.seed, **request.options
        )

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
        return tuple(_steps(self.path, finish_times(self.path, start, count), sde.Zero(), "cps")[1:])


def _grid(request: Request) -> tuple[float, ...]:
    assert request.grid is not None, "plan() has filled it in"
    if request.times is None:
        return tuple(sde.time_grid(whole("steps", request.steps, 1), request.grid, number("shift", request.shift)))
    if not isinstance(request.times, Sequence | torch.Tensor | np.ndarray) or isinstance(request.times, str):
        raise RequestError(f"times={request.times!r}: they must be a list of decreasing numbers within (0, 1]")
    given = times = [number("times", t) for t in request.times]
    if times and times[-1] != 0.0:
        times = [*times, 0.0]
    pairs = list(itertools.pairwise(times))
    if not pairs or not all(0.0 <= after < before <= 1.0 for before, after in pairs):
        raise RequestError(f"times={given}: they must decrease strictly, within (0, 1], to an optional 0")
    return tuple(times)


def _steps(path: interpolants.Interpolant, times: Sequence[float], diffusion: sde.Diffusion, solver: str) -> list[Step]:
    """One step for each of `times`; the first is where the particle already is, or the prior: x = sigma z."""
    steps = []
    for i, time in enumerate(times):
        a, b, k = (
            sde.step_coefficients(path, times[i - 1], time, diffusion, solver) if i else (0.0, 0.0, path.sigma(time))
        )
        p, q = sde.posterior_coefficients(path, time)
        steps.append(Step(time, path.linear_time(time), path.scale(time), a, b, k, p, q))
    return steps


def finish_times(path: interpolants.Interpolant, start: float, count: int) -> list[float]:
    """`start` and the times of `count` deterministic evaluations between it and 0, equidistant in linear time."""
    tau = path.linear_time(start)
    wanted = [tau * (1 - i / (count + 1)) for i in range(1, count + 1)]
    times = [start]
    for target in wanted:  # bisection: linear time increases with time on every interpolant
        low, high = 0.0, start
        while high - low > 1e-12:
            middle = (low + high) / 2
            low, high = (middle, high) if path.linear_time(middle) < target else (low, middle)
        times.append(high)
    return times


def _latents(request: Request) -> torch.Tensor | None:
    """Given initial noise as float32 [n, token, channel]; its sizes are checked against the model's later."""
    latents = request.latents
    if latents is None:
        return None
    if not isinstance(latents, torch.Tensor) or latents.ndim not in (2, 3) or not latents.isfinite().all():
        raise RequestError("latents: they must be a finite tensor of shape [token, channel] or [n, token, channel]")
    return latents.detach().float().reshape(-1, *latents.shape[-2:])


def _whole_request(request: Request, traits: Traits) -> Request:
    """The request with what it leaves to the method and the model."""
    given = {"steps": traits.steps, **methods.defaults(request.method)}
    return replace(request, **{name: value for name, value in given.items() if getattr(request, name) is None})


def plan(request: Request, traits: Traits | None = None, preview: bool = False) -> Plan:
    """Checks a request, but for what depends on the model, and computes every coefficient it will need.

    `traits` are those of the model, by default those of any; `preview` says that particles will be judged on previews.

    Raises:
        RequestError: what was given, what is allowed, what to do.
    """
    if not isinstance(request.prompt, str) or not request.prompt.strip():
        raise RequestError(f"prompt={request.prompt!r}: it must be a sentence")
    traits = traits or Traits()
    request = _whole_request(request, traits)
    if request.nfe is None:
        request = replace(request, nfe=100)
    whole("nfe", request.nfe, 1), whole("finish", request.finish, 0)
    whole("seed", request.seed, -(2**63))
    if request.seed >= 2**63:
        raise RequestError(f"seed={request.seed!r}: it must be a whole number of 64 bits, below 2^63")
    number("guidance", request.guidance)
    whole("priority", request.priority, -(2**63))
    for name in ("height", "width"):
        if getattr(request, name) is not None:
            whole(name, getattr(request, name), 1)
    if not isinstance(request.options, Mapping):
        raise RequestError(
            f"options={request.options!r}: they must be a mapping of the method's option names to values"
        )
    reward = rewards.make(request.reward)
    assert request.interpolant is not None
    path, diffusion, times = interpolants.make(request.interpolant), sde.diffusion(request.diffusion), _grid(request)
    steps = _steps(path, times[:-1], diffusion, request.solver)
    if request.stop_at is not None:
        number("stop_at", request.stop_at)
    usual = 1 if request.finish else PREVIEW_FINALISTS if preview else 2
    finalists = usual if request.finalists is None else whole("finalists", request.finalists, 1)
    if (option := methods.trusts(request.method)) is not None:
        first = sum(step.tau > traits.trusted_from + 1e-9 for step in steps[:-1])
        request = replace(request, options={option: first, **request.options})
    made = Plan(request, reward, path, diffusion, tuple(steps), finalists, _latents(request), traits.trusted_from)
    made.search()  # a check
    held = methods.holds(request.method, whole("nfe", request.nfe, 1), len(steps), made.finish_nfe, **request.options)
    made = replace(made, held=held)
    title = methods.title(request.method)
    if methods.branches(request.method) and len(steps) > 1 and all(step.k == 0.0 for step in steps[1:]):
        raise RequestError(
            f"the method {title} branches, and under an ODE all children of a particle are the same: use one of "
            f"{', '.join(name for name in methods.names() if not methods.branches(name))}, or a diffusion above 0"
        )
    if methods.guided(request.method, request.options) and not rewards.differentiable(reward):
        usable = [name for name in rewards.names() if rewards.differentiable(rewards.make(name))]
        raise RequestError(
            f"the method {title} follows the gradient of the reward, and {reward.name} has none: use "
            f"{', '.join(usable)}, or a reward with the attribute `differentiable = True`"
        )
    return made
