"""Everything that needs a GPU, in one run of less than nine minutes: `python -m rollflow.bench gpu`.

Kernels against a copy, correctness, and for each geometry, with random weights made on the device, the bare networks
at every batch size and searches with decode and reward in the loop. One folder of results, which is written after every
row, so that a run that is stopped leaves what it had. An error in a part is recorded, and the others go on.

Estimated for an H200, in seconds: 20 to start, kernels 25, correctness 15, the matrix product 1, and

            build  transformer  graphs  decode and reward  searches  compiled  together
    shapes      2            5      10                 10        40        25        92
    sd3         4            6       8                  7        56        45       126
    flux        6            5       8                  5        62        60       146

which is 425 in all. `SECONDS` is after what time a part starts nothing more, and `minutes` the same for the run, from
its start on. Nothing is interrupted, so that a run may take as much longer as the last thing that it started.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from rollflow.bench import geometries, gpu_parts, gpu_searches, outputs
from rollflow.bench.environment import environment
from rollflow.bench.gpu_correctness import correctness
from rollflow.bench.gpu_parts import Deadline, Measure, Row, Subject
from rollflow.errors import RequestError, shown

Work = Callable[[Deadline], Iterator[Row]]

SECONDS = {
    "kernels": 45, "correctness": 35, "matmul": 10, "build": 30, "transformer": 30, "graphs": 20,
    "decode and reward": 20, "searches": 100, "compiled": 75,
}  # fmt: skip
LARGE = 64 * 2**20  # bytes that a call of a kernel moves at a size that counts as large
LAST_LINES = 8  # of a traceback, that are kept
SCREEN = (80, 40)  # columns and lines of the summary
FILES = ("kernels", "correctness", "buckets", "searches", "parts", "targets")
SHOWN = ("engine, 2 lanes", "engine, 1 lane", "engine, eager", "engine, bon", "sequential")


@dataclass(frozen=True)
class Gpu:
    """Measures kernels, correctness, bare networks and searches on a GPU, and judges them by the project's targets.

    The exit code is 1 if a part failed or something is not correct; a target that is not met does not fail.
    """

    out: Path = Path("bench/results/gpu")
    """A folder for the JSON files and summary.txt."""
    geometries: tuple[str, ...] = tuple(geometries.GEOMETRIES)
    """Which models, in this order."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default cuda where torch sees one, else cpu. A CPU only tries the code out."""
    minutes: float = 8.5
    """After which nothing new is started."""
    repetitions: int = 2
    """How often each is timed; the median counts."""
    compiled: bool = True
    """Also compile the transformers' blocks."""
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
            report.run("kernels", "kernels", partial(gpu_parts.bandwidth, device, self.repetitions, self.quick))
            report.run("correctness", "correctness", partial(correctness, device, self.quick))
            report.run("matmul", "buckets", partial(self._peak, measure))
            rows = report.rows["buckets"]
            peak = rows[0]["teraflops"] * 1e12 if rows else None
            for name in self.geometries:
                self._geometry(name, report, measure, peak)
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
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    def _dtype(self, device: torch.device) -> torch.dtype:
        return torch.bfloat16 if device.type == "cuda" else torch.float32

    def _peak(self, measure: Measure, deadline: Deadline) -> Iterator[Row]:
        """The FLOP/s of a large matrix product, of which `mfu` is a share."""
        side, dtype = max(64, gpu_parts.MATMUL_SIDE // self.shrink), self._dtype(measure.device)
        rate = gpu_parts.matmul(measure, side, dtype) / 1e12
        yield {"contender": "matmul", "rows": side, "dtype": str(dtype).removeprefix("torch."), "teraflops": rate}

    def _geometry(self, name: str, report: Report, measure: Measure, peak: float | None) -> None:
        """All of one geometry; its networks are freed when this returns."""
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
            "searches": ("searches", partial(gpu_searches.searches, subject, *searching)),
        }
        if self.compiled:
            parts["compiled"] = ("buckets", partial(gpu_parts.compiled, subject, peak, quick, measure))
        for part, (file, work) in parts.items():
            report.run(f"{name}: {part}", file, work)
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


class Target(NamedTuple):
    """A figure that the project promises: what of, the least it may be, and what was measured, None if nothing."""

    claim: str
    least: float
    measured: float | None

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.least


@dataclass
class Report:
    """What was measured so far, in files that are written anew after every row.

    Attributes:
        out: their folder.
        total: the end of the run.
        where: the environment, at the top of each file.
        rows: by file.
    """

    out: Path
    total: Deadline
    where: Row
    rows: dict[str, list[Row]] = field(default_factory=lambda: {name: [] for name in FILES})

    def __post_init__(self) -> None:
        outputs.check_folder(self.out)
        for name in FILES:  # find out now, not after the work; and nothing of an earlier run stays
            (self.out / f"{name}.json").unlink(missing_ok=True)
        self.write("parts")

    def run(self, part: str, file: str, work: Work) -> None:
        """Runs a part within its time, keeps its rows, and records its error, if it has one."""
        seconds = SECONDS[part.rpartition(": ")[2]]
        deadline, start = Deadline(seconds, self.total), time.perf_counter()
        entry: Row = {"part": part, "rows_measured": 0, "seconds": 0.0, "allowed_seconds": seconds, "error": None}
        self.rows["parts"].append(entry)
        try:
            if not deadline.allows():
                raise TimeoutError("not started: no time was left")
            for row in work(deadline):
                self.rows[file].append(row)
                entry["rows_measured"] += 1
                self.write(file)
        except Exception:  # whatever it was: the other parts are independent of this one
            entry["error"] = traceback.format_exc().splitlines()[-LAST_LINES:]
        entry["seconds"] = time.perf_counter() - start
        self.rows["targets"] = [{**target._asdict(), "met": target.met} for target in self.targets()]
        for name in ("parts", "targets"):
            self.write(name)
        (self.out / "summary.txt").write_text("\n".join(self.summary()) + "\n")
        failed = f", failed: {entry['error'][-1]}" if entry["error"] else ""
        console = Console(stderr=True)
        console.print(f"{part}: {entry['rows_measured']} rows, {entry['seconds']:.1f} s{failed}", markup=False)

    def write(self, file: str) -> None:
        """A JSON file of environment and rows, as `python -m rollflow.bench compare` reads them."""
        names = ("rollflow", "python", "torch", "diffusers", "transformers")
        head = {
            "machine": self.where["device"],
            "versions": {name: self.where[name] for name in names},
            "commit": self.where["commit"],
            "date": self.where["date"],
            "environment": self.where,
        }
        content = json.dumps({**head, "rows": self.rows[file]}, indent=1)
        (self.out / f"{file}.json").write_text(content + "\n")

    @property
    def correct(self) -> bool:
        """Whether all that was checked passed."""
        return all(row["passed"] for row in self.rows["correctness"])

    def targets(self) -> list[Target]:
        """The project's targets, next to what was measured."""
        large = [row for row in self.rows["kernels"] if row.get("bytes", 0) >= LARGE and "of_copy" in row]
        return [
            Target("propose, of a copy's bandwidth", 0.85, _least(large, "of_copy", kernel="propose")),
            Target("finish, of a copy's bandwidth", 0.85, _least(large, "of_copy", kernel="finish")),
            Target("flux, efficiency of RBF", 0.9, self._search("flux", "efficiency")),
            Target("shapes, efficiency of RBF with graphs", 0.8, self._search("shapes", "efficiency")),
            Target("sd3, NFE/s over the sequential loop", 5.0, self._search("sd3", "over_sequential")),
        ]

    def _search(self, geometry: str, figure: str) -> float | None:
        """The best of the engine's RBF rows, with graphs where there are any; of the geometry as it is or shrunk."""
        rows = self._searches(geometry)
        values = [
            row[figure] for row in rows if figure in row and row["contender"] in ("engine, 1 lane", "engine, 2 lanes")
        ]
        return max(values, default=None)

    def _searches(self, geometry: str) -> list[Row]:
        return [row for row in self.rows["searches"] if row["geometry"].partition("/")[0] == geometry]

    def summary(self) -> list[str]:
        """All of it on a screen."""
        where, checks = self.where, self.rows["correctness"]
        copy = _least(self.rows["kernels"], "gigabytes_per_second", kernel="copy")
        matmul = _least(self.rows["buckets"], "teraflops", contender="matmul")
        wrong = [row for row in checks if not row["passed"]]
        used = sum(entry["seconds"] for entry in self.rows["parts"])
        lines = [
            f"{where['device']}, torch {where['torch']}, {where['commit']}, {where['date']}, {used:.0f} s",
            f"copy {_figure(copy, '.0f')} GB/s, matrix product {_figure(matmul, '.1f')} TFLOP/s, "
            f"{len(checks) - len(wrong)} of {len(checks)} checks passed",
            *(f"WRONG {row['error']:.1e} > {row['allowed']:.1e}: {row['name']}" for row in wrong[:4]),
            "rows/s at the best bucket (MFU)",
            "                   eager          graph       compiled  decode  reward     build",
            *(self._bare_line(name) for name in self._geometries()),
            "searches, NFE/s; efficiency and of parts are those of 2 lanes, x of the loop",
            "                2 lanes   1 lane    eager      bon   loop  eff. parts    x   GiB",
            *(line for name in self._geometries() for line in self._search_lines(name)),
            "targets",
            *(
                f"  {target.claim:39} >= {target.least:<5g} {_figure(target.measured, '.2f'):>7}  "
                + {None: "not measured", True: "met", False: "not met"}[target.met]
                for target in self.targets()
            ),
        ]
        errors = [f"FAILED {entry['part']}: {entry['error'][-1]}" for entry in self.rows["parts"] if entry["error"]]
        columns, height = SCREEN
        return [line[:columns].rstrip() for line in [*lines, *errors][:height]]

    def _geometries(self) -> Sequence[str]:
        return list(dict.fromkeys(row["geometry"] for row in self.rows["buckets"] if "geometry" in row))

    def _bare_line(self, geometry: str) -> str:
        mine = [row for row in self.rows["buckets"] if row.get("geometry") == geometry]

        def best(part: str, *modes: str) -> Row | None:
            rows = [row for row in mine if row["contender"] == f"bare {part}" and row["mode"] in modes]
            rows = [row for row in rows if "nfe_per_second" in row]
            return max(rows, key=lambda row: row["nfe_per_second"], default=None)

        cells = [f"{geometry[:10]:10}"]
        for modes, width in ((("eager",), 14), (("graph",), 15), (("compiled", "compiled + graph"), 15)):
            row = best("transformer", *modes)
            mfu = f" {100 * row['mfu']:.0f}%" if row and "mfu" in row else ""
            cells.append(f"{_rate(row)}{mfu}".rjust(width))
        cells += [f"{_rate(best(part, 'eager')):>8}" for part in ("decode", "reward")]
        made = next(row for row in mine if row["contender"] == "build")
        return "".join([*cells, f"{made['seconds']:.0f}s {made['peak_memory_bytes'] / 2**30:.0f}G".rjust(10)])

    def _search_lines(self, geometry: str) -> Iterator[str]:
        for count in dict.fromkeys(row["prompts"] for row in self.rows["searches"] if row["geometry"] == geometry):
            found = {
                row["contender"]: row
                for row in self.rows["searches"]
                if (row["geometry"], row["prompts"]) == (geometry, count)
            }
            rates = [_rate(found.get(name)) for name in SHOWN]
            row = found.get("engine, 2 lanes", {})
            cells = [f"{geometry[:10]} {count:3d}".ljust(14), *(f"{rate:>9}" for rate in rates[:-1]), f"{rates[-1]:>7}"]
            cells += [f"{_figure(row.get(name), '.2f'):>6}" for name in ("efficiency", "of_parts")]
            cells.append(f"{_figure(row.get('over_sequential'), '.1f'):>5}")
            yield "".join([*cells, f"{row.get('peak_memory_bytes', 0) / 2**30:.1f}".rjust(6)])


def _least(rows: Sequence[Row], figure: str, **where: Any) -> float | None:
    """The smallest `figure` of the rows that match."""
    return min((row[figure] for row in rows if all(row.get(k) == v for k, v in where.items())), default=None)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(row: Row | None) -> str:
    """Rows a second, three digits of them or all."""
    if not row:
        return "-"
    rate = row["nfe_per_second"]
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
