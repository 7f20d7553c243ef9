"""Records what an engine does for a while: `with engine.profile(out) as p:` around any code that embeds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import rollflow

from rollflow.device.runner import Runner
from rollflow.errors import RollflowError
from rollflow.models import Traits
from rollflow.preparing import Preparations
from rollflow.profile import machine
from rollflow.profile.ledger import Ledger
from rollflow.profile.records import TABLES
from rollflow.profile.recording import Recording


class Profiling:
    """A context that records; what it recorded is there at its end, and in the folder, if one was given.

    Args:
        ledger: of the engine.
        about: says of the engine what `Recording.about` needs, at the end.
        out: a folder for `ledger.parquet`, the other tables, `trace.json.gz` and `report.html`; None for none.
        write: writes them.

    Attributes:
        recording: see `rollflow.profile.recording.Recording`; at the end.
    """

    def __init__(
        self,
        ledger: Ledger,
        about: Callable[[], Mapping[str, Any]],
        out: Path | None = None,
        write: Callable[[Recording, Path], None] | None = None,
    ):
        self._ledger, self._about, self._out, self._write = ledger, about, out, write
        self._recording: Recording | None = None
        self._since: dict[str, int] = {}
        self._begin = self._began = 0.0

    @property
    def recording(self) -> Recording:
        """What was recorded; raises `RollflowError` before the end."""
        if self._recording is None:
            raise RollflowError("a recording is there when its `with` block is over")
        return self._recording

    def __enter__(self) -> Profiling:
        self._since, self._begin, self._began = self._ledger.written, self._ledger.clock(), time.time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self._ledger.clock()
        tables = {name: self._ledger.table(name, self._since[name]) for name in TABLES}
        written, kept = self._ledger.written, {name: len(table) for name, table in tables.items()}
        forgotten = {name: written[name] - self._since[name] - kept[name] for name in TABLES}
        numbers = {*tables["requests"]["request"].tolist(), *np.unique(tables["rows"]["request"]).tolist()}
        specs = {str(number): spec for number, spec in [*self._ledger.specs.items()] if number in numbers}
        span = {"begin": self._begin, "end": end, "began": self._began}
        about = {**span, **self._about(), "specs": specs, "forgotten": forgotten}
        self._recording = Recording(**tables, about=about)
        if kind is None and self._out is not None and self._write is not None:
            self._write(self._recording, self._out)


def about(name: str, runner: Runner, preparations: Preparations, traits: Traits) -> dict[str, Any]:
    """What an engine runs on, as `Recording.about` has it.

    Args:
        name: of the model.
        runner, preparations: the engine's.
        traits: of the model.
    """
    model = runner.model
    sizes = []
    for geometry, cost in [*preparations.costs.items()]:
        sizes.append(
            {
                "geometry": asdict(geometry),
                "slots": preparations.slots(geometry),
                "seconds": {str(bucket): seconds for bucket, seconds in cost.seconds.items()},
                "bound": preparations.bounds.get(geometry),
            }
        )
    return {
        "model": name,
        "adapter": type(model).__name__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine.device_name(model.device),
        "cores": machine.cores(),
        "versions": {"rollflow": rollflow.__version__, **machine.versions()},
        "lanes": runner.lanes,
        "threads": runner.threads.threads,
        "parallel": runner.parallel,
        "preview": runner.preview,
        "buckets": [*runner.usual],
        "traits": asdict(traits),
        "sizes": sizes,
    }


def write(recording: Recording, out: Path) -> None:
    """Writes a recording into a folder."""
    recording.save(out)
