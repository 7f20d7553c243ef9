"""States that take more than a parent's x and u and fresh noise: given latents, mixtures, children of guided ones."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import kernels
from rollflow.models.layout import Layout
from rollflow.search.particle import Particle
from rollflow.search.search import Row


def _given(row: Row) -> Tensor | None:
    """The latents that the request gives for this row, if it is one of the first samples of the prior."""
    latents = row.search.plan.latents
    return latents[row.prior] if latents is not None and row.prior is not None and row.prior < len(latents) else None


def _composed(row: Row) -> bool:
    """Whether the row's state is made of more than one particle's state and noise."""
    return row.asked is not None and (bool(row.asked.mix) or row.asked.coarse)


def _noise(row: Row) -> Float[Tensor, "token channel"]:
    x = row.search.pool.x
    seed, key = (torch.tensor([v], device=x.device) for v in (row.search.plan.request.seed, row.noise_key))
    return kernels.noise(seed, key, *x.shape[1:])[0]


def _guided(row: Row) -> Float[Tensor, "token channel"]:
    """A step from a guided particle: its velocity is moved by the reward's gradient, but for steps of the finish."""
    pool, step = row.search.pool, row.step
    assert row.parent is not None and row.parent.shift is not None
    slot, u = row.parent.slot.index, pool.u[row.parent.slot.index]
    if row.kind != "finish":
        u = u + row.parent.shift
    state = step.a * pool.x[slot] + step.b * u
    return state + step.k * _noise(row) if step.k else state


def prepared(row: Row, layout: Layout) -> Tensor | None:
    """The child's state where it takes more than one parent's x and u and fresh noise z: given latents and mixtures."""
    latents = _given(row)
    if latents is not None:
        return latents * row.step.k
    if row.parent is not None and row.parent.shift is not None:
        return _guided(row)
    return _rotated(row, layout) if _composed(row) else None


def _rotated(row: Row, layout: Layout) -> Float[Tensor, "token channel"]:
    """The move "rotate" of `rollflow.draw.Draw`, with `mix` and `coarse`."""
    pool, asked, step = row.search.pool, row.asked, row.step
    assert asked is not None and row.parent is not None
    source = x = pool.x[row.parent.slot.index]
    if asked.mix:
        source = x + pool.x[[cast("Particle", other).slot.index for other in asked.mix]].sum(0)
        band = layout.patch_means if asked.coarse else torch.Tensor.clone  # what turns, and has the norm of noise
        source = source * (band(x).norm() / band(source).norm())
    rotated = step.a * source + step.k * _noise(row)
    return x + layout.patch_means(rotated - x) if asked.coarse else rotated


def coefficients(row: Row) -> tuple[float, float, float, float]:
    """(a, b, k, 1 / scale) of propose; a prepared state is the child already."""
    step = row.step
    prepared = _given(row) is not None or _composed(row) or (row.parent is not None and row.parent.shift is not None)
    a, b, k = (1.0, 0.0, 0.0) if prepared else (step.a, step.b, step.k)
    return a, b, k, 1 / step.scale


def move(row: Row, gradient: Float[Tensor, "token channel"]) -> Float[Tensor, "token channel"]:
    """How far the reward's gradient moves the posterior mean; see `rollflow.draw.Guide`."""
    assert row.asked is not None and row.asked.guide is not None
    guide, path, time = row.asked.guide, row.search.plan.path, row.step.time
    if path.alpha(time) == 0.0:
        return torch.zeros_like(gradient)
    move = guide.scale * path.sigma(time) ** 2 / path.alpha(time) * gradient
    size = move.square().mean().sqrt()
    if not size.isfinite():
        row.invalid = True
    if not size.isfinite() or size == 0:
        return torch.zeros_like(gradient)
    if guide.normalised:
        move, size = move * (guide.scale / size), size.new_tensor(guide.scale)
    return move if guide.clip is None else move * (guide.clip / size).clamp(max=1)
