"""A small training loop: ranks, log, checkpoints, moving average."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def wait() -> None:
    """Until all ranks are here."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


class Run:
    """One stage's bookkeeping: ranks, log, checkpoint, optimisation step."""

    def __init__(self, work: Path, stage: str, seed: int):
        self.work, self.stage = work, stage
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.rng = torch.Generator().manual_seed(1000 * seed + self.rank)
        self.path = work / f"{stage}.pt"
        self.checkpoint = work / f"{stage}.rank{self.rank}.checkpoint.pt"
        self.start = time.time()

    def log(self, **record: Any) -> None:
        if self.rank == 0:
            record = {"stage": self.stage, "seconds": round(time.time() - self.start, 1), **record}
            print(json.dumps(record), flush=True)
            with open(self.work / "log.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")

    def average(self, parameters: list[nn.Parameter]) -> None:
        """Averages gradients over the ranks."""
        if self.ranks > 1:
            grads = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([g.flatten() for g in grads])
            torch.distributed.all_reduce(flat)
            for grad, mean in zip(grads, flat.div_(self.ranks).split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    def save(self, model: nn.Module) -> None:
        """Writes the stage's weights; no rank goes on before they are there."""
        if self.rank == 0:
            torch.save(model.state_dict(), self.path)
        wait()

    def train(
        self,
        model: Model,
        optimizers: list[torch.optim.Optimizer],
        steps: int,
        loss: Callable[[], Tensor],
        evaluate: Callable[[Model], dict] | None = None,
        every: int = 1000,
        decay: float = 0.999,
    ) -> Model:
        """Minimises `loss` with warm-up and linear decay; returns the exponential moving average of the weights."""
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        schedules = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, (i + 1) / 200, (steps - i) / (0.5 * steps)))
            for o in optimizers
        ]
        state: dict[str, Any] = {"model": model, "average": average}
        state |= {f"optimizer{i}": o for i, o in enumerate(optimizers)}
        state |= {f"schedule{i}": s for i, s in enumerate(schedules)}
        done = self._resume(state)
        recent: list[Tensor] = []
        for step in range(done, steps):
            value = loss()
            value.backward()
            self.average(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if step > 200:
                average.update_parameters(model)
            else:
                average.module.load_state_dict(model.state_dict())
            recent.append(value.detach())
            if (step + 1) % 100 == 0:
                self.log(step=step + 1, loss=round(torch.stack(recent).mean().item(), 5))
                recent.clear()
            if (step + 1) % every == 0 or step + 1 == steps:
                saved = {"step": step + 1, "rng": self.rng.get_state()} | {k: v.state_dict() for k, v in state.items()}
                torch.save(saved, partial := self.checkpoint.with_suffix(".partial"))
                os.replace(partial, self.checkpoint)
                if evaluate and self.rank == 0:
                    self.log(step=step + 1, **evaluate(cast(Model, average.module)))
        return cast(Model, average.module)

    def _resume(self, state: dict) -> int:
        if not self.checkpoint.exists():
            return 0
        saved = torch.load(self.checkpoint, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        self.rng.set_state(saved["rng"])
        self.log(resumed=saved["step"])
        return saved["step"]


def muon(parts: Iterable[nn.Module], hidden: Callable[[str], bool], scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices whose name `hidden` accepts, AdamW for all other weights.

    Args:
        parts: what is trained.
        hidden: whether a matrix of this name is one of the blocks'.
        scale: of the learning rates.
    """
    named = [(name, p) for part in parts for name, p in part.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and hidden(name)]
    rest = [p for _, p in named if not any(p is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=0.01 * scale, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=1e-3 * scale, betas=(0.9, 0.99), weight_decay=0.0),
    ]
