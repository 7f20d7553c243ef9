"""States that take more than a parent's x and u and fresh noise: given latents, mixtures, children of guided ones."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import kernels
from rollflow.device.storage import Storage
from rollflow.draw import Guide
from rollflow.models.layout import LatentMap
from rollflow.row import NONE, Row


def prepared(row: Row, storage: Storage, layout: LatentMap) -> Float[Tensor, "token channel"] | None:
    """The child's state where it takes more than one parent's x and u and fresh noise z; None for all others."""
    if row.parent == NONE and (row.given is not None or row.brief.start is not None):
        return _started(row, storage)
    if row.moved and row.kind != "finish":  # steps of the finish start from the particle as it was judged
        return _moved(row, storage)
    return _rotated(row, storage, layout) if row.mixture is not None else None


def _started(row: Row, storage: Storage) -> Float[Tensor, "token channel"]:
    """A sample of the prior: given noise or that of its key, and of a start from an image also that; `k` is sigma."""
    brief, step = row.brief, row.step
    given = None if row.given is None or brief.latents is None else brief.latents[row.given]
    noise = _noise(row, storage) if given is None else given.to(storage.x.device)
    return step.k * noise if brief.start is None else (step.scale - step.k) * brief.start + step.k * noise


def _noise(row: Row, storage: Storage) -> Float[Tensor, "token channel"]:
    x = storage.x
    seed, key = (torch.tensor([value], device=x.device) for value in (row.brief.seed, row.key))
    return kernels.noise(seed, key, *x.shape[1:])[0]


def _moved(row: Row, storage: Storage) -> Float[Tensor, "token channel"]:
    """A step from a guided particle: its velocity is moved by the reward's gradient."""
    step, parent = row.step, row.parent
    state = step.a * storage.x[parent] + step.b * (storage.u[parent] + storage.move[parent])
    return state + step.k * _noise(row, storage) if step.k else state


def _rotated(row: Row, storage: Storage, layout: LatentMap) -> Float[Tensor, "token channel"]:
    """The move "rotate" of `rollflow.draw.Draw`, with `mix` and `coarse`."""
    assert row.mixture is not None
    step, (others, coarse) = row.step, row.mixture
    source = x = storage.x[row.parent]
    geometry = row.brief.geometry

    def band(one: Tensor) -> Tensor:
        return layout.coarse(one, geometry) if coarse else one

    if others:
        source = x + storage.x[list(others)].sum(0)
        lengths = [one.norm() for one in (band(x), band(source))]  # of what turns, and has the norm of noise
        source = source * (lengths[0] / lengths[1])
    rotated = step.a * source + step.k * _noise(row, storage)
    return x + layout.coarse(rotated - x, geometry) if coarse else rotated


def guided(
    guide: Guide, reach: float, gradient: Float[Tensor, "token channel"]
) -> tuple[Float[Tensor, "token channel"], bool]:
    """How far the reward's gradient moves the posterior mean, see `rollflow.draw.Guide`; whether it was a number.

    Args:
        guide: what was asked.
        reach: `sigma^2 / alpha` at the particle's time; 0 where there is nothing but noise, and nothing moves.
        gradient: of the reward with respect to the state.
    """
    if reach == 0.0:
        return torch.zeros_like(gradient), True
    move = guide.scale * reach * gradient
    size = move.square().mean().sqrt()
    if not size.isfinite() or size == 0:
        return torch.zeros_like(gradient), bool(size.isfinite())
    if guide.normalised:
        move, size = move * (guide.scale / size), size.new_tensor(guide.scale)
    return (move if guide.clip is None else move * (guide.clip / size).clamp(max=1)), True
