"""The engine against published practice and against the bare networks: `python -m rollflow.bench throughput`.

All contenders run in turns, several times; medians count. On a CPU the baselines have a process of their own, on as
many threads as suit them. The figure of merit is *efficiency*: the time that the bare transformer would need for the
committed evaluations, at its best batch size on this machine, over the wall time of the search with all that belongs to
it. `of_parts` is the same with decode and reward, run back to back at their best batch sizes, for every image that was
decoded. `overlap` is the share of the time of rewards in which a forward ran too. The sequential loop runs on the first
four prompts: it costs the same a prompt however many there are. On a GPU the bare parts are eager here; `rollflow bench
gpu` also has them as CUDA graphs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from rollflow.bench import figures, outputs, prompt_sets
from rollflow.bench.alone import Alone, Job, Timed
from rollflow.bench.environment import environment
from rollflow.bench.measure import OWN, Parts, in_turns
from rollflow.bench.stand_ins import reward_named
from rollflow.engine import Engine
from rollflow.errors import RequestError
from rollflow.models import loading
from rollflow.models.text import Size
from rollflow.profile import accounts
from rollflow.request import Request, Result
from rollflow.rewards import Reward

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # batch sizes of the bare parts
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Results, how many images each decoder made for them and in vain, and the share of the rewards' time in which a forward
# ran too.
Counted = tuple[list[Result], dict[str, int], float | None]
Run = Callable[[], Timed | Counted]


@dataclass(frozen=True)
class Throughput:
    """Compares the engine with the published sequential loop, diffusers' best-of-N and the bare networks.

    Attributes:
        model: which model.
        prompts: how many prompts at a time, each a comparison of its own.
        nfe: budget of each prompt.
        method: search method of the engine; the sequential loop is always RBF.
        steps: of best-of-N.
        dtype: of the engine's networks; the others run in float32, in which a CPU is fastest at one row.
        device: by default CUDA where there is one.
        preview: also the engine that judges by the light decoder, of FluxPipelines.
        height, width, frames: of images or clips, by default the model's own.
        reward: "count", which judges images of the built-in models, "brightness", which judges all and costs nothing,
            or "clip-sized": random weights of the size of CLIP's ViT-L/14, what a reward of that kind costs.
        shrink: divides the layers and heads of the reward "clip-sized".
        lanes: of the engine; by default as measured.
        baseline_threads: of the baselines, on a CPU; by default one or all, whichever measures faster.
        repetitions: how often each contender runs; the median counts.
        json: a file for the rows.
        plot: a file for the plot.
    """

    model: str = "shapes"
    prompts: tuple[int, ...] = (1, 4, 16, 64)
    nfe: int = 100
    method: str = "rbf"
    steps: int = 10
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    preview: bool = True
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    reward: Literal["count", "brightness", "clip-sized"] = "count"
    shrink: int = 1
    lanes: int | None = None
    baseline_threads: int | None = None
    repetitions: int = 3
    json: Path | None = None
    plot: Path | None = None

    def __call__(self) -> None:
        """Runs every comparison, prints the table, writes the files."""
        if min(self.prompts, default=0) < 1 or self.repetitions < 1:
            raise RequestError("prompts and repetitions: each must be at least 1")
        outputs.check_file(self.json)
        outputs.check_picture(self.plot)
        where, console = environment(), Console(width=None if sys.stdout.isatty() else 120)
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = DTYPES[self.dtype]
        engines = {"engine": Engine.from_pretrained(self.model, device, dtype, lanes=self.lanes)}
        flux = loading.class_of(self.model) == "FluxPipeline"
        if self.preview and flux:
            light = Engine.from_pretrained(self.model, device, dtype, preview=True, lanes=self.lanes)
            engines["engine, preview"] = light
        for engine in engines.values():
            engine.warm_up(*self._size)
        medium = prompt_sets.load("medium", 100)
        reward = reward_named(self.reward, str(device), dtype, self.shrink)
        parts = Parts([*engines.values()][-1], reward, medium[0], SIZES, self._size)
        alone, rows = Alone(device), list[dict[str, Any]]()
        for count in self.prompts:
            prompts = [medium[i % len(medium)] for i in range(count)]
            exact = torch.float32 if device.type == "cpu" else dtype
            runs: dict[str, Run] = {}
            for name in ("sequential", "diffusers")[not (flux and self._size == OWN) :]:
                what = (name, self.model, tuple(prompts), self.nfe, self.steps, str(device), exact)
                job = Job(*what, self._size, self.reward, self.shrink, self.baseline_threads)
                runs[name] = partial(alone, job)
            for name, engine in engines.items():
                searches = [self._request(p, i, reward) for i, p in enumerate(prompts)]
                samples = [self._request(p, i, reward, method="bon", steps=self.steps) for i, p in enumerate(prompts)]
                runs[name] = partial(_counted, engine, searches)
                runs[name + ", bon"] = partial(_counted, engine, samples)
            seconds, results, memory = in_turns(runs, self.repetitions)
            parts.measure()
            for name, run in results.items():
                row = self._row(name, count, run, seconds[name], memory[name])
                rows.append(row)
                console.print(f"{count} prompts, {name}: {row['nfe_per_second']:.0f} NFE/s")
        alone.close()
        while len(parts.rates[("transformer", parts.buckets[0])]) < self.repetitions:
            parts.measure()
        self._add_efficiency(rows, parts)
        rows += _bare_rows(parts)
        described = _described(where, device)
        rows = [{**row, "model": self.model, "nfe": self.nfe, "dtype": self.dtype, **described} for row in rows]
        console.print(_table(rows))
        if self.json:
            report = {"environment": where, "rows": rows}
            self.json.write_text(json.dumps(report, indent=1) + "\n")
        if self.plot:
            figures.throughput(rows, self.plot)

    def _request(self, prompt: str, seed: int, reward: Reward, **options: Any) -> Request:
        usual = {"nfe": self.nfe, "method": self.method, "seed": seed, "reward": reward}
        return Request(prompt, **{**usual, **self._size._asdict(), **options})

    @property
    def _size(self) -> Size:
        return Size(self.height, self.width, self.frames)

    def _row(self, name: str, prompts: int, run: Timed | Counted, seconds: list[float], memory: int) -> dict[str, Any]:
        if isinstance(run, Timed):
            base, memory = run.baseline, run.peak_memory_bytes
            committed, executed, images = base.committed_nfe, base.committed_nfe, base.images
            scores: Sequence[float] = base.rewards
            decoded, run_on = {"full": base.decodes}, base.images
        else:
            results, decoded, shared = run
            committed, executed = (sum(getattr(r, f) for r in results) for f in ("committed_nfe", "executed_nfe"))
            images, scores, run_on = len(results), [r.reward for r in results], prompts
        median = statistics.median(seconds)
        return {
            "contender": name,
            "prompts": prompts,
            "prompts_run": run_on,
            "method": "bon" if "bon" in name or name == "diffusers" else "rbf" if name == "sequential" else self.method,
            "committed_nfe": committed,
            "decoded": decoded,
            "seconds": seconds,
            "nfe_per_second": committed / median,
            "images_per_second": images / median,
            "milliseconds_per_nfe": 1000 * median / committed,
            "executed_over_committed": executed / committed,
            "peak_memory_bytes": memory,
            "mean_reward": statistics.fmean(scores) if run_on == prompts else None,
            **({"threads": run.threads} if isinstance(run, Timed) else {"reward_overlap": shared}),
        }

    def _add_efficiency(self, rows: list[dict[str, Any]], parts: Parts) -> None:
        """The bare times over the wall time; of parts, with what was decoded by each decoder, and judged."""
        decoders = {"full": "decode", "preview": "preview"}
        for row in rows:
            wall = statistics.median(row["seconds"])
            forward, reward = row["committed_nfe"] * parts.seconds("transformer"), parts.seconds("reward")
            judged = sum(n * (parts.seconds(decoders[kind]) + reward) for kind, n in row["decoded"].items())
            row["efficiency"] = forward / wall
            row["of_parts"] = (forward + judged) / wall


def _counted(engine: Engine, requests: list[Request]) -> Counted:
    engine.ledger.clear()
    engine.forget_prompts()  # the others encode theirs in every run
    results = engine.generate(requests)
    batches = engine.ledger.table("batches")
    shared = accounts.overlap(accounts.intervals(batches, "reward"), accounts.intervals(batches, "forward"))
    return results, dict(engine.ledger.decoded), shared


def _bare_rows(parts: Parts) -> list[dict[str, Any]]:
    best = 1 / parts.seconds("transformer")
    rows = []
    for (part, bucket), rates in parts.rates.items():
        rate = statistics.median(rates)
        row = {
            "contender": f"bare {part}",
            "bucket": bucket,
            "nfe_per_second": rate,
            "milliseconds_per_nfe": 1000 / rate,
        }
        rows.append({**row, "efficiency": rate / best} if part == "transformer" else row)
    return rows


def _described(where: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What each row says of where it comes from."""
    versions = {name: where[name] for name in ("rollflow", "python", "torch", "diffusers", "transformers")}
    machine = where["device"] if device.type == "cuda" else f"{where['device']}, {where['threads']} threads"
    return {"machine": machine, "versions": versions, "commit": where["commit"], "date": where["date"]}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The searches as a table for a README: each beside the sequential loop of the same number of prompts."""
    columns = ("prompts", "contender", "NFE/s", "ms an NFE", "over sequential", "efficiency", "of parts")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    searches = [row for row in rows if "prompts" in row]
    loop = {row["prompts"]: row["nfe_per_second"] for row in searches if row["contender"] == "sequential"}
    for row in searches:
        cells = (
            str(row["prompts"]),
            row["contender"],
            f"{row['nfe_per_second']:.0f}",
            f"{row['milliseconds_per_nfe']:.2f}",
            f"{row['nfe_per_second'] / loop[row['prompts']]:.1f}",
            f"{row['efficiency']:.2f}",
            f"{row['of_parts']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="searches, and the bare parts at their best batch size")
    for column in (
        "prompts",
        "contender",
        "NFE/s",
        "images/s",
        "ms/NFE",
        "run/committed",
        "efficiency",
        "of parts",
        "overlap",
        "MiB",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in rows:
        if "prompts" in row:
            table.add_row(
                str(row["prompts"]),
                row["contender"],
                f"{row['nfe_per_second']:.0f}",
                f"{row['images_per_second']:.1f}",
                f"{row['milliseconds_per_nfe']:.2f}",
                f"{row['executed_over_committed']:.2f}",
                f"{row['efficiency']:.2f}",
                f"{row['of_parts']:.2f}",
                "" if row.get("reward_overlap") is None else f"{row['reward_overlap']:.2f}",
                f"{row['peak_memory_bytes'] / 2**20:.0f}",
            )
    for part in dict.fromkeys(row["contender"] for row in rows if "bucket" in row):
        best = max((row for row in rows if row["contender"] == part), key=lambda row: row["nfe_per_second"])
        cells = (f"{best['nfe_per_second']:.0f}", "", f"{best['milliseconds_per_nfe']:.2f}")
        table.add_row("", f"{part}, {best['bucket']} rows", *cells)
    return table
