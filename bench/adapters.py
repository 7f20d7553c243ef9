"""Whether a FluxPipeline needs an adapter of its own: `python -m rollflow.bench adapters`.

The built-in `shapes` through `FluxModel` and through `PipelineModel`, which learns it like any other pipeline, each
with what it records (`FluxModel` on a GPU: CUDA graphs) and without: on pipelines of their own, in turns, in a process.
What counts is the median of the ratios of neighbours. Bare batches show where a difference comes from, searches what is
left of it. All make the same pictures, whose largest difference is written down.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rollflow.bench import outputs
from rollflow.bench.environment import environment
from rollflow.bench.intervals import quantile_interval
from rollflow.bench.measure import in_turns
from rollflow.bench.pipelines import brightness
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models.flux import FluxModel
from rollflow.models.loading import load
from rollflow.models.pipeline import Family, PipelineModel
from rollflow.models.text import Size
from rollflow.request import Request, Result
from rollflow.settings import on_device

EXPECTED = (
    "A batch of one row takes FluxModel with recordings 0.6 of PipelineModel's time and without them 0.9, as the "
    "recordings spare Python's work between operations and the replay adds little; one of 32 rows 0.9 and 1.0. A "
    "search on two lanes, which wait for each other's Python, takes 0.65 and 1.0 of it. Decoders are alike where they "
    "are not recorded, but for FluxModel's channels-last weights: 0.8."
)  # written before the first run, when PipelineModel recorded nothing
FLUX, LEARNED = "FluxModel", "PipelineModel"
PLAIN, UNRECORDED = (f"{name}, nothing recorded" for name in (FLUX, LEARNED))
PROMPTS = ("two red circles", "three blue squares and a green triangle", "a yellow circle", "four green squares")
BUCKETS = (1, 2, 4, 8, 16, 24, 32)
Row = dict[str, Any]


@dataclass(frozen=True)
class Adapters:
    """Milliseconds of an evaluation by adapter, and how many times those of FluxModel PipelineModel takes.

    Attributes:
        rows: of bare batches.
        prompts: how many searches run at a time.
        lanes: of the engine, each of one thread.
        nfe: budget of a search.
        method: search method.
        repetitions: how often everything is timed.
        device: by default CUDA where there is one.
        json: a file for the rows.
    """

    rows: tuple[int, ...] = (1, 8, 32)
    prompts: tuple[int, ...] = (1, 16)
    lanes: tuple[int, ...] = (1, 2)
    nfe: int = 40
    method: str = "rbf"
    repetitions: int = 15
    device: str | None = None
    json: Path | None = None

    def __call__(self) -> None:
        """Runs all of it, prints the table, writes the file.

        Raises:
            RequestError: fewer than one repetition.
        """
        outputs.check_file(self.json)
        if self.repetitions < 1:
            raise RequestError(f"repetitions={self.repetitions}: everything is timed at least once")
        device, before = on_device(self.device), os.getloadavg()[0]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            models = made(device)
            found = [*self._batches(models), *self._searches(models)]
        finally:
            torch.set_num_threads(threads)
        Console().print(_table(found))
        if self.json:
            load = {"before": before, "after": os.getloadavg()[0]}
            report = {"environment": environment(), "load": load, "expected": EXPECTED, "rows": found}
            self.json.write_text(json.dumps(report, indent=1) + "\n")

    def _batches(self, models: dict[str, Any]) -> Iterator[Row]:
        for rows in self.rows:
            for part in ("forward", "decode"):
                works = {name: _batch(model, part, rows) for name, model in models.items()}
                with torch.no_grad():
                    seconds, results, _ = in_turns(works, self.repetitions)
                yield from _rows({"part": part, "rows": rows}, seconds, rows * _REPEATED, results)

    def _searches(self, models: dict[str, Any]) -> Iterator[Row]:
        for lanes in self.lanes:
            with ExitStack() as engines:
                running = {
                    name: engines.enter_context(
                        Engine(model, graphs=name == FLUX, lanes=lanes, threads=1, buckets=BUCKETS)
                    )
                    for name, model in models.items()
                }
                for count in self.prompts:
                    asked = [
                        Request(PROMPTS[i % len(PROMPTS)], brightness, self.method, self.nfe, seed=i)
                        for i in range(count)
                    ]
                    works = {name: partial(_pictures, one, asked) for name, one in running.items()}
                    seconds, results, _ = in_turns(works, self.repetitions)
                    plural = "s" if lanes > 1 else ""
                    row = {"part": "search", "method": self.method, "prompts": count, "mode": f"{lanes} lane{plural}"}
                    yield from _rows(row, seconds, self.nfe * count, results)


def made(device: torch.device) -> dict[str, Any]:
    """The contenders, each on a pipeline of its own: FluxModel lays the weights of its decoder out anew."""
    pipelines = [load("shapes", device, torch.float32) for _ in range(4)]
    flux, plain = (FluxModel(one) for one in pipelines[:2])
    # What FluxModel knows, and the pipeline's `__call__` does not: the tokenizer's length of texts, the images' size.
    known, own = Family(fixed={"max_sequence_length": plain.text_tokens}), plain.geometry()
    learned, unrecorded = (PipelineModel(one, known, Size(own.height, own.width)) for one in pipelines[2:])
    for one in (plain, unrecorded):
        able = one.capabilities  # a signature of its own: it does not cost the same
        one.capabilities = replace(able, recordable=False, signature=f"{able.signature}, nothing recorded")
    return {FLUX: flux, PLAIN: plain, LEARNED: learned, UNRECORDED: unrecorded}


_REPEATED = 4  # batches of a timing


def _batch(model: Any, part: str, rows: int) -> Callable[[], torch.Tensor]:
    """A bare forward or decode, a few times; the last result as [row, element]."""
    geometry = model.geometry()
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    sized = (texts, geometry) if model.capabilities.sized_text else (texts,)
    conditioning = model.encode(*sized)
    if model.capabilities.recordable and model.device.type == "cpu":
        model.record(geometry, conditioning[0])
    x = torch.randn(rows, 16, 32, generator=torch.Generator().manual_seed(0)).to(model.device)
    x, tau = x.view(rows, geometry.token, geometry.channel), torch.linspace(0.1, 1, rows, device=model.device)
    guidance, z = torch.ones_like(tau), model.layout.decodable(x, geometry).to(model.dtype)

    def run() -> torch.Tensor:
        for _ in range(_REPEATED):
            forward = part == "forward"
            found = model.velocity(x, tau, conditioning, guidance, geometry) if forward else model.decode(z)
        return found.flatten(1).float().cpu()

    return run


def _pictures(engine: Engine, asked: Sequence[Request]) -> torch.Tensor:
    results: list[Result] = engine.generate(asked)
    return torch.stack([result.pixels for result in results]).flatten(1)


def _rows(
    of: Row, seconds: dict[str, list[float]], evaluations: int, results: dict[str, torch.Tensor]
) -> Iterator[Row]:
    """A row a contender: median time, how it compares with PipelineModel's turn by turn, how far results differ."""
    for name, times in seconds.items():
        ratios = [theirs / own for own, theirs in zip(times, seconds[LEARNED], strict=True)]
        yield {
            **of,
            "contender": name,
            "milliseconds_per_nfe": 1000 * statistics.median(times) / evaluations,
            "learned_over_this": statistics.median(ratios),
            "interval": quantile_interval(ratios, 0.5),
            "repetitions": len(times),
            "greatest_difference": float((results[name] - results[LEARNED]).abs().max()),
        }


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="an evaluation of `shapes` by adapter, and PipelineModel's time over it")
    for column in ("part", "rows", "prompts", "", "adapter", "ms/NFE", "PipelineModel takes", "95 %", "differs by"):
        table.add_column(column, justify="left" if column in ("part", "adapter") else "right")
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            row["part"],
            *(str(row.get(name, "")) for name in ("rows", "prompts", "mode")),
            row["contender"],
            f"{row['milliseconds_per_nfe']:.2f}",
            f"x {row['learned_over_this']:.2f}",
            "" if low is None or high is None else f"{low:.2f} to {high:.2f}",
            f"{row['greatest_difference']:.1e}",
        )
    return table
