"""Everything that needs a GPU, in one run of less than seven minutes: `python -m rollflow.bench gpu`.

Kernels against a copy, correctness, and for each geometry, with random weights made on the device, the bare networks
at every batch size and searches with decode and reward in the loop. One folder of results, which is written after every
row, so that a run that is stopped leaves what it had. An error in a part is recorded, and the others go on.

Estimated for an H100, in seconds: 20 to start, kernels 25, correctness 20, the matrix product 1, and, the geometry that
says most first,

            build  transformer  graphs  decode and reward  searches  compiled  together
    flux        6            6       8                  6        65        40       131
    sd3         4            6       6                  6        50        30       102
    shapes      2            5       8                  8        35        20        78

which is 377 in all. `SECONDS` is after what time a part starts nothing more, and `minutes` the same for the run, from
its start on; what is compiled leaves `RESERVED` to each geometry to come. Nothing is interrupted, so that a run may
take as much longer as the last thing that it started.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from rollflow.bench import geometries, gpu_parts, gpu_searches
from rollflow.bench.environment import environment
from rollflow.bench.gpu_correctness import correctness
from rollflow.bench.gpu_parts import Deadline, Measure, Row, Subject
from rollflow.bench.gpu_report import Report, Work
from rollflow.errors import RequestError, shown

RESERVED = 70.0  # seconds of a geometry to come, its compilation not counted
Part = Literal["kernels", "correctness", "networks", "searches", "compiled"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class Gpu:
    """Measures kernels, correctness, bare networks and searches on a GPU, and judges them by the project's targets.

    The exit code is 1 if a part failed or something is not correct; a target that is not met does not fail.
    """

    out: Path = Path("bench/results/gpu")
    """A folder for the JSON files and summary.txt."""
    parts: tuple[Part, ...] = PARTS
    """What to run, in this order whatever the order here. Searches and compiled networks are compared with networks,
    which run for them too."""
    geometries: tuple[str, ...] = ("flux", "sd3", "shapes")
    """Which models, in this order."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default cuda where torch sees one, else cpu. A CPU only tries the code out."""
    minutes: float = 6.0
    """After which nothing new is started."""
    repetitions: int = 2
    """How often each is timed; the median counts."""
    shrink: int = 1
    """Divides the sizes of the models, for trying the code out."""
    quick: bool = False
    """The least that runs through everything, for trying the code out."""

    def __call__(self) -> None:
        """Runs all parts, prints the summary, writes the files.

        Raises:
            RequestError: there is no such device or geometry, or a number is too small.
            OSError: the folder cannot be written to.
            SystemExit: with code 1, if a part failed or something is not correct.
        """
        total, device = Deadline(60 * self.minutes), self._checked()
        report = Report(self.out, total, {**environment(), "measured_on": str(device), **_device(device)})
        measure = Measure(device, self.repetitions, 0.01 if self.quick else 0.2)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if "kernels" in self.parts:
                report.run("kernels", "kernels", partial(gpu_parts.bandwidth, device, self.repetitions, self.quick))
            if "correctness" in self.parts:
                report.run("correctness", "correctness", partial(correctness, device, self.quick))
            if {"networks", "searches", "compiled"} & {*self.parts}:
                report.run("matmul", "buckets", partial(self._peak, measure))
                rows = report.rows["buckets"]
                peak = rows[0]["teraflops"] * 1e12 if rows else None
                for place, name in enumerate(self.geometries, 1):
                    self._geometry(name, report, measure, peak, RESERVED * (len(self.geometries) - place))
                    gpu_parts.free()
        print("\n".join(report.summary()))
        if any(row["error"] for row in report.rows["parts"]) or not report.correct:
            raise SystemExit(1)

    def _checked(self) -> torch.device:
        try:
            device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise RequestError(f"no device {shown(self.device)}: choose cpu, cuda or cuda:N") from error
        if device.type not in ("cpu", "cuda"):
            raise RequestError(f"device {shown(self.device)}: choose cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RequestError(f"no device {shown(self.device)}: torch sees {torch.cuda.device_count()} CUDA devices")
        if self.repetitions < 1 or self.minutes <= 0:
            raise RequestError(f"repetitions={self.repetitions}, minutes={self.minutes}: at least 1, and above 0")
        for name in self.geometries:
            geometries.geometry(name).shrunk(self.shrink)
        if not self.parts or not {*self.parts} <= {*PARTS}:
            raise RequestError(f"parts={shown(self.parts)}: choose some of {', '.join(PARTS)}")
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    def _dtype(self, device: torch.device) -> torch.dtype:
        return torch.bfloat16 if device.type == "cuda" else torch.float32

    def _peak(self, measure: Measure, deadline: Deadline) -> Iterator[Row]:
        """The FLOP/s of a large matrix product, of which `mfu` is a share."""
        side, dtype = max(64, gpu_parts.MATMUL_SIDE // self.shrink), self._dtype(measure.device)
        rate = gpu_parts.matmul(measure, side, dtype) / 1e12
        yield {"contender": "matmul", "rows": side, "dtype": str(dtype).removeprefix("torch."), "teraflops": rate}

    def _geometry(self, name: str, report: Report, measure: Measure, peak: float | None, reserved: float) -> None:
        """All of one geometry; its networks are freed when this returns. `reserved` are seconds of those to come."""
        subjects: list[Subject] = []
        report.run(f"{name}: build", "buckets", partial(self._build, name, measure.device, subjects))
        if not subjects:
            return
        (subject,), quick = subjects, self.quick
        budget = gpu_searches.SEARCHES[name]
        searching = (budget.quick() if quick else budget, self.repetitions, quick)
        parts: dict[str, tuple[str, Work]] = {
            "transformer": ("buckets", partial(gpu_parts.transformer, subject, peak, measure)),
            "graphs": ("buckets", partial(gpu_parts.graphs, subject, peak, measure)),
            "decode and reward": ("buckets", partial(gpu_parts.decode_and_reward, subject, measure)),
        }
        if "searches" in self.parts:
            parts["searches"] = ("searches", partial(gpu_searches.searches, subject, *searching))
        if "compiled" in self.parts:
            parts["compiled"] = ("buckets", partial(gpu_parts.compiled, subject, peak, quick, measure))
        for part, (file, work) in parts.items():
            report.run(f"{name}: {part}", file, work, reserved if part == "compiled" else 0.0)
            gpu_parts.free()

    def _build(self, name: str, device: torch.device, into: list[Subject], deadline: Deadline) -> Iterator[Row]:
        before, start = gpu_parts.allocated(device), time.perf_counter()
        subject = Subject(name, device, self._dtype(device), self.shrink, self.quick)
        gpu_parts.wait(device)
        into.append(subject)
        yield gpu_parts.built(subject, time.perf_counter() - start, before)


def _device(device: torch.device) -> Row:
    """What a result should say of a GPU beyond its name."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "device_memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }
