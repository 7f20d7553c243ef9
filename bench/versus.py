"""Two versions side by side: `python -m rollflow.bench versus OTHER_PYTHON`.

Each version runs in a process of its own environment, and they take turns, measurement by measurement: what slows the
machine slows both. What counts is the median of the ratios of neighbours.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rollflow.bench import outputs
from rollflow.bench.environment import environment
from rollflow.errors import RequestError, shown

SIDE = Path(__file__).with_name("side.py")
UNITS = {"throughput": "milliseconds_per_nfe", "overhead": "host_microseconds_per_row"}


class Side:
    """A version at work.

    Args:
        python: the interpreter of its environment.
        folder: an empty one to work in, so that no checkout is on its path.

    Raises:
        RequestError: there is no such interpreter, or no rollflow in its environment.
    """

    def __init__(self, python: str, folder: Path):
        self._python, self._said = python, folder / f"{len([*folder.iterdir()])}.txt"
        try:
            with self._said.open("wb") as said:
                self._process = Popen(
                    [python, "-c", SIDE.read_text()], stdin=PIPE, stdout=PIPE, stderr=said, text=True, cwd=folder
                )
        except OSError as error:
            raise RequestError(f"{shown(python)} cannot be started ({error.strerror}): give a Python") from error
        self._answer()

    def measure(self, asked: dict[str, Any]) -> float:
        """One measurement."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = self._said.read_text(errors="replace").strip().splitlines()[-1:]
            raise RequestError(f"the version of {self._python} cannot be measured: {' '.join(last) or 'it ended'}")
        return json.loads(line)


@dataclass(frozen=True)
class Versus:
    """Holds this version against that of another environment: throughput of searches, and the host's work a row.

    The exit code is 1 if a row of this version is slower by more than the threshold.
    """

    other: Positional[Path]
    """The Python of an environment that the other version is installed in; it is the one before."""
    prompts: tuple[int, ...] = (1, 4, 16, 64)
    """How many prompts share an engine in a measurement of throughput."""
    methods: tuple[str, ...] = ("rbf", "bon")
    """The searches."""
    live: tuple[int, ...] = (1, 10, 100, 1000)
    """Requests at a time in a measurement of the host's work."""
    nfe: int = 100
    """Budget of each request."""
    model: str = "shapes"
    """Which model."""
    lanes: int | None = None
    """Lanes of both; by default what each measures as best."""
    repetitions: int = 7
    """Pairs of measurements of each row, after one that does not count."""
    threshold: float = 0.03
    """By how much a ratio may be above 1."""
    json: Path | None = None
    """A file for the rows."""

    def __call__(self) -> None:
        """Measures, prints the table, writes the file."""
        if self.repetitions < 1:
            raise RequestError(f"repetitions={self.repetitions}: at least 1")
        outputs.check_file(self.json)
        where, rows = environment(), list[dict[str, Any]]()
        with ExitStack() as open_sides:
            folder = Path(open_sides.enter_context(TemporaryDirectory()))
            sides = [Side(str(python), folder) for python in (self.other, sys.executable)]
            for side in sides:
                open_sides.callback(side.close)
            for asked in self._rows():
                pairs = [[side.measure(asked) for side in sides] for _ in range(1 + self.repetitions)][1:]
                rows.append(_row(asked, pairs))
                print(f"{_name(asked)}: {rows[-1]['ratio']:.3f}", flush=True)
        slower = [row for row in rows if row["ratio"] > 1 + self.threshold]
        Console().print(_table(rows))
        print(f"{len(slower)} of {len(rows)} rows are slower by more than {100 * self.threshold:g} %")
        if self.json:
            self.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
        if slower:
            raise SystemExit(1)

    def _rows(self) -> Iterator[dict[str, Any]]:
        shared = {"nfe": self.nfe, "model": self.model, "lanes": self.lanes}
        for count in self.live:
            yield {**shared, "command": "overhead", "method": self.methods[0], "prompts": count, "preview": False}
        for count in self.prompts:
            for method in self.methods:
                for preview in (False, True):
                    yield {**shared, "command": "throughput", "method": method, "prompts": count, "preview": preview}


def _row(asked: dict[str, Any], pairs: list[list[float]]) -> dict[str, Any]:
    """Medians of both sides, and of the ratios of neighbours, with the least and the greatest."""
    ratios = [after / before for before, after in pairs]
    before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
    named = {name: asked[name] for name in ("command", "method", "prompts", "nfe", "preview")}
    unit = UNITS[asked["command"]]
    found = {"before": before, "after": after, "ratio": statistics.median(ratios)}
    return {**named, "unit": unit, **found, "least": min(ratios), "greatest": max(ratios)}


def _name(asked: dict[str, Any]) -> str:
    return f"{asked['command']}, {asked['method']}{', preview' * asked['preview']}, {asked['prompts']}"


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="this version over the other")
    for column in ("of", "unit", "before", "after", "ratio", "least", "greatest"):
        table.add_column(column, justify="left" if column in ("of", "unit") else "right")
    for row in rows:
        numbers = (f"{row[name]:.3g}" for name in ("before", "after"))
        ratios = (f"{row[name]:.3f}" for name in ("ratio", "least", "greatest"))
        table.add_row(_name(row), row["unit"], *numbers, *ratios)
    return table
