"""Whether replays foretell what changes bring: `python -m rollflow.bench what-if`.

A run is recorded; of its recording it is predicted how long another run takes, with something changed: budget, number
of requests, arrivals, batch sizes, lanes, method, or the speed of forward, decoder or reward, which are really made
slower by doing their work again. Then the other run takes place. Both alternate, and what counts is the median
of the predictions against the median of what they are predictions of.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rollflow import rewards
from rollflow.bench import outputs
from rollflow.bench.environment import environment
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models import traits
from rollflow.models.flux import FluxModel
from rollflow.models.loading import load
from rollflow.profile.recording import Recording
from rollflow.request import Request
from rollflow.settings import CPU_BUCKETS, on_device
from rollflow.whatif.changes import Change
from rollflow.whatif.replay import Replay

EXPECTED = (
    "Every prediction within 15 % of the median of what really takes place, half of them within 5 %. The largest "
    "errors where the packing becomes another one (small batches alone, one lane): their times are the least measured."
)  # written before the first run
PROMPTS = ("two red circles", "three blue squares and a green triangle", "a yellow circle", "four green squares")
METHODS = ("sprout", "rbf")


@dataclass(frozen=True)
class Variant:
    """How a run differs from the plain one.

    Attributes:
        forward, decode: how often each does its work.
        reward: how many times as long as it takes the reward takes.
        lanes: of the engine.
        largest: the largest batch.
    """

    forward: int = 1
    decode: int = 1
    reward: int = 1
    lanes: int = 2
    largest: int = 64


PLAIN = Variant()


@dataclass(frozen=True)
class Setting:
    """What is predicted: from a recording of `before`, a run of `after`."""

    change: Change
    before: Variant = PLAIN
    after: Variant = PLAIN


SETTINGS = (
    Setting(Change(nfe=30)),
    Setting(Change(nfe=120)),
    Setting(Change(prompts=4)),
    Setting(Change(prompts=48)),
    Setting(Change(rate=3.0)),
    Setting(Change(rate=8.0, prompts=32)),
    Setting(Change(bucket=8), after=Variant(largest=8)),
    Setting(Change(bucket=16), after=Variant(largest=16)),
    Setting(Change(lanes=1), after=Variant(lanes=1)),
    Setting(Change(method="bon")),
    Setting(Change(method="smc")),
    Setting(Change(decode=2.0), after=Variant(decode=2)),
    Setting(Change(decode=0.5), before=Variant(decode=2)),
    Setting(Change(forward=2.0), after=Variant(forward=2)),
    Setting(Change(forward=0.5), before=Variant(forward=2)),
    Setting(Change(reward=10.0), after=Variant(reward=10)),
    Setting(Change(reward=0.1), before=Variant(reward=10)),
    Setting(Change(decode=0.5, prompts=8, nfe=100), before=Variant(decode=2)),
)


class Slower(rewards.Reward):
    """A reward that takes several times as long: it judges again until it does, as further times are faster."""

    def __init__(self, reward: Any, times: int):
        self._reward, self._times = reward, times
        self.name: str = reward.name

    def check(self, prompt: str) -> None:
        """As the reward itself."""
        self._reward.check(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores of the first time."""
        began = time.thread_time()
        scores = self._reward(images, prompts)
        until = began + self._times * (time.thread_time() - began)
        while time.thread_time() < until:
            self._reward(images, prompts)
        return scores


@dataclass(frozen=True)
class WhatIf:
    """Predicted against real seconds of changed runs.

    Attributes:
        prompts: requests of the run that is recorded.
        nfe: their budget.
        repetitions: how often each pair of runs takes place.
        settings: which of them, by their numbers from 0; by default all.
        device: by default CUDA where there is one.
        json: a file for the rows.
    """

    prompts: int = 16
    nfe: int = 60
    repetitions: int = 3
    settings: tuple[int, ...] = ()
    device: str | None = None
    json: Path | None = None
    _made: dict[Variant, tuple[Engine, Any]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self) -> None:
        """Runs all pairs, prints the table, writes the file.

        Raises:
            RequestError: a setting that is none, or fewer than one repetition.
        """
        outputs.check_file(self.json)
        if self.repetitions < 1:
            raise RequestError(f"repetitions={self.repetitions}: every pair runs at least once")
        if wrong := [number for number in self.settings if not 0 <= number < len(SETTINGS)]:
            raise RequestError(f"settings={wrong[0]}: they are numbered from 0 to {len(SETTINGS) - 1}")
        before = os.getloadavg()[0]
        chosen = [SETTINGS[number] for number in self.settings] or [*SETTINGS]
        with ExitStack() as engines:
            rows = [self._row(setting, engines) for setting in chosen]
        console = Console()
        console.print(_table(rows))
        worst = max(abs(row["error"]) for row in rows)
        console.print(f"worst error {worst:.1%}, median {statistics.median(abs(row['error']) for row in rows):.1%}")
        if self.json:
            load = {"before": before, "after": os.getloadavg()[0]}
            report = {"environment": environment(), "load": load, "expected": EXPECTED, "rows": rows}
            self.json.write_text(json.dumps(report, indent=1) + "\n")

    def _row(self, setting: Setting, engines: ExitStack) -> dict[str, Any]:
        predicted, real, corrections, base = [], [], [], []
        for repetition in range(self.repetitions):
            change = replace(setting.change, seed=repetition)
            replay = Replay(self._recorded(setting.before, Change(), None, engines))
            arrivals = [when for when, _ in replay.arrivals(change)]
            foretold = replay.run(change)
            taken = self._recorded(setting.after, change, arrivals if change.rate else None, engines)
            ends, starts = taken.requests["ended"], taken.requests["submitted"]
            predicted.append({"seconds": foretold.seconds, "p95": foretold.latency(0.95)})
            latency = sorted((ends - starts).tolist())
            p95 = float(torch.quantile(torch.tensor(latency, dtype=torch.float64), 0.95))
            real.append({"seconds": float(ends.max() - starts.min()), "p95": p95})
            corrections.append(replay.correction)
            base.append(replay.recorded)
        found = {name: [one[name] for one in of] for name in ("seconds", "p95") for of in (real,)}
        told = {f"predicted_{name}": [one[name] for one in predicted] for name in ("seconds", "p95")}
        return {
            "setting": str(setting.change),
            "recorded": _words(setting.before),
            "base_seconds": base,
            "correction": corrections,
            **found,
            **told,
            "error": statistics.median(told["predicted_seconds"]) / statistics.median(found["seconds"]) - 1,
            "error_p95": statistics.median(told["predicted_p95"]) / statistics.median(found["p95"]) - 1,
        }

    def _recorded(
        self, variant: Variant, change: Change, arrivals: Sequence[float] | None, engines: ExitStack
    ) -> Recording:
        """A run of an engine, recorded."""
        engine, reward = self._engine(variant, engines)
        count, nfe = change.prompts or self.prompts, change.nfe or self.nfe
        asked = []
        for i in range(count):
            of = i % self.prompts  # as the recorded ones come in turns
            method = change.method or METHODS[of % len(METHODS)]
            asked.append(Request(PROMPTS[of % len(PROMPTS)], reward, method, nfe, seed=i))
        with engine.profile() as profile:
            if arrivals is None:
                engine.generate(asked)
            else:
                began, jobs = time.perf_counter(), []
                for when, request in zip(arrivals, asked, strict=True):
                    time.sleep(max(0.0, began + when - time.perf_counter()))
                    jobs.append(engine.submit(request))
                for job in jobs:
                    job.result()
        return profile.recording

    def _engine(self, variant: Variant, engines: ExitStack) -> tuple[Engine, Any]:
        if variant not in self._made:
            device = on_device(self.device)
            model = FluxModel(load("shapes", device, torch.float32))
            able, name = model.capabilities, _words(variant)
            model.capabilities = replace(able, signature=f"{able.signature}, {name}")  # it does not cost the same
            if variant.forward > 1:
                model.velocity = _times(model.velocity, variant.forward)  # type: ignore[method-assign]
            if variant.decode > 1:
                model.decode = _times(model.decode, variant.decode)  # type: ignore[method-assign]
            sizes = [size for size in CPU_BUCKETS if size <= variant.largest]
            options: dict[str, Any] = {"threads": 1} if device.type == "cpu" else {}
            engine = Engine(model, buckets=sizes, lanes=variant.lanes, traits=traits("shapes"), **options)
            engines.enter_context(engine)
            reward = rewards.make("count")
            self._made[variant] = engine, reward if variant.reward == 1 else Slower(reward, variant.reward)
            engine.generate([Request(prompt, "count", "rbf", 20) for prompt in PROMPTS])
        return self._made[variant]


def _times(work: Callable[..., Tensor], times: int) -> Callable[..., Tensor]:
    def repeated(*arguments: Any) -> Tensor:
        for _ in range(times - 1):
            work(*arguments)
        return work(*arguments)

    return repeated


def _words(variant: Variant) -> str:
    words = [
        f"{name} {getattr(variant, name)}x" for name in ("forward", "decode", "reward") if getattr(variant, name) > 1
    ]
    words += [f"{variant.lanes} lane"] if variant.lanes == 1 else []
    words += [f"batches of at most {variant.largest}"] if variant.largest != PLAIN.largest else []
    return ", ".join(words) or "plain"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="what-if: predicted against real (medians)")
    for name in ("recorded", "what if", "recorded s", "predicted s", "real s", "error", "p95 error"):
        table.add_column(name, justify="left" if name in ("recorded", "what if") else "right")
    for row in rows:
        numbers = (statistics.median(row[name]) for name in ("base_seconds", "predicted_seconds", "seconds"))
        table.add_row(
            row["recorded"], row["setting"], *(f"{one:.2f}" for one in numbers), f"{row['error']:+.1%}",
            f"{row['error_p95']:+.1%}",
        )  # fmt: skip
    return table
