"""Runs packed batches on a model: propose, forward, finish and decode on a lane, rewards beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rollflow import kernels, rewards
from rollflow.device.cuda_graphs import Capture, Graphs
from rollflow.device.moves import coefficients, move, prepared
from rollflow.device.workers import Lanes, Locks
from rollflow.errors import RequestError
from rollflow.models import FlowModel, Geometry
from rollflow.profile.ledger import Ledger
from rollflow.rewards import FunctionReward, Reward
from rollflow.schedule.cost import CostModel
from rollflow.schedule.pool import ParticlePool
from rollflow.schedule.scheduler import Outcome, Report
from rollflow.search.particle import Particle
from rollflow.search.search import Row, Search

PADDING = -1
Reporter = Callable[[Report], None]
Part = tuple[list[Any], Reward, Callable[[], Sequence[Any]]]  # of a batch: what is judged, by whom, and how


class Tables(NamedTuple):
    """What a batch tells the device of its rows, padded to the bucket, in two transfers.

    `integers` are parent and child slots, seeds and noise keys; `floats` the coefficients of propose (4 a row) and of
    the posterior mean (2), then linear times and guidance scales.
    """

    integers: Tensor
    floats: Tensor

    @property
    def rows(self) -> int:
        return self.integers.shape[1]

    @property
    def coefficients(self) -> Tensor:
        return self.floats[: 4 * self.rows].view(self.rows, 4)

    @property
    def posterior(self) -> Tensor:
        return self.floats[4 * self.rows : 6 * self.rows].view(self.rows, 2)

    @property
    def tau(self) -> Tensor:
        return self.floats[6 * self.rows : 7 * self.rows]

    @property
    def guidance(self) -> Tensor:
        return self.floats[7 * self.rows :]


class Runner:
    """Executes batches of rows on a model; see `rollflow.schedule.scheduler.Runner`.

    Args:
        model: the flow model.
        buckets: the batch sizes of a forward, ascending; a batch is padded up to the next.
        ledger: where rows and times are written.
        lanes: the threads that work.
        preview: judge particles on the model's light decoder; what is returned is decoded in full.
    """

    def __init__(self, model: FlowModel, buckets: tuple[int, ...], ledger: Ledger, lanes: Lanes, preview: bool = False):
        self.model, self.buckets, self.ledger = model, buckets, ledger
        self._affine = model.layout.affine(model.device)  # held: graphs keep their addresses
        self.preview = preview
        self.use(lanes)
        self.costs: dict[Geometry, CostModel] = {}
        self.graphs: dict[Geometry, Graphs] = {}
        self._assumed = CostModel.assumed(buckets)
        self._locks = Locks()
        on_gpu = model.device.type == "cuda"
        self._side: Any = torch.cuda.Stream(model.device) if on_gpu else None  # decodes
        self._judging: Any = torch.cuda.Stream(model.device) if on_gpu else None

    def use(self, lanes: Lanes) -> None:
        """Works on these threads from now on; no batch may be on its way."""
        self.threads, self.lanes, self.parallel = lanes, lanes.count, lanes.parallel

    def cost(self, geometry: Geometry, guided: bool) -> CostModel:
        """See `rollflow.schedule.scheduler.Runner`."""
        return self.costs.get(geometry, self._assumed)

    def record(
        self,
        geometry: Geometry,
        buckets: Iterable[int],
        pool: ParticlePool,
        conditioning: Any,
        capture: Capture | None = None,
    ) -> None:
        """Captures the step of every bucket of an image size as a CUDA graph; on a lane, before its first batch.

        Args:
            geometry: of the batches.
            buckets: their sizes.
            pool: the one pool that its particles live in.
            conditioning: of any prompt.
            capture: see `Graphs`.
        """

        def step(integers: Tensor, floats: Tensor, *collated: Tensor) -> Tensor:
            tables = Tables(integers, floats)
            x = self._propose(tables, pool)
            u = self.model.forward(x, tables.tau, collated, tables.guidance, geometry)  # type: ignore[attr-defined]
            return self._finish(u, pool, integers[1], tables.posterior, geometry)

        graphs = Graphs(step, capture)
        graphs.record(buckets, partial(self._padding, conditioning))
        self.graphs[geometry] = graphs

    def replay(self, geometry: Geometry, conditioning: Any, bucket: int) -> Tensor:
        """A batch of padding by its graph, for what it costs."""
        return self.graphs[geometry].run(*self._padding(conditioning, bucket))

    def _padding(self, conditioning: Any, bucket: int) -> tuple[Tensor, ...]:
        tables = Tables(
            torch.full((4, bucket), PADDING, device=self.model.device),
            torch.zeros(8 * bucket, device=self.model.device),
        )
        tables.tau.fill_(1.0)
        return *tables, *self.model.collate([conditioning] * bucket)  # type: ignore[attr-defined]

    def submit(self, rows: list[Row], report: Reporter) -> None:
        """See `rollflow.schedule.scheduler.Runner`."""
        self.ledger.rows(rows, self._bucket(len(rows), rows[0].search.geometry))
        self.threads.run(_reporting, partial(self._run, rows), rows, report)

    def submit_images(self, searches: list[Search], report: Reporter) -> None:
        """See `rollflow.schedule.scheduler.Runner`."""
        self.threads.run(_reporting, partial(self._run_images, searches), searches, report)

    def _run(self, rows: list[Row], report: Reporter) -> None:
        if rows[0].kind == "guided":
            scores = self._run_guided(rows)
            report(Report([]))
            report(Report(rows, scores))
            return
        with torch.no_grad():  # not inference mode: what a reward loads at its first call may later need gradients
            latents = self._evaluate(rows)
            judged = [row for row in rows if row.scored]
            unjudged = [row for row in rows if not row.scored]
            if not judged:
                report(Report([]))
                report(Report(rows, [None] * len(rows)))
                return
            if unjudged:
                latents = latents[self._places([i for i, row in enumerate(rows) if row.scored])]
            with self._beside(latents):
                images = self._decode(latents, len(judged), rows[0])
        parts: list[Part] = []
        for reward, group in _grouped([row.search.plan.reward for row in judged]):
            part = [judged[i] for i in group]
            parts.append((part, reward, partial(self._judge_rows, part, reward, images, group)))
        if unjudged:  # only now: until here, an error is one of all rows
            report(Report(unjudged, [None] * len(unjudged)))
        self._hand_over(parts, images, report)

    def _hand_over(self, parts: Sequence[Part], images: Tensor, report: Reporter) -> None:
        """Frees the lane, and lets judges' threads do the rest, each reward's on its own: it may take its time."""
        done = None
        if self._side is not None:  # the lane is free when the images are there
            done = torch.cuda.Event()
            done.record(self._side)
            images.record_stream(self._judging)
            self.threads.watch(_when, done, report)
        else:
            report(Report([]))

        def judge(work: list[Any], judging: Callable[[], Sequence[Any]]) -> None:
            apart = nullcontext() if done is None else torch.cuda.stream(self._judging)  # not behind the next decode
            try:
                if done is not None:
                    done.synchronize()
                with torch.no_grad(), apart:
                    results = judging()
            except BaseException as error:
                report(Report(work, error=error))
            else:
                report(Report(work, results))

        for work, reward, judging in parts:
            judged = _called(reward)
            alone = None if getattr(judged, "concurrent", False) else judged
            self.threads.judge(judge, work, judging, one_at_a_time=alone)

    def _beside(self, *used: Tensor) -> AbstractContextManager[Any]:
        """On a GPU, the stream of decoding, after what has been asked of the main one so far."""
        if self._side is None:
            return nullcontext()
        for tensor in used:
            self._side.wait_stream(torch.cuda.current_stream(self.model.device))
            tensor.record_stream(self._side)
        return torch.cuda.stream(self._side)

    def _evaluate(self, rows: list[Row]) -> Float[Tensor, "bucket channel height width"]:
        """Advances and evaluates the rows; returns their posterior means, padded to the bucket."""
        pool, geometry = rows[0].search.pool, rows[0].search.geometry
        tables, conditioning = self._tables(rows)
        if (graphs := self.graphs.get(geometry)) is not None:
            with self.ledger.span("forward", self.model.device):  # and propose and finish, in the same launch
                return graphs.run(*tables, *self.model.collate(conditioning))  # type: ignore[attr-defined]
        with self.ledger.span("propose"):
            x = self._propose(tables, pool)
        with self.ledger.span("forward", self.model.device):
            u = self.model.velocity(x, tables.tau, conditioning, tables.guidance, geometry)
        with self.ledger.span("finish"):
            return self._finish(u, pool, tables.integers[1], tables.posterior, geometry)

    def _run_guided(self, rows: list[Row]) -> list[float]:
        """Also takes the gradient of the rewards through decoder and model, by which the particles' children move.

        The move of the posterior mean is that of `rollflow.draw.Guide`; `x0_hat = p x + q u` makes it one of `u`.
        The particle itself stays what was judged. The full decoder judges: its gradients are the faithful ones.
        """
        pool, geometry = rows[0].search.pool, rows[0].search.geometry
        with torch.no_grad():
            tables, conditioning = self._tables(rows)
            with self.ledger.span("propose"):
                self._propose(tables, pool)
        live, bucket = tables.integers[1][: len(rows)], tables.rows
        with torch.enable_grad():
            x = torch.zeros(bucket, geometry.token, geometry.channel, device=pool.x.device)
            x[: len(rows)] = pool.x[live]
            x.requires_grad_(True)
            entering = (x * tables.coefficients[:, 3, None, None]).to(self.model.dtype)
            with self.ledger.span("forward", self.model.device):
                u = self.model.velocity(entering, tables.tau, conditioning, tables.guidance, geometry).float()
            p, q = tables.posterior[:, :, None, None].unbind(1)
            layout = self.model.layout
            x0_hat = layout.unpack(p * x + q * u, geometry.latent_height, geometry.latent_width)
            latents = layout.denormalise(x0_hat)
            images = self._decode(latents.to(self.model.dtype), len(rows), rows[0], preview=False)
            scores = [0.0] * len(rows)
            total = torch.zeros((), device=x.device)
            for reward, group in _grouped([row.search.plan.reward for row in rows]):
                with self.ledger.span("reward", self.model.device):
                    prompts = [rows[i].search.plan.request.prompt for i in group]
                    values = self._judge(reward, images[group], prompts)
                if not values.requires_grad:
                    raise RequestError(
                        f"the gradient of the reward {reward.name} does not reach the latents: reward, decoder and "
                        "model must be differentiable for a guided method"
                    )
                total = total + values.sum().to(x.device)
                for i, value in zip(group, values.detach().tolist(), strict=True):
                    scores[i] = value
            with self.ledger.span("backward", self.model.device):
                (gradient,) = torch.autograd.grad(total, x)
        pool.u[live] = u.detach()[: len(rows)]
        for i, row in enumerate(rows):
            row.particle.shift = move(row, gradient[i].detach()) / row.step.q
        return scores

    def _tables(self, rows: list[Row]) -> tuple[Tables, list[Any]]:
        """The batch's tables and conditionings; prepared states are written to the children's slots."""
        bucket = self._bucket(len(rows), rows[0].search.geometry)
        padding = bucket - len(rows)
        parents = []
        for row in rows:
            slot, state = row.particle.slot.index, prepared(row, self.model.layout)
            if state is not None:  # the child is there already, and its own parent
                row.search.pool.x[slot].copy_(state)
                parents.append(slot)
            else:
                parents.append(PADDING if row.parent is None else row.parent.slot.index)
        filler = [PADDING] * padding
        integers = [
            [*parents, *filler],
            [*(row.particle.slot.index for row in rows), *filler],
            [*(row.search.plan.request.seed for row in rows), *filler],
            [*(row.noise_key for row in rows), *filler],
        ]
        floats = [value for row in rows for value in coefficients(row)] + [0.0] * 4 * padding
        floats += [value for row in rows for value in (row.step.p, row.step.q)] + [0.0] * 2 * padding
        floats += [row.step.tau for row in rows] + [1.0] * padding
        floats += [float(row.search.plan.request.guidance) for row in rows] + [0.0] * padding
        conditioning = [row.search.conditioning for row in rows]
        conditioning += conditioning[:1] * padding
        return Tables(self._device(torch.tensor(integers)), self._device(torch.tensor(floats))), conditioning

    def _device(self, value: Tensor) -> Tensor:
        return value if self._side is None else value.pin_memory().to(self.model.device, non_blocking=True)

    def _propose(self, tables: Tables, pool: ParticlePool) -> Float[Tensor, "bucket token channel"]:
        parent, child, seed, key = tables.integers.unbind(0)
        return kernels.propose(pool.x, pool.u, parent, child, tables.coefficients, seed, key, self.model.dtype)

    def _finish(
        self, u: Tensor, pool: ParticlePool, slots: Tensor, posterior: Tensor, geometry: Geometry
    ) -> Float[Tensor, "bucket channel height width"]:
        return kernels.finish(
            u,
            pool.x,
            pool.u,
            slots,
            posterior,
            geometry.latent_height,
            geometry.latent_width,
            *self.model.layout.patch[1:],
            *self._affine,
            self.model.dtype,
        )

    def _decode(
        self, latents: Tensor, count: int, row: Row, preview: bool | None = None
    ) -> Float[Tensor, "row 3 height width"]:
        """The first `count` latents as images, padded to a bucket so that a row's pixels depend on the bucket alone."""
        bucket = self._bucket(count, row.search.geometry)
        latents = latents[:bucket]
        if len(latents) < bucket:
            latents = torch.cat([latents, latents.new_zeros(bucket - len(latents), *latents.shape[1:])])
        light = self.preview if preview is None else preview
        self.ledger.decoded["preview" if light else "full"] += count
        with self.ledger.span("decode", self.model.device):
            decode = self.model.preview if light else self.model.decode  # type: ignore[attr-defined]
            return decode(latents)[:count]

    def _judge_rows(
        self, rows: list[Row], reward: Reward, images: Float[Tensor, "image 3 height width"], group: list[int]
    ) -> list[float]:
        """Scores of rows that share a reward; `group` are their places among the images."""
        with self.ledger.span("reward", self.model.device):
            prompts = [row.search.plan.request.prompt for row in rows]
            own = images if len(group) == len(images) else images[self._places(group)]
            return self._judge(reward, own, prompts).tolist()

    def _judge(self, reward: Reward, images: Float[Tensor, "row 3 height width"], prompts: list[str]) -> Tensor:
        """The rewards of a group; padded to a single bucket, so that a network's scores depend on no other row.

        Rewards that do not say that they are `concurrent` are called by one thread at a time.
        """
        missing = self.buckets[-1] - len(prompts) if len(self.buckets) == 1 else 0
        if missing > 0:
            images = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        images = images.contiguous()  # one layout, or a network's last bits would depend on who else was judged
        judged = _called(reward)
        free: AbstractContextManager[Any] = nullcontext()
        with free if getattr(judged, "concurrent", False) else self._locks.of(judged):
            scores = reward(images, prompts + prompts[:1] * max(0, missing))
        if scores.shape != (len(images),):
            raise RequestError(
                f"the reward {reward.name} returned a tensor of shape {tuple(scores.shape)} for {len(images)} images: "
                f"it must return one score an image, shape ({len(images)},)"
            )
        return scores[: len(prompts)]

    @torch.no_grad()
    def _run_images(self, searches: list[Search], report: Reporter) -> None:
        """Decodes what the searches chose in full and judges the 8-bit images that are returned.

        Where particles were judged on previews, all finalists are decoded and the best of the images is returned.
        """
        pool, geometry = searches[0].pool, searches[0].geometry
        finalists = [(s, p) for s in searches for p in (s.finalists if self.preview else [s.chosen])]
        decoded = []
        size = self.cost(geometry, False).largest
        for start in range(0, len(finalists), size):
            part = finalists[start : start + size]
            padding = self._bucket(len(part), geometry) - len(part)
            slots = [p.slot.index for _, p in part] + [PADDING] * padding
            posterior = [[p.arrival.p, p.arrival.q] for _, p in part] + [[0.0, 0.0]] * padding
            slot = self._device(torch.tensor(slots))
            u = pool.u[slot.clamp(min=0)]
            latents = self._finish(u, pool, slot, self._device(torch.tensor(posterior)), geometry)
            self.ledger.decoded["full"] += len(part)
            with self._beside(latents), self.ledger.span("decode", self.model.device):
                decoded.append(self.model.decode(latents)[: len(part)])
        with self._beside():
            images = torch.cat(decoded)
        parts: list[Part] = []
        for reward, group in _grouped([search.plan.reward for search in searches]):
            own = [searches[i] for i in group]
            places = [i for i, (search, _) in enumerate(finalists) if search in own]
            judging = partial(self._outcomes, own, reward, [finalists[i] for i in places], images, places)
            parts.append((own, reward, judging))
        self._hand_over(parts, images, report)

    def _outcomes(
        self,
        searches: list[Search],
        reward: Reward,
        finalists: list[tuple[Search, Particle]],
        images: Float[Tensor, "image 3 height width"],
        places: list[int],
    ) -> list[Outcome]:
        """The best of each search's finalists, as an 8-bit image, and what its reward and the held-out judge say."""
        pixels = images.cpu()[places]
        rounded = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
        scores = self._scores(reward, [search for search, _ in finalists], rounded)
        ranks = [(_worth(score), particle.step) for score, (_, particle) in zip(scores, finalists, strict=True)]
        mine = {search: [i for i, (owner, _) in enumerate(finalists) if owner is search] for search in searches}
        chosen = [max(mine[search], key=ranks.__getitem__) for search in searches]
        judge = rewards.held_out(reward)
        held = [None] * len(chosen) if judge is None else self._scores(judge, searches, rounded[chosen])
        return [Outcome(pixels[i], rounded[i], scores[i], other) for i, other in zip(chosen, held, strict=True)]

    def _scores(self, judge: Reward, searches: Sequence[Search], images: Tensor) -> list[float]:
        """Scores of 8-bit images."""
        with self.ledger.span("reward", self.model.device):
            shown = self._device(images).float() / 255
            return self._judge(judge, shown, [search.plan.request.prompt for search in searches]).tolist()

    def _places(self, places: list[int]) -> Tensor:
        """Indices on the device, without waiting for it."""
        return self._device(torch.tensor(places))

    def _bucket(self, rows: int, geometry: Geometry) -> int:
        return self.cost(geometry, False).bucket(rows)


def _reporting(work: Callable[[Reporter], None], of: list[Any], report: Reporter) -> None:
    """Does a lane's work; an error frees the lane and is reported."""
    try:
        work(report)
    except BaseException as error:
        report(Report([]))
        report(Report(of, error=error))


def _when(done: Any, report: Reporter) -> None:
    """Reports a free lane when a CUDA event is over."""
    done.synchronize()
    report(Report([]))


def _called(reward: Reward) -> Any:
    """What is called in the end: two requests' plain functions are one reward if the function is one."""
    return reward.function if isinstance(reward, FunctionReward) else reward


def _worth(score: float) -> float:
    """A score that is no finite number is worst."""
    return score if math.isfinite(score) else -math.inf


def _grouped(judges: Sequence[Reward]) -> Iterable[tuple[Reward, list[int]]]:
    """Rows grouped by reward, so that each reward is called once a batch: (reward, row indices)."""
    groups: dict[int, tuple[Reward, list[int]]] = {}
    for i, reward in enumerate(judges):
        groups.setdefault(id(_called(reward)), (reward, []))[1].append(i)
    return groups.values()
