"""The result files of `python -m rollflow.bench gpu`, its targets, and the summary on a screen."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from rollflow.bench import outputs
from rollflow.bench.gpu_parts import Deadline, Row
from rollflow.bench.gpu_searches import BON, EAGER, LANES_1, LANES_2, LIGHT, SEQUENTIAL
from rollflow.bench.gpu_time import SHARES

Work = Callable[[Deadline], Iterator[Row]]

SECONDS = {
    "kernels": 35, "correctness": 30, "matmul": 5, "build": 20, "transformer": 20, "graphs": 20,
    "decode and reward": 15, "searches": 85, "compiled": 45,
}  # fmt: skip
# Of a copy's bandwidth that propose and finish are to reach at 1024 x 1024 pixels, by rows. Noise is bound by
# arithmetic, and searches draw it inside of propose.
BANDWIDTHS = {8: 0.6, 32: 0.85, 64: 0.9}
TOKENS = 4096  # of such a row
LAST_LINES = 8  # of a traceback, that are kept
SCREEN = (80, 40)  # columns and lines of the summary
FILES = ("kernels", "correctness", "buckets", "searches", "parts", "targets")
SHOWN = (LANES_2, LANES_1, EAGER, LIGHT, BON, SEQUENTIAL)


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

    def run(self, part: str, file: str, work: Work, reserved: float = 0.0) -> None:
        """Runs a part within its time, keeps its rows, and records its error, if it has one.

        A part that `reserved` seconds are to be left after gets what is left before, which may be nothing.
        """
        seconds: float = SECONDS[part.rpartition(": ")[2]]
        if reserved:
            seconds = max(0.0, min(seconds, self.total.left - reserved))
        deadline, start = Deadline(seconds, self.total), time.perf_counter()
        entry: Row = {"part": part, "rows_measured": 0, "seconds": 0.0, "allowed_seconds": seconds, "error": None}
        self.rows["parts"].append(entry)
        try:
            if not deadline.allows() and not reserved:
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
        return [
            *(
                Target(
                    f"{kernel}, {rows} rows, of a copy's bandwidth",
                    least,
                    _least(self.rows["kernels"], "of_copy", kernel=kernel, rows=rows, token=TOKENS),
                )
                for kernel in ("propose", "finish")
                for rows, least in BANDWIDTHS.items()
            ),
            Target("flux, light decoder, efficiency of RBF", 0.9, self._search("flux", "efficiency", LIGHT)),
            Target("flux, full decoder, of its parts", 0.95, self._search("flux", "of_parts", LANES_1, LANES_2)),
            Target(
                "sd3, NFE/s over the sequential loop", 5.0, self._search("sd3", "over_sequential", LANES_1, LANES_2)
            ),
        ]

    def _search(self, geometry: str, figure: str, *contenders: str) -> float | None:
        """The best of the contenders' rows, of the geometry as it is or shrunk."""
        rows = self._searches(geometry)
        values = [row[figure] for row in rows if figure in row and row["contender"] in contenders]
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
            "             2 lanes 1 lane  eager  light    bon   loop  eff. parts    x   GiB",
            *(line for name in self._geometries() for line in self._search_lines(name)),
            "shares of the wall time" + "".join(f"{part:>9}" for part in SHARES),
            *(line for name in self._geometries() for line in self._share_lines(name)),
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
            cells = [f"{geometry[:9]} {count:3d}".ljust(13), *(f"{rate:>7}" for rate in rates)]
            cells += [f"{_figure(row.get(name), '.2f'):>6}" for name in ("efficiency", "of_parts")]
            cells.append(f"{_figure(row.get('over_sequential'), '.1f'):>5}")
            yield "".join([*cells, f"{row.get('peak_memory_bytes', 0) / 2**30:.1f}".rjust(6)])

    def _share_lines(self, geometry: str) -> Iterator[str]:
        for row in self.rows["searches"]:
            if row["geometry"] == geometry and row["contender"] in (LANES_2, LIGHT):
                kind = " light" if row["contender"] == LIGHT else ""
                name = f"{geometry[:9]} {row['prompts']:3d}{kind}".ljust(23)
                yield name + "".join(f"{row[f'share_{part}']:9.2f}" for part in SHARES)


def _least(found: Sequence[Row], figure: str, **where: Any) -> float | None:
    """The smallest `figure` of the rows that match."""
    return min((row[figure] for row in found if all(row.get(k) == v for k, v in where.items())), default=None)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(row: Row | None) -> str:
    """Rows a second, three digits of them or all."""
    if not row:
        return "-"
    rate = row["nfe_per_second"]
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
