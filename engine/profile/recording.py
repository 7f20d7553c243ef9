"""A recording: the ledger's tables over a span of time, and what they were recorded on; in memory or in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rollflow.errors import RequestError, said, shown
from rollflow.profile import export
from rollflow.profile.accounts import Cost, Lane, costs, lanes
from rollflow.profile.records import TABLES

FILES = {
    "rows": "ledger.parquet",
    "batches": "batches.parquet",
    "calls": "calls.parquet",
    "requests": "requests.parquet",
}
ABOUT = "recording.json"
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Recording:
    """What ran between two times.

    Attributes:
        rows, batches, calls, requests: the ledger's entries that were written then, see `rollflow.profile.records`. A
            request that came before has rows and a spec, but no entry of its own.
        about: what it was recorded on, as JSON holds it: "begin" and "end" (seconds of the ledger's clock) and
            "began" (of the epoch, when that was "begin"); "model", "adapter", "device", "dtype", "machine", "cores" and
            "versions"; of the engine "lanes", "threads", "parallel", "preview", "buckets" and "traits"; "sizes", for
            each image size its geometry, slots, the measured seconds of a batch by bucket, and the bytes that CUDA
            graphs hold; "specs", by request what was asked, see `rollflow.specs`; "forgotten", how many entries of each
            table were lost.
    """

    rows: np.ndarray
    batches: np.ndarray
    calls: np.ndarray
    requests: np.ndarray
    about: Mapping[str, Any]

    @property
    def begin(self) -> float:
        """Its first second, of the ledger's clock."""
        return float(self.about["begin"])

    @property
    def end(self) -> float:
        """Its last second."""
        return float(self.about["end"])

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin

    @property
    def specs(self) -> dict[int, Mapping[str, Any]]:
        """What each request asked for."""
        return {int(number): spec for number, spec in self.about["specs"].items()}

    @cached_property
    def costs(self) -> dict[int, Cost]:
        """What each request cost."""
        return costs(self.rows, self.batches, self.calls, self.specs)

    @cached_property
    def lanes(self) -> list[Lane]:
        """What each lane did."""
        return lanes(self.batches, self.begin, self.end)

    def save(self, folder: str | Path) -> Path:
        """Writes the tables as Parquet and the rest as JSON into a folder, which is made; returns the folder.

        Raises:
            RequestError: pyarrow is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, file in FILES.items():
            export.save(getattr(self, name), folder / file)
        content = json.dumps({"format": FORMAT, **self.about}, indent=1)
        (folder / ABOUT).write_text(content + "\n", encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """Reads what `save` wrote.

        Raises:
            RequestError: there is no recording in this folder, or not one of this format.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            if (folder / "1" / ABOUT).exists():
                raise RequestError(
                    f"{shown(str(folder))} holds repetitions: give one of them, such as {shown(str(folder / '1'))}"
                ) from error
            why = "" if isinstance(error, FileNotFoundError) else f" ({said(error)})"
            raise RequestError(
                f"{shown(str(folder))} holds no recording{why}: give a folder that `rollflow profile` wrote"
            ) from error
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise RequestError(f"{shown(str(folder / ABOUT))} is of another format than {FORMAT}: record it again")
        del about["format"]
        return cls(**{name: export.load(folder / FILES[name], name) for name in TABLES}, about=about)
