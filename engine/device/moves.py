"""States that take more than a parent's x and u and fresh noise: given latents, mixtures, children of guided ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rollflow import kernels
from rollflow.copies import upload
from rollflow.device.storage import Storage
from rollflow.draw import Guide
from rollflow.models import Geometry
from rollflow.models.layout import LatentMap
from rollflow.row import NONE, Brief, Row, Start

KNOWN = 2**62  # the noise key of what a request keeps of its image; those of its rows are smaller


def prepared(row: Row, storage: Storage, layout: LatentMap) -> Float[Tensor, "token channel"] | None:
    """The child's state where it takes more than one parent's x and u and fresh noise z; None for all others."""
    start, state = row.brief.start, None
    if row.parent == NONE and (row.given is not None or start is not None):
        state = _started(row, storage)
    elif row.moved and row.kind != "finish":  # steps of the finish start from the particle as it was judged
        state = _moved(row, storage)
    elif row.mixture is not None:
        state = _rotated(row, storage, layout)
    if start is None or start.keep is None:
        return state
    return torch.lerp(_stepped(row, storage) if state is None else state, _known(row, start, storage), start.keep)


def kept(latents: Float[Tensor, "row ..."], briefs: Sequence[Brief]) -> Float[Tensor, "row ..."]:
    """Latents with what requests keep of their images; differentiable."""
    starts = {i: brief.start for i, brief in enumerate(briefs) if brief.start is not None}
    if not any(start.keep is not None for start in starts.values()):
        return latents
    keep, known = torch.zeros_like(latents), torch.zeros_like(latents)
    for i, start in starts.items():
        if start.latents is not None and start.latents_keep is not None:
            keep[i], known[i] = start.latents_keep.to(keep), start.latents.to(known)
    return torch.lerp(latents, known, keep)


def started(model: Any, image: Tensor, mask: Tensor | None, geometry: Geometry) -> Start:
    """What a search starts from, of an image and a mask [height, width], 1 where it is drawn anew; on a lane.

    As pipelines of inpainting have it, the mask is sampled at the latents' pixels (nearest).
    """
    with torch.no_grad():
        state = model.state(image, geometry).reshape(geometry.token, geometry.channel).float()
        if mask is None:
            return Start(state)
        layout, latents = model.layout, model.layout.decodable(state[None], geometry)[0]
        keep = upload(1 - (mask >= 0.5).float(), state.device)
        keep = torch.nn.functional.interpolate(keep[None, None], size=latents.shape[-2:])[0, 0]
        wide = keep.expand(latents.shape).contiguous()
        return Start(state, layout.stated(wide, geometry), latents, wide)


def _stepped(row: Row, storage: Storage) -> Float[Tensor, "token channel"]:
    """A plain step, or a sample of the prior."""
    step, parent = row.step, row.parent
    state = torch.zeros_like(storage.x[row.slot])
    if parent != NONE:
        state = step.a * storage.x[parent] + step.b * storage.u[parent]
    return state + step.k * _noise(row, storage) if step.k else state


def _known(row: Row, start: Start, storage: Storage) -> Float[Tensor, "token channel"]:
    """The image at the row's time, with noise that is the same for all of the request: given noise, if there is any."""
    brief, step, x = row.brief, row.step, storage.x
    given = brief.latents
    noise = _drawn(brief.seed, KNOWN, storage) if given is None else upload(given[0], x.device)
    return step.scale * ((1 - step.tau) * start.state + step.tau * noise)


def _started(row: Row, storage: Storage) -> Float[Tensor, "token channel"]:
    """A sample of the prior: given noise or that of its key, and of a start from an image also that; `k` is sigma."""
    brief, step = row.brief, row.step
    given = None if row.given is None or brief.latents is None else brief.latents[row.given]
    noise = _noise(row, storage) if given is None else upload(given, storage.x.device)
    return step.k * noise if brief.start is None else (step.scale - step.k) * brief.start.state + step.k * noise


def _noise(row: Row, storage: Storage) -> Float[Tensor, "token channel"]:
    return _drawn(row.brief.seed, row.key, storage)


def _drawn(seed: int, key: int, storage: Storage) -> Float[Tensor, "token channel"]:
    x = storage.x
    seeds, keys = (torch.full((1,), value, device=x.device) for value in (seed, key))  # filled there, not copied
    return kernels.noise(seeds, keys, *x.shape[1:])[0]


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
        source = x + torch.stack([storage.x[other] for other in others]).sum(0)  # a list would be copied there
        lengths = [one.norm() for one in (band(x), band(source))]  # of what turns, and has the norm of noise
        source = source * (lengths[0] / lengths[1])
    rotated = step.a * source + step.k * _noise(row, storage)
    return x + layout.coarse(rotated - x, geometry) if coarse else rotated


def guided(
    guide: Guide, reach: float, gradient: Float[Tensor, "token channel"]
) -> tuple[Float[Tensor, "token channel"], Bool[Tensor, ""]]:
    """How far the reward's gradient moves the posterior mean, see `rollflow.draw.Guide`; whether it was a number.

    Both stay where the gradient is: nothing waits for the device.

    Args:
        guide: what was asked.
        reach: `sigma^2 / alpha` at the particle's time; 0 where there is nothing but noise, and nothing moves.
        gradient: of the reward with respect to the state.
    """
    if reach == 0.0:
        return torch.zeros_like(gradient), torch.ones((), dtype=torch.bool, device=gradient.device)
    move = guide.scale * reach * gradient
    size = move.square().mean().sqrt()
    valid = size.isfinite()
    still = ~valid | (size == 0)
    if guide.normalised:
        move, size = move * (guide.scale / size), torch.full_like(size, guide.scale)
    if guide.clip is not None:
        move = move * (guide.clip / size).clamp(max=1)
    return move.masked_fill(still, 0.0), valid
