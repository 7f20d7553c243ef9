"""Records what an engine does for a while: `with engine.profile(out) as p:` around any code that embeds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from rollflow.device.runner import Runner
from rollflow.errors import RequestError, RollflowError
from rollflow.job import Job
from rollflow.looks import MOMENTS, Looks
from rollflow.models import Traits
from rollflow.preparing import Preparations
from rollflow.profile import machine
from rollflow.profile.ledger import Ledger
from rollflow.profile.recording import Recording

FORETOLD = 20_000  # rows of a recording that is replayed for its report; of larger ones `rollflow what-if` does it
Write = Callable[[Recording, Path, Mapping[str, Any] | None], None]


class Profiling:
    """A context that records; what it recorded is there at its end, and in the folder, if one was given.

    Args:
        ledger: of the engine.
        about: says of the engine what `Recording.about` needs, at the end.
        out: a folder for what `write` writes; None for none.
        write: writes it.
        kernels: whether to record what torch runs, too, for the first seconds.

    Attributes:
        recording: see `rollflow.profile.recording.Recording`; at the end.
    """

    def __init__(
        self,
        ledger: Ledger,
        about: Callable[[], Mapping[str, Any]],
        out: Path | None = None,
        write: Write | None = None,
        kernels: bool = False,
    ):
        self._ledger, self._about, self._out, self._write = ledger, about, out, write
        self._recording: Recording | None = None
        self._looks, self._kernels = Looks(ledger.clock), None
        if kernels:
            from rollflow.profile.trace.kernels import Kernels

            self._kernels = Kernels()
        self._since: dict[str, int] = {}
        self._begin = self._began = 0.0

    @property
    def recording(self) -> Recording:
        """What was recorded; raises `RollflowError` before the end."""
        if self._recording is None:
            raise RollflowError("a recording is there when its `with` block is over")
        return self._recording

    def follow(self, jobs: Sequence[Job], moments: Sequence[float] = MOMENTS) -> None:
        """Waits for jobs, whatever becomes of them, and takes pictures of the first few on their way for the report.

        Args:
            jobs: of the engine that is profiled.
            moments: shares of their budgets after which a picture is taken, ascending; each costs a decode.
        """
        self._looks.follow(jobs, moments)

    def __enter__(self) -> Profiling:
        if self._kernels is not None:
            self._kernels.__enter__()
        self._begin, self._began, self._since = self._ledger.clock(), time.time(), self._ledger.written
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (tables, forgotten, specs), end = self._ledger.snapshot(self._since), self._ledger.clock()
        if self._kernels is not None:
            self._kernels.__exit__(kind, error, trace)
        numbers = np.union1d(tables["requests"]["request"], tables["rows"]["request"]).tolist()
        asked = {str(number): specs[number] for number in numbers if number in specs}
        span = {"begin": self._begin, "end": end, "began": self._began}
        looks = [] if self._out is None or kind is not None else self._looks.save(self._out)
        about = {**span, **self._about(), "specs": asked, "forgotten": forgotten, "looks": looks}
        self._recording = Recording(**tables, about=about)
        if kind is None and self._out is not None and self._write is not None:
            self._write(self._recording, self._out, None if self._kernels is None else self._kernels.trace)


def about(name: str, runner: Runner, preparations: Preparations, traits: Traits) -> dict[str, Any]:
    """What an engine runs on, as `Recording.about` has it.

    Args:
        name: of the model.
        runner, preparations: the engine's.
        traits: of the model.
    """
    model, graphs = runner.model, preparations.graph_memory
    sizes = [
        {
            "geometry": asdict(geometry),
            "slots": preparations.slots(geometry),
            "seconds": {str(bucket): seconds for bucket, seconds in preparations.cost(geometry).seconds.items()},
            "measured": geometry in preparations.costs,
            "bound": preparations.bounds.get(geometry),
            "graph_bytes": sum(n for one, n in graphs.items() if one.plain == geometry.plain),
        }
        for geometry in runner.geometries
        if not (geometry.kept and geometry.plain in runner.geometries)  # tables tell sizes by their pixels
    ]
    return {
        "model": name,
        "adapter": type(model).__name__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine.device_name(model.device),
        "cores": machine.cores(),
        "versions": {"rollflow": version("rollflow"), **machine.versions()},
        "lanes": runner.lanes,
        "threads": runner.threads.threads,
        "parallel": runner.parallel,
        "preview": runner.preview,
        "buckets": [*runner.usual],
        "traits": asdict(traits),
        "sizes": sizes,
    }


def check_installed() -> None:
    """Raises `RequestError` where what writes profiles is not installed."""
    missing = [name for name in ("pyarrow", "jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise RequestError(f"profiles are written with {' and '.join(missing)}: pip install 'rollflow[profile]'")


def write(
    recording: Recording, out: Path, kernels: Mapping[str, Any] | None = None, usd_per_hour: float | None = None
) -> None:
    """Writes a recording into a folder: its tables as Parquet, `trace.json.gz` and `report.html`.

    Args:
        recording: what ran.
        out: the folder.
        kernels: what torch ran, for the trace, see `rollflow.profile.trace.kernels`.
        usd_per_hour: what the device costs, for the report.
    """
    from rollflow.profile import report, trace
    from rollflow.whatif.replay import Replay
    from rollflow.whatif.scenarios import scenarios

    recording.save(out)
    trace.save(recording, out / "trace.json.gz", kernels)
    foretold: list[dict[str, Any]] = []
    if len(recording.rows) <= FORETOLD:
        with suppress(RollflowError):  # there is nothing to be replayed, as in a recording of no request
            foretold = scenarios(Replay(recording))
    report.save(recording, out / "report.html", out, foretold, usd_per_hour)
