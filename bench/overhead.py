"""What the host's work costs: `python -m rollflow.bench overhead`.

A model of one token that computes next to nothing leaves what the engine itself does: choosing and packing rows,
tables, handing rewards to the methods. The figure is the processor time of all threads, less that of the two operators
(propose and finish), which are the device's work and are timed apart. How much of it is the ledger's, and what that is
of an evaluation of a model that does compute, is measured besides; see `rollflow.bench.ledger_cost`.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rollflow import kernels
from rollflow.bench import ledger_cost, outputs
from rollflow.bench.environment import environment
from rollflow.bench.measure import resident_memory
from rollflow.engine import Engine
from rollflow.models import FlowModel, Geometry
from rollflow.models.layout import Layout
from rollflow.request import Request

SIZE = Geometry(2, 2, 2, 2, 1, 4)


class Free(FlowModel):
    """A flow model of one token that costs next to nothing."""

    device, dtype, layout = torch.device("cpu"), torch.float32, Layout((1, 2, 2), (1.0,), (0.0,))

    def geometry(self, height: int | None, width: int | None) -> Geometry:
        """One size."""
        return SIZE

    def check_prompt(self, prompt: str) -> None:
        """Any prompt will do."""

    def encode(self, prompts: Sequence[str]) -> list[None]:
        """Nothing."""
        return [None for _ in prompts]

    def velocity(self, x: Tensor, tau: Tensor, conditioning: Sequence[Any], guidance: Tensor, of: Geometry) -> Tensor:
        """The state itself."""
        return x

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents[:, :1].expand(-1, 3, -1, -1)


def first_pixel(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that costs next to nothing, and differs from particle to particle."""
    return images[:, 0, 0, 0]


def _operators(rows: int) -> float:
    """Microseconds of the two operators for a batch of this many rows of one token."""
    x, u = torch.zeros(2 * rows, 1, 4), torch.zeros(2 * rows, 1, 4)
    patch, affine = Free.layout.patch[1:], Free.layout.affine(Free.device)
    parent, child = torch.arange(rows), torch.arange(rows, 2 * rows)
    steps, posterior = torch.full((rows, 4), 0.5), torch.full((rows, 2), 0.5)
    repetitions = 200
    start = time.thread_time()
    for _ in range(repetitions):
        velocity = kernels.propose(x, u, parent, child, steps, parent, child, torch.float32)
        kernels.finish(velocity, x, u, child, posterior, 2, 2, *patch, *affine, torch.float32)
    return 1e6 * (time.thread_time() - start) / repetitions


@dataclass(frozen=True)
class Overhead:
    """Microseconds of the host for a row and for a batch, by the number of live requests; memory over many requests.

    Attributes:
        live: how many requests run at a time.
        nfe: budget of each.
        method: search method.
        bucket: rows of a batch.
        requests: over how many requests, in calls of 50, memory is followed.
        pairs: how often searches run with the ledger's tables and without.
        prompts: of those with the model "shapes", whose wall time is compared.
        json: a file for the rows.
    """

    live: tuple[int, ...] = (1, 10, 100, 1000)
    nfe: int = 100
    method: str = "rbf"
    bucket: int = 32
    requests: int = 1000
    pairs: int = 30
    prompts: int = 16
    json: Path | None = None

    def __call__(self) -> None:
        """Runs all numbers of requests, prints the table, writes the file."""
        outputs.check_file(self.json)
        where, console = environment(), Console()
        rows = [self._row(live) for live in self.live]
        table = Table(title=f"host's work with a free model, {self.method}, batches of up to {self.bucket}")
        for column in ("live requests", "rows", "batches", "us/row", "us/batch", "rows/batch"):
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(
                str(row["prompts"]),
                str(row["executed"]),
                str(row["batches"]),
                f"{row['host_microseconds_per_row']:.1f}",
                f"{row['host_microseconds_per_tick']:.0f}",
                f"{row['executed'] / row['batches']:.1f}",
            )
        console.print(table)
        ledger = self._ledger()
        console.print(ledger_cost.text(ledger))
        memory = self._memory()
        grown = (memory[-1]["resident_bytes"] - memory[0]["resident_bytes"]) / 2**20
        first, last = memory[0]["requests"], memory[-1]["requests"]
        console.print(f"resident memory grew by {grown:.1f} MiB between request {first} and request {last}")
        if self.json:
            report = {"environment": where, "rows": rows, "ledger": ledger, "memory": memory}
            self.json.write_text(json.dumps(report, indent=1) + "\n")

    def _engine(self, live: int) -> Engine:
        return Engine(Free(), buckets=range(1, self.bucket + 1), lanes=1, threads=1, slots=live * self.nfe + 1)

    def _requests(self, count: int) -> list[Request]:
        return [Request("free", first_pixel, self.method, self.nfe, seed=i) for i in range(count)]

    def _row(self, live: int) -> dict[str, Any]:
        engine, requests = self._engine(live), self._requests(live)
        engine.generate(requests[:10])
        engine.ledger.clear()
        gc.collect()
        start = time.process_time()
        engine.generate(requests)
        spent = 1e6 * (time.process_time() - start)
        executed, ticks = sum(engine.ledger.executed.values()), engine.ledger.ticks
        operators = ticks * _operators(round(executed / ticks))
        spent -= operators
        return {
            "contender": "free model",
            "method": self.method,
            "nfe": self.nfe,
            "prompts": live,
            "executed": executed,
            "batches": engine.ledger.ticks,
            "host_microseconds_per_row": spent / executed,
            "host_microseconds_per_tick": spent / ticks,
            "operator_microseconds_per_tick": operators / ticks,
        }

    def _ledger(self, most: int = 100) -> dict[str, Any]:
        """What the ledger costs with the free model, in processor time, and with "shapes", in wall time."""
        live = min(most, self.requests, max(self.live))
        free, shapes = self._engine(live), Engine.from_pretrained("shapes")
        asked, drawn = self._requests(live), ledger_cost.shapes_requests(self.prompts, self.nfe)
        found: dict[str, Any] = {"predicted": ledger_cost.PREDICTED}
        for engine, requests in ((free, asked), (shapes, drawn)):
            engine.generate(requests)
        cost, run = ledger_cost, ledger_cost.measured
        found["free model"] = cost.in_microseconds(
            cost.in_pairs(partial(run, free, asked, time.process_time), self.pairs)
        )
        found["shapes"] = cost.in_shares(cost.in_pairs(partial(run, shapes, drawn, time.perf_counter), self.pairs))
        milliseconds = found["shapes"]["milliseconds_per_row"]
        found["shapes"] |= cost.at_most(found["free model"], milliseconds)
        run(shapes, drawn, time.perf_counter, True)
        found["nvtx"] = cost.ranges(shapes, milliseconds / 1e3)
        return found

    def _memory(self) -> list[dict[str, int]]:
        """Resident bytes after every 50 requests; the first 100 fill caches."""
        engine, found = self._engine(50), []
        for done in range(50, self.requests + 1, 50):
            engine.generate(self._requests(50))
            gc.collect()
            if done >= 100:
                found.append({"requests": done, "resident_bytes": resident_memory()})
        return found or [{"requests": self.requests, "resident_bytes": resident_memory()}]
