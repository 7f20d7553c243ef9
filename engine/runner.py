"""Runs a packed batch: propose, forward, finish, decode, reward."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import kernels
from rollflow.errors import RequestError
from rollflow.models import FlowModel, Geometry
from rollflow.particle import Particle, ParticlePool
from rollflow.profile import Ledger
from rollflow.request import Plan
from rollflow.rewards import FunctionReward, Reward
from rollflow.scheduler import Row, Search, bucket_of

PADDING = -1


class Runner:
    """Executes batches of rows on a model.

    Args:
        model: the flow model.
        buckets: the batch sizes of a forward, ascending; a batch is padded up to the next.
        ledger: where rows and times are written.
    """

    def __init__(self, model: FlowModel, buckets: tuple[int, ...], ledger: Ledger):
        self.model, self.buckets, self.ledger = model, buckets, ledger

    def run(self, rows: list[Row]) -> list[float | None]:
        """See `rollflow.scheduler.Runner`; either all rows are guided or none is."""
        self.ledger.rows(rows, bucket_of(len(rows), self.buckets))
        if rows[0].kind == "guided":
            return self._run_guided(rows)
        with torch.no_grad():  # not inference mode: what a reward loads at its first call may later need gradients
            return self._run_plain(rows)

    def _run_plain(self, rows: list[Row]) -> list[float | None]:
        pool, geometry = rows[0].search.pool, rows[0].search.geometry
        x, child = self._propose(rows)
        u = self._velocity(rows, x)
        with self.ledger.span("finish"):
            posterior = self._table([(r.step.p, r.step.q) for r in rows], len(child))
            latents = self._finish(u, pool, child, posterior, geometry)
        return self._score(rows, latents)

    def _run_guided(self, rows: list[Row]) -> list[float | None]:
        """Also takes the gradient of the rewards through decoder and model, by which the particles' children move.

        The move of the posterior mean is that of `rollflow.particle.Guide`; `x0_hat = p x + q u` makes it one of `u`.
        The particle itself stays what was judged.
        """
        pool, geometry = rows[0].search.pool, rows[0].search.geometry
        with torch.no_grad():
            _, child = self._propose(rows)
        live = child[: len(rows)]
        column = partial(self._column, bucket=len(child))
        with torch.enable_grad():
            x = torch.zeros(len(child), geometry.token, geometry.channel, device=pool.x.device)
            x[: len(rows)] = pool.x[live]
            x.requires_grad_(True)
            u = self._velocity(rows, (x * column([1 / r.step.scale for r in rows])).to(self.model.dtype)).float()
            p, q = column([r.step.p for r in rows]), column([r.step.q for r in rows])
            latents = _unpack(p * x + q * u, geometry) / self.model.scaling + self.model.shift
            scores = self._score(rows, latents.to(self.model.dtype))
            with self.ledger.span("backward", self.model.device):
                cut = [row for row, score in zip(rows, scores, strict=True) if not isinstance(score, Tensor)]
                if cut:
                    raise RequestError(
                        f"the gradient of the reward {cut[0].search.plan.reward.name} does not reach the latents: "
                        "reward, decoder and model must be differentiable for a guided method"
                    )
                (gradient,) = torch.autograd.grad(torch.stack([score.cpu() for score in scores]).sum(), x)
        pool.u[live] = u.detach()[: len(rows)]
        for i, row in enumerate(rows):
            row.particle.shift = _move(row, gradient[i].detach()) / row.step.q
        return [score.item() for score in scores]

    def _propose(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """The model's input and the children's slots, both padded to the bucket."""
        pool, bucket = rows[0].search.pool, bucket_of(len(rows), self.buckets)
        with self.ledger.span("propose"):
            parent, child = self._slots(rows, bucket)
            coefficients = self._table([_coefficients(row) for row in rows], bucket)
            seed = self._integers([r.search.plan.request.seed for r in rows], bucket)
            key = self._integers([r.noise_key for r in rows], bucket)
            return kernels.propose(pool.x, pool.u, parent, child, coefficients, seed, key, self.model.dtype), child

    def _velocity(self, rows: list[Row], x: Tensor) -> Tensor:
        bucket = len(x)
        with self.ledger.span("forward", self.model.device):
            tau = self._table([(r.step.tau,) for r in rows], bucket, fill=1.0)[:, 0]
            guidance = self._table([(r.search.plan.request.guidance,) for r in rows], bucket)[:, 0]
            conditioning = [r.search.conditioning for r in rows]
            conditioning += [conditioning[0]] * (bucket - len(rows))
            return self.model.velocity(x, tau, conditioning, guidance, rows[0].search.geometry)

    def _slots(self, rows: list[Row], bucket: int) -> tuple[Tensor, Tensor]:
        """Parent and child slots; a prepared state is written to the child's slot, which is then its own parent."""
        parents = []
        for row in rows:
            slot, state = row.particle.slot.index, _prepared(row)
            if state is not None:
                row.search.pool.x[slot].copy_(state)
                parents.append(slot)
            else:
                parents.append(PADDING if row.parent is None else row.parent.slot.index)
        children = [row.particle.slot.index for row in rows]
        return self._integers(parents, bucket, PADDING), self._integers(children, bucket, PADDING)

    def _score(self, rows: list[Row], latents: Float[Tensor, "bucket channel height width"]) -> list[Any]:
        """Decodes and judges the rows that are scored, each by its request's reward: floats, scalars with gradients."""
        judged = [i for i, row in enumerate(rows) if row.scored]
        scores: list[Any] = [None] * len(rows)
        if not judged:
            return scores
        images = self._decode(latents if len(judged) == len(rows) else latents[judged], len(judged))
        with self.ledger.span("reward", self.model.device):
            for reward, group in _by_reward([rows[i].search.plan for i in judged]):
                values = self._judge(reward, images[group], [rows[judged[j]].search.plan.request.prompt for j in group])
                for j, value in zip(group, values if values.requires_grad else values.tolist(), strict=True):
                    scores[judged[j]] = value
        return scores

    def _judge(self, reward: Reward, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Tensor:
        """The rewards of a group; padded to a single bucket, so that a network's scores depend on no other row."""
        missing = self.buckets[-1] - len(prompts) if len(self.buckets) == 1 else 0
        if missing <= 0:
            return reward(images, prompts)
        padded = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        return reward(padded, prompts + prompts[:1] * missing)[: len(prompts)]

    def _decode(self, latents: Tensor, count: int) -> Float[Tensor, "row 3 height width"]:
        """The first `count` latents as images, padded to a bucket so that a row's pixels depend on the bucket alone."""
        bucket = bucket_of(count, self.buckets)
        latents = latents[:bucket]
        if len(latents) < bucket:
            latents = torch.cat([latents, latents.new_zeros(bucket - len(latents), *latents.shape[1:])])
        with self.ledger.span("decode", self.model.device):
            return self.model.decode(latents)[:count]

    @torch.no_grad()
    def image(self, particle: Particle, search: Search) -> Float[Tensor, "3 height width"]:
        """The posterior mean of an evaluated particle, decoded."""
        bucket, pool, step = self.buckets[0], search.pool, particle.arrival
        slots = self._integers([particle.slot.index], bucket, PADDING)
        posterior = self._table([(step.p, step.q)], bucket)
        return self._decode(self._finish(pool.u[slots.clamp(min=0)], pool, slots, posterior, search.geometry), 1)[0]

    def _finish(self, u: Tensor, pool: ParticlePool, slots: Tensor, posterior: Tensor, geometry: Geometry) -> Tensor:
        return kernels.finish(
            u,
            pool.x,
            pool.u,
            slots,
            posterior,
            geometry.latent_height,
            geometry.latent_width,
            self.model.scaling,
            self.model.shift,
            self.model.dtype,
        )

    def _integers(self, values: list[int], bucket: int, fill: int = 0) -> Tensor:
        values = values + [fill] * (bucket - len(values))
        return torch.tensor(values, dtype=torch.int64).to(self.model.device, non_blocking=True)

    def _column(self, values: list[float], bucket: int) -> Float[Tensor, "bucket 1 1"]:
        return self._table([(value,) for value in values], bucket)[:, :, None]

    def _table(self, rows: list[tuple[float, ...]], bucket: int, fill: float = 0.0) -> Float[Tensor, "bucket column"]:
        rows = rows + [(fill,) * len(rows[0])] * (bucket - len(rows))
        return torch.tensor(rows, dtype=torch.float32).to(self.model.device, non_blocking=True)


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


def _prepared(row: Row) -> Tensor | None:
    """The child's state where it takes more than one parent's x and u and fresh noise z: given latents and mixtures."""
    latents = _given(row)
    if latents is not None:
        return latents * row.step.k
    if row.parent is not None and row.parent.shift is not None:
        return _guided(row)
    return _rotated(row) if _composed(row) else None


def _rotated(row: Row) -> Float[Tensor, "token channel"]:
    """The move "rotate" of `rollflow.particle.Draw`, with `mix` and `coarse`."""
    pool, asked, step = row.search.pool, row.asked, row.step
    assert asked is not None and row.parent is not None
    source = x = pool.x[row.parent.slot.index]
    if asked.mix:
        source = x + pool.x[[cast("Particle", other).slot.index for other in asked.mix]].sum(0)
        band = _patch_means if asked.coarse else torch.Tensor.clone  # what turns, and has the norm of noise
        source = source * (band(x).norm() / band(source).norm())
    rotated = step.a * source + step.k * _noise(row)
    return x + _patch_means(rotated - x) if asked.coarse else rotated


def _patch_means(x: Float[Tensor, "token channel"]) -> Float[Tensor, "token channel"]:
    """The mean of each 2x2 patch in place of its four elements; a token is one patch of channel / 4 latent channels."""
    patches = x.view(len(x), -1, 4)
    return patches.mean(2, keepdim=True).expand_as(patches).reshape(x.shape)


def _coefficients(row: Row) -> tuple[float, float, float, float]:
    """(a, b, k, 1 / scale) of propose; a prepared state is the child already."""
    step = row.step
    prepared = _given(row) is not None or _composed(row) or (row.parent is not None and row.parent.shift is not None)
    a, b, k = (1.0, 0.0, 0.0) if prepared else (step.a, step.b, step.k)
    return a, b, k, 1 / step.scale


def _move(row: Row, gradient: Float[Tensor, "token channel"]) -> Float[Tensor, "token channel"]:
    """How far the reward's gradient moves the posterior mean; see `rollflow.particle.Guide`."""
    assert row.asked is not None and row.asked.guide is not None
    guide, path, time = row.asked.guide, row.search.plan.path, row.step.time
    if path.alpha(time) == 0.0:
        return torch.zeros_like(gradient)
    move = guide.scale * path.sigma(time) ** 2 / path.alpha(time) * gradient
    size = move.square().mean().sqrt()
    if not size.isfinite():
        row.search.invalid += 1
    if not size.isfinite() or size == 0:
        return torch.zeros_like(gradient)
    if guide.normalised:
        move, size = move * (guide.scale / size), size.new_tensor(guide.scale)
    return move if guide.clip is None else move * (guide.clip / size).clamp(max=1)


def _unpack(
    x0: Float[Tensor, "row token channel"], geometry: Geometry
) -> Float[Tensor, "row latent latent_height latent_width"]:
    """Tokens, which are 2x2 patches, laid out as latent images."""
    patches = x0.view(len(x0), geometry.latent_height // 2, geometry.latent_width // 2, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x0), -1, geometry.latent_height, geometry.latent_width)


def _by_reward(plans: list[Plan]) -> Iterable[tuple[Reward, list[int]]]:
    """Rows grouped by reward, so that each reward is called once a batch: (reward, row indices)."""
    groups: dict[int, tuple[Reward, list[int]]] = {}
    for i, plan in enumerate(plans):
        judge = plan.reward.function if isinstance(plan.reward, FunctionReward) else plan.reward
        groups.setdefault(id(judge), (plan.reward, []))[1].append(i)
    return groups.values()
