"""Runs a packed batch: propose, forward, finish, decode, reward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import kernels
from rollflow.models import FlowModel, Geometry
from rollflow.particle import Particle, ParticlePool
from rollflow.profile import Ledger
from rollflow.request import Plan, Step
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

    @torch.inference_mode()
    def run(self, rows: list[Row]) -> list[float | None]:
        """See `rollflow.scheduler.Runner`."""
        geometry, pool = rows[0].search.geometry, rows[0].search.pool
        bucket = bucket_of(len(rows), self.buckets)
        self.ledger.rows(rows, bucket)
        with self.ledger.span("propose"):
            parent, child = self._slots(rows, bucket)
            coefficients = self._table([_coefficients(row) for row in rows], bucket)
            seed = self._integers([r.search.plan.request.seed for r in rows], bucket)
            key = self._integers([r.noise_key for r in rows], bucket)
            x = kernels.propose(pool.x, pool.u, parent, child, coefficients, seed, key, self.model.dtype)
        with self.ledger.span("forward", self.model.device):
            tau = self._table([(r.step.tau,) for r in rows], bucket, fill=1.0)[:, 0]
            guidance = self._table([(r.search.plan.request.guidance,) for r in rows], bucket)[:, 0]
            conditioning = [r.search.conditioning for r in rows]
            conditioning += [conditioning[0]] * (bucket - len(rows))
            u = self.model.velocity(x, tau, conditioning, guidance, geometry)
        with self.ledger.span("finish"):
            posterior = self._table([(r.step.p, r.step.q) for r in rows], bucket)
            latents = self._finish(u, pool, child, posterior, geometry)
        return self._score(rows, latents)

    def _slots(self, rows: list[Row], bucket: int) -> tuple[Tensor, Tensor]:
        """Parent and child slots; given latents are written to the child's slot, which is then its own parent."""
        parents = []
        for row in rows:
            slot, latents = row.particle.slot.index, _given(row)
            if latents is not None:
                row.search.pool.x[slot].copy_(latents)
                parents.append(slot)
            else:
                parents.append(PADDING if row.parent is None else row.parent.slot.index)
        children = [row.particle.slot.index for row in rows]
        return self._integers(parents, bucket, PADDING), self._integers(children, bucket, PADDING)

    def _score(self, rows: list[Row], latents: Float[Tensor, "bucket channel height width"]) -> list[float | None]:
        """Decodes and judges the rows that are scored, each by its request's reward."""
        judged = [i for i, row in enumerate(rows) if row.scored]
        scores: list[float | None] = [None] * len(rows)
        if not judged:
            return scores
        images = self._decode(latents if len(judged) == len(rows) else latents[judged], len(judged))
        with self.ledger.span("reward", self.model.device):
            for reward, group in _by_reward([rows[i].search.plan for i in judged]):
                values = self._judge(reward, images[group], [rows[judged[j]].search.plan.request.prompt for j in group])
                for j, value in zip(group, values.tolist(), strict=True):
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

    @torch.inference_mode()
    def image(self, particle: Particle, search: Search) -> Float[Tensor, "3 height width"]:
        """The posterior mean of an evaluated particle, decoded."""
        bucket, pool, step = self.buckets[0], search.pool, _step_of(search.plan, particle)
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

    def _table(self, rows: list[tuple[float, ...]], bucket: int, fill: float = 0.0) -> Float[Tensor, "bucket column"]:
        rows = rows + [(fill,) * len(rows[0])] * (bucket - len(rows))
        return torch.tensor(rows, dtype=torch.float32).to(self.model.device, non_blocking=True)


def _given(row: Row) -> Tensor | None:
    """The latents that the request gives for this row, if it is one of the first samples of the prior."""
    latents = row.search.plan.latents
    return latents[row.prior] if latents is not None and row.prior is not None and row.prior < len(latents) else None


def _coefficients(row: Row) -> tuple[float, float, float, float]:
    """(a, b, k, 1 / scale) of propose; given latents take the place of the prior's noise z."""
    step = row.step
    a, b, k = (step.k, 0.0, 0.0) if _given(row) is not None else (step.a, step.b, step.k)
    return a, b, k, 1 / step.scale


def _step_of(plan: Plan, particle: Particle) -> Step:
    """The step at which a particle was evaluated."""
    return (plan.steps + plan.finish)[particle.step]


def _by_reward(plans: list[Plan]) -> Iterable[tuple[Reward, list[int]]]:
    """Rows grouped by reward, so that each reward is called once a batch: (reward, row indices)."""
    groups: dict[int, tuple[Reward, list[int]]] = {}
    for i, plan in enumerate(plans):
        judge = plan.reward.function if isinstance(plan.reward, FunctionReward) else plan.reward
        groups.setdefault(id(judge), (plan.reward, []))[1].append(i)
    return groups.values()
