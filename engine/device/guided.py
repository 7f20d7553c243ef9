"""Batches of guided rows: the gradient of the rewards with respect to the latents, through decoder and model."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rollflow import rewards
from rollflow.copies import Download, upload
from rollflow.device import moves
from rollflow.device.batch import Tables
from rollflow.device.judge import Judge, Timed, by_term, identity
from rollflow.device.storage import Storage
from rollflow.errors import RequestError, RollflowError
from rollflow.models import FlowModel, Geometry
from rollflow.models.layout import Layout
from rollflow.models.recompute import recomputing
from rollflow.profile.ledger import Ledger
from rollflow.rewards import Combined, Reward, Terms
from rollflow.row import Event, Failed, Free, Landed, Report, Rerun, Row, Score


@runtime_checkable
class Steps(Protocol):
    """The steps of a batch; see `rollflow.device.runner.Runner`."""

    model: FlowModel
    ledger: Ledger
    judge: Judge
    recomputed: set[Geometry]

    def storage(self, geometry: Geometry) -> Storage:
        """Where its particles are."""
        ...

    def tables(self, rows: Sequence[Row]) -> tuple[Tables, list[Any]]:
        """Its tables and conditionings."""
        ...

    def propose(self, tables: Tables, storage: Storage) -> Tensor:
        """Steps parents to children."""
        ...

    def decode(self, latents: Tensor, count: int, geometry: Geometry, preview: bool, guided: bool) -> Tensor:
        """Latents as images."""
        ...


class Answers:
    """What a batch of guided rows reports, which its lane's thread may be given up in the middle of.

    Args:
        rows: the batch.
        report: takes the events.
        attempt: how often they were run again.

    Attributes:
        over: whether it was given up; then nothing that its thread still reports counts.
        failing: what the reward that raised, if one did, says of how it is called.
    """

    def __init__(self, rows: Sequence[Row], report: Report, attempt: int):
        self._left = {id(row): row for row in rows}  # not answered yet
        self._report, self._attempt, self._lock = report, attempt, threading.Lock()
        self.over = False
        self.failing: Terms | None = None

    def __call__(self, event: Event) -> None:
        """Reports what came of rows, or what else is to be known."""
        with self._lock:
            if self.over:
                return
            if isinstance(event, Landed | Failed | Rerun):
                for row in event.rows if not isinstance(event, Failed) else event.work:
                    self._left.pop(id(row), None)
            self._report(event)

    def give_up(self, failed: Failed) -> None:
        """Some rows failed, and the thread with them: the others run again, on another, and the lane is free."""
        with self._lock:
            self.over = True
        own = {id(row) for row in failed.work}
        rest = [row for key, row in self._left.items() if key not in own]
        self._report(failed)
        if rest:
            self._report(Rerun(rest, 0.0, self._attempt))
        self._report(Free())


class OnLane(Timed):
    """A call of a reward on a lane: if it is given up, so is the batch.

    Args:
        reward, work: see `rollflow.device.judge.Timed`.
        answers: of the batch.
    """

    def __init__(self, reward: Reward, work: Sequence[Row], answers: Answers):
        super().__init__(reward, work)
        self._answers = answers

    def _fail(self, error: BaseException, report: Report) -> None:
        self._answers.give_up(Failed(self.work, error))


def run(runner: Steps, rows: Sequence[Row], answers: Answers) -> Landed:
    """Evaluates guided rows; the velocities that their children start from move by the gradient of the rewards.

    The move of the posterior mean is that of `rollflow.draw.Guide`; `x0_hat = p x + q u` makes it one of `u`. The
    particle itself stays what was judged. The full decoder judges: its gradients are the faithful ones.

    Where the memory is short, see `rollflow.device.memory.guidance`, blocks are computed again in the backward pass.
    That takes about as long as one more forward, but it is no evaluation: nothing more is charged for it.

    Raises:
        GivenUp: a reward took longer than it may; nothing was written by then.
    """
    geometry, model = rows[0].brief.geometry, runner.model
    storage = runner.storage(geometry)
    with torch.no_grad():
        tables, conditioning = runner.tables(rows)
        with runner.ledger.span("propose"):
            runner.propose(tables, storage)
    live, bucket = tables.integers[1][: len(rows)], tables.rows
    with torch.enable_grad(), recomputing() if geometry in runner.recomputed else nullcontext():
        x = torch.zeros(bucket, geometry.token, geometry.channel, device=storage.x.device)
        x[: len(rows)] = storage.x[live]
        x.requires_grad_(True)
        entering = (x * tables.coefficients[:, 3, None, None]).to(model.dtype)
        with runner.ledger.span("forward", model.device):
            given = model.velocity(entering, tables.tau, conditioning, tables.guidance, geometry)
            u = given.float()
        p, q = tables.posterior[:, :, None, None].unbind(1)
        latents = model.layout.decodable(p * x + q * u, geometry)
        latents = moves.kept(latents, [row.brief for row in rows])
        entering = latents.to(model.dtype) if isinstance(model.layout, Layout) else latents
        images = runner.decode(entering, len(rows), geometry, preview=False, guided=True)
        each, total = _judged(runner, rows, images, answers)
        with runner.ledger.span("backward", model.device):
            (gradient,) = torch.autograd.grad(total, x)
    storage.u[live] = storage.as_kept(given.detach())[: len(rows)]
    valid: list[Tensor] = []
    for i, row in enumerate(rows):
        assert row.guide is not None
        move, finite = moves.guided(row.guide, row.reach, gradient[i].detach())
        storage.move[row.slot] = move / row.step.q
        valid.append(finite)
    numbers, finite = Download(torch.stack(each).detach(), torch.stack(valid)).wait()  # one wait for the device
    invalid = [(row.brief.ticket, row.number) for row, good in zip(rows, finite.tolist(), strict=True) if not good]
    return Landed(rows, _by_row(rows, numbers.tolist()), invalid)


def _judged(runner: Steps, rows: Sequence[Row], images: Tensor, answers: Answers) -> tuple[list[Tensor], Tensor]:
    """The scores of each row's terms, and the sum of all rewards, which has a gradient."""
    found: dict[tuple[Hashable, int], Tensor] = {}
    for key, (term, group) in by_term([row.brief.reward for row in rows]).items():
        with runner.ledger.span("reward", runner.model.device):
            call, prompts = OnLane(term, [rows[i] for i in group], answers), [rows[i].brief.prompt for i in group]
            try:
                own_images = images[upload(torch.tensor(group), images.device)]
                values = runner.judge.here(call, own_images, prompts, answers).to(images.device).double()
            except RollflowError:  # which is all that calls of rewards raise, but for one that was given up
                answers.failing = call.terms
                raise
        found.update(((key, i), value) for i, value in zip(group, values, strict=True))
    total, each = torch.zeros((), dtype=torch.float64, device=images.device), list[Tensor]()
    for i, row in enumerate(rows):
        reward = row.brief.reward
        own = [found[identity(term), i] for term in rewards.terms_of(reward)]
        value = reward.combine(torch.stack(own)[:, None])[0] if isinstance(reward, Combined) else own[0]
        if not value.requires_grad:
            raise RequestError(
                f"the gradient of the reward {rewards.title(reward)} does not reach the latents: reward, decoder and "
                "model must be differentiable for a guided method"
            )
        total, each = total + value, each + own
    return each, total


def _by_row(rows: Sequence[Row], numbers: Sequence[float]) -> list[Score]:
    """The score of each row, of those of all terms."""
    left, scores = iter(numbers), list[Score]()
    for row in rows:
        own = tuple(next(left) for _ in rewards.terms_of(row.brief.reward))
        scores.append(own if isinstance(row.brief.reward, Combined) else own[0])
    return scores
