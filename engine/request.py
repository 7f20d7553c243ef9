"""What a caller asks for and what he gets back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from rollflow import interpolant as interpolants
from rollflow import methods, rewards, sde
from rollflow.errors import RequestError
from rollflow.methods.budget import number, whole
from rollflow.models import Traits
from rollflow.particle import Draw

PREVIEW_FINALISTS = 8


@dataclass(frozen=True)
class Request:
    """One search: the best image for `prompt` by `reward` within `nfe` function evaluations.

    Where `steps`, `interpolant`, `grid` or `diffusion` is None, it is what suits the method: the model's own ODE
    ("linear", 0, "uniform", and as many steps as suit the model) for methods that do not branch, and the paper's SDE
    ("vp", 3, "paper", 10 steps) for those that do; see `rollflow.methods.defaults`.

    Attributes:
        prompt: what the image should show.
        reward: a name (`rollflow.rewards.names()`), a `Reward`, or a function `f(images, prompts) -> scores` of images
            `[row, 3, height, width]` in [0, 1].
        method: a name of `rollflow.methods.names()`, or a function that makes a search, see `rollflow.methods.make`.
        nfe: the whole budget, finish included; an NFE is one velocity evaluation of one particle.
        steps: points of the time grid that are evaluated.
        interpolant: the path that the particles follow, a name or an `Interpolant`.
        seed: of all noise of this request, any whole number of 64 bits.
        grid: kind of time grid, see `rollflow.sde.time_grid`; `shift` is for the kind "shifted".
        times: an explicit grid in place of `steps` and `grid`: decreasing times in (0, 1]; a last 0 may be left out.
            A search starts at the first from noise alone, so that a first time well below 1 is for given `latents`.
        diffusion: `g(t)` of the SDE: a `rollflow.sde` diffusion, a function of t, or a scale s for the paper's
            `g = s t^2`; 0 is the ODE.
        solver: "euler" (Euler-Maruyama) or "cps" (coefficient-preserving, arXiv 2509.05952).
        finish: deterministic steps from the chosen particle towards t = 0, paid out of `nfe`. Without one the image is
            the posterior mean at the last point of the grid (linear time 0.71 on the paper's VP grid), which is what
            the reward judged: sharp for a few-step model, blurred for others.
        finalists: how many particles compete in the end: the one that the method chose and the best others that were
            judged at any point of the grid, each finished at `finish` evaluations out of `nfe`; the best final reward
            wins, on ties the least noisy one. Only those count that were judged where rewards can be trusted, see
            `rollflow.models.Traits`. 1 takes the method's choice (as published). By default 2 without a finish, where
            it costs nothing (8 where particles are judged on previews, which the full decoder may correct), and 1 with
            one.
        stop_at: a reward that is good enough: the first particle that reaches it, where rewards can be trusted, ends
            the search, and the rest of the budget is not spent. A finish may still better it.
        latents: initial noise of unit variance, `[token, channel]` for the first sample of the prior or
            `[n, token, channel]` for the first n; further samples come from the seed.
        priority: requests of a higher one go first where they compete for the device; it changes no result.
        guidance: embedded guidance scale of guidance-distilled models (FLUX.1-dev); others ignore it.
        height, width: image size in pixels; by default the model's own.
        options: the method's own options, such as `{"initial": 25}` for rbf.
    """

    prompt: str
    reward: Any = "count"
    method: str | Callable[..., methods.Search] = "sprout"
    nfe: int = 100
    steps: int | None = None
    interpolant: str | interpolants.Interpolant | None = None
    seed: int = 0
    grid: str | None = None
    shift: float = 3.0
    times: Sequence[float] | None = None
    diffusion: Any = None
    solver: str = "euler"
    finish: int = 0
    finalists: int | None = None
    stop_at: float | None = None
    latents: torch.Tensor | None = None
    priority: int = 0
    guidance: float = 3.5
    height: int | None = None
    width: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


Kind = Literal["committed", "guided", "finish"]


@dataclass(frozen=True, slots=True)
class Record:
    """One evaluated particle of a request's history.

    `level` is its point of the time grid (finish steps count on from the last), `time` the interpolant's time there,
    `parent` the index of its parent's record, `kind` why the row was run, `nfe` what it was charged. `reward` is None
    for a particle that was not judged.
    """

    index: int
    level: int
    time: float
    reward: float | None
    parent: int | None
    kind: Kind
    nfe: int = 1


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        image: the chosen image; `reward` and `held_out` are its scores, as an 8-bit image.
        pixels: the same before rounding to 8 bits, float32 [3, height, width] in [0, 1], on the CPU.
        reward: the reward's score.
        held_out: the score of the reward's held-out judge, which no search sees; None if the reward has none.
        committed_nfe: function evaluations that the algorithm was charged for: as many as asked, unless `stop_at` ended
            the search.
        executed_nfe: what the device ran for this request, its share of padding included; a row counts as much as it is
            charged.
        invalid_rewards: how many particles had a reward that is no finite number, and count as worst, or a gradient
            that is none, and were not guided.
        history: a record for each evaluated particle, in the order of evaluation.
        seconds: wall time from admission to the end.
        request: what was asked.
    """

    image: Image.Image
    pixels: torch.Tensor
    reward: float
    held_out: float | None
    committed_nfe: int
    executed_nfe: int
    invalid_rewards: int
    history: list[Record]
    seconds: float
    request: Request

    @property
    def unspent_nfe(self) -> int:
        """What `stop_at` saved of the budget."""
        return self.request.nfe - self.committed_nfe


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


@dataclass(frozen=True)
class Plan:
    """A checked request: its interpolant, its grid and the affine coefficients of each step.

    `steps` are the points of the grid, each as reached from the one before (the first: from nothing).
    """

    request: Request
    reward: rewards.Reward
    path: interpolants.Interpolant
    diffusion: sde.Diffusion
    steps: tuple[Step, ...]
    finalists: int
    latents: torch.Tensor | None
    trusted_from: float
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
        """The coefficients of one of the draw's children; see `rollflow.particle.Draw.move`."""
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
    if methods.prunes(request.method):
        first = sum(step.tau > traits.trusted_from + 1e-9 for step in steps[:-1])
        request = replace(request, options={"first": first, **request.options})
    made = Plan(request, reward, path, diffusion, tuple(steps), finalists, _latents(request), traits.trusted_from)
    made.search()  # a check
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
