"""Batches of guided rows: the gradient of the rewards with respect to the latents, through decoder and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rollflow.device import moves
from rollflow.device.batch import Tables
from rollflow.device.judge import Judge, grouped, reward_error
from rollflow.device.storage import Storage
from rollflow.errors import RequestError
from rollflow.models import FlowModel, Geometry
from rollflow.profile.ledger import Ledger
from rollflow.row import Landed, Row


@runtime_checkable
class Steps(Protocol):
    """The steps of a batch; see `rollflow.device.runner.Runner`."""

    model: FlowModel
    ledger: Ledger
    judge: Judge

    def storage(self, geometry: Geometry) -> Storage:
        """Where its particles are."""
        ...

    def tables(self, rows: Sequence[Row]) -> tuple[Tables, list[Any]]:
        """Its tables and conditionings."""
        ...

    def propose(self, tables: Tables, storage: Storage) -> Tensor:
        """Steps parents to children."""
        ...

    def decode(self, latents: Tensor, count: int, geometry: Geometry, preview: bool) -> Tensor:
        """Latents as images."""
        ...


def run(runner: Steps, rows: Sequence[Row]) -> Landed:
    """Evaluates guided rows; the velocities that their children start from move by the gradient of the rewards.

    The move of the posterior mean is that of `rollflow.draw.Guide`; `x0_hat = p x + q u` makes it one of `u`. The
    particle itself stays what was judged. The full decoder judges: its gradients are the faithful ones.
    """
    geometry, model = rows[0].brief.geometry, runner.model
    storage = runner.storage(geometry)
    with torch.no_grad():
        tables, conditioning = runner.tables(rows)
        with runner.ledger.span("propose"):
            runner.propose(tables, storage)
    live, bucket = tables.integers[1][: len(rows)], tables.rows
    with torch.enable_grad():
        x = torch.zeros(bucket, geometry.token, geometry.channel, device=storage.x.device)
        x[: len(rows)] = storage.x[live]
        x.requires_grad_(True)
        entering = (x * tables.coefficients[:, 3, None, None]).to(model.dtype)
        with runner.ledger.span("forward", model.device):
            u = model.velocity(entering, tables.tau, conditioning, tables.guidance, geometry).float()
        p, q = tables.posterior[:, :, None, None].unbind(1)
        x0_hat = model.layout.unpack(p * x + q * u, geometry.latent_height, geometry.latent_width)
        latents = model.layout.denormalise(x0_hat)
        images = runner.decode(latents.to(model.dtype), len(rows), geometry, preview=False)
        scores, total = _judged(runner, rows, images, torch.zeros((), device=x.device))
        with runner.ledger.span("backward", model.device):
            (gradient,) = torch.autograd.grad(total, x)
    storage.u[live] = u.detach()[: len(rows)]
    invalid: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        assert row.guide is not None
        move, valid = moves.guided(row.guide, row.reach, gradient[i].detach())
        storage.move[row.slot] = move / row.step.q
        if not valid:
            invalid.append((row.brief.ticket, row.number))
    return Landed(rows, scores, invalid)


def _judged(runner: Steps, rows: Sequence[Row], images: Tensor, total: Tensor) -> tuple[list[float], Tensor]:
    """Each row's score, and the sum of all, which has a gradient."""
    scores = [0.0] * len(rows)
    for reward, group in grouped([row.brief.reward for row in rows]):
        with runner.ledger.span("reward", runner.model.device):
            try:
                values = runner.judge.score(reward, images[group], [rows[i].brief.prompt for i in group])
            except Exception as error:
                raise reward_error(reward, error, len(group)) from error
        if not values.requires_grad:
            raise RequestError(
                f"the gradient of the reward {reward.name} does not reach the latents: reward, decoder and model must "
                "be differentiable for a guided method"
            )
        total = total + values.sum().to(images.device)
        for i, value in zip(group, values.detach().tolist(), strict=True):
            scores[i] = value
    return scores, total
