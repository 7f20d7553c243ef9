"""What a journal costs: the same searches by an engine with one and by an engine without, in turns.

Predicted before the first measurement: a row's score is some 40 bytes of JSON, its share of a group commit 5 us and of
the look at what is new 5 us, against 1 to 2 ms of an evaluation of "shapes" on two cores: 0.5 to 1 % of the processor's
time, and of the wall time the same. The wait for the disk before a request is acknowledged (some ms) is once a request.
A run is over when the ends of all its searches, with their images, are on disk.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rollflow.bench import outputs
from rollflow.bench.environment import environment
from rollflow.bench.ledger_cost import in_pairs, middle, shapes_requests
from rollflow.engine import Engine
from rollflow.errors import RequestError

PREDICTED = {"share_of_wall_time": 0.0075}
TARGET = 0.02
BUCKETS = (1, 2, 4, 8, 16, 32)  # of both engines: which of the usual ones pay is measured, and differs


@dataclass(frozen=True)
class JournalCost:
    """Share of wall time and of processor time that a journal costs, of searches on the built-in model.

    Attributes:
        prompts: searches at a time.
        nfe: budget of each.
        pairs: how often they run with a journal and without.
        folder: where the journal is, such as on the disk that a service will use; by default a temporary one.
        json: a file for the figures.
    """

    prompts: int = 16
    nfe: int = 100
    pairs: int = 12
    folder: Path | None = None
    json: Path | None = None

    def __call__(self) -> None:
        """Runs the pairs, prints the figures, writes the file."""
        outputs.check_file(self.json)
        if self.pairs < 1:
            raise RequestError(f"--pairs {self.pairs}: it must be at least 1")
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            found = self._measured(Path(folder))
        wall, processor = found["wall"], found["processor"]
        Console().print(
            f"a journal costs {100 * wall['median']:.2f} % of the wall time (median of {self.pairs} pairs, 95 %: "
            f"{_percent(wall['low'])} to {_percent(wall['high'])}) and {100 * processor['median']:.2f} % of the "
            f"processor's; acknowledging {self.prompts} requests takes {found['acknowledged_ms']['median']:.1f} ms more"
        )
        if self.json is not None:
            text = {"environment": environment(), "predicted": PREDICTED, "target": TARGET, **found}
            self.json.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")

    def _measured(self, folder: Path) -> dict[str, Any]:
        requests = shapes_requests(self.prompts, self.nfe)
        options: dict[str, Any] = {"buckets": BUCKETS}
        plain = Engine.from_pretrained("shapes", **options)
        kept = Engine.from_pretrained("shapes", journal=folder, **options)
        times: list[dict[str, tuple[float, float, float]]] = []

        def run(on: bool) -> float:
            engine = kept if on else plain
            gc.collect()
            wall, processor = time.perf_counter(), time.process_time()
            jobs = [engine.submit(request) for request in requests]
            submitted = time.perf_counter() - wall
            for job in jobs:
                job.result()
            if engine._keeping is not None:  # the ends are written by this run, not beside the next one
                engine._keeping.flush()
            seconds = time.perf_counter() - wall
            times.append({"on" if on else "off": (seconds, time.process_time() - processor, submitted)})
            return seconds

        with plain, kept:
            for engine in (plain, kept):
                engine.generate(requests[:2])
            in_pairs(run, self.pairs)
        on = [one["on"] for one in times if "on" in one]
        off = [one["off"] for one in times if "off" in one]
        both = list(zip(on, off, strict=True))
        return {
            "searches": self.prompts, "nfe": self.nfe,
            "seconds_without": middle([seconds for seconds, _, _ in off]),
            "wall": middle([with_it[0] / without[0] - 1 for with_it, without in both]),
            "processor": middle([with_it[1] / without[1] - 1 for with_it, without in both]),
            "acknowledged_ms": middle([1e3 * (with_it[2] - without[2]) for with_it, without in both]),
        }  # fmt: skip


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.2f} %"
