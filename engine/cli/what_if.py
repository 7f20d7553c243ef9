"""`rollflow what-if`: what a recorded run would take with something changed, and how many GPUs a load takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rollflow.cli.options import by_default
from rollflow.errors import RequestError, shown

if TYPE_CHECKING:
    from rollflow.whatif.changes import Change
    from rollflow.whatif.replay import Replay

MANY = 200  # requests that come at a rate, where nothing is said of their number
FAR = 0.25  # a correction that says that the replay is not like the recording
Factor = Annotated[str, tyro.conf.arg(metavar="0.5x")]
Number = Annotated[int | None, by_default("as recorded")]
Rate = Annotated[float | None, by_default("as recorded")]


@dataclass(frozen=True)
class WhatIf:
    """Predict what a recorded run would take with something changed, without a device.

    The recorded requests run through the real scheduler on a simulated clock; batches take what they were measured
    to take. `--rate 20 --p95 5` says how many GPUs that load takes.
    """

    recording: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="DIR")]] = None
    """A folder that `rollflow profile --out` wrote."""
    nfe: Number = None
    """Budget of every request."""
    prompts: Number = None
    """How many requests; those recorded come in turns. With a rate 200, where nothing is said."""
    rate: Rate = None
    """Requests a second, arriving by chance."""
    p95: Annotated[float | None, by_default("none")] = None
    """Seconds that 95 of 100 requests may take: how many GPUs keep them at this rate?"""
    bucket: Number = None
    """The largest batch."""
    lanes: Number = None
    """Batches on the device at a time."""
    gpus: int = 1
    """Engines, each on a device of its own."""
    method: Annotated[str | None, by_default("as recorded")] = None
    """Search method of every request, with its default options."""
    forward: Factor = "1x"
    """The network's time: 0.5x is twice as fast."""
    decode: Factor = "1x"
    """The decoder's time."""
    reward: Factor = "1x"
    """The rewards' time."""
    host: Factor = "1x"
    """The host's time for a batch."""
    seed: int = 0
    """Of arrivals."""
    json: Path | None = None
    """A file for the table."""

    def __call__(self) -> None:
        """Runs the command."""
        if self.recording is None:
            raise RequestError("give the folder of a recording: rollflow what-if DIR --decode 0.5x")
        from rollflow.bench.outputs import check_file
        from rollflow.profile.recording import Recording
        from rollflow.whatif.replay import Replay

        change = self._change()
        check_file(self.json)
        if self.p95 is not None and (self.gpus != 1 or self.prompts is not None):
            raise RequestError("--p95 finds how many GPUs, with as many requests as that takes: no --gpus, --prompts")
        if self.rate is not None and self.prompts is None and self.p95 is None:
            change = replace(change, prompts=MANY)
        replay = Replay(Recording.load(self.recording))
        console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120)
        for note in replay.notes:
            console.print(f"note: {note}", highlight=False)
        rows = (self._changed if self.p95 is None else self._fleets)(replay, change, console)
        off = abs(1 / replay.correction - 1)
        if off > FAR:
            console.print("note: that is far off: something is in this recording that a replay does not have")
        console.print(
            f"the replay of the recording itself is {off:.1%} {'above' if replay.correction < 1 else 'below'} the "
            f"{replay.recorded:.2f} s that it took; predictions are corrected by that",
            highlight=False,
        )
        if self.json is not None:
            self.json.write_text(json.dumps({"correction": replay.correction, "rows": rows}, indent=1) + "\n")

    def _change(self) -> Change:
        from rollflow.whatif.changes import Change

        numbers = {
            name: getattr(self, name) for name in ("nfe", "prompts", "rate", "bucket", "lanes", "gpus", "method")
        }
        factors: dict[str, Any] = {
            name: _factor(name, getattr(self, name)) for name in ("forward", "decode", "reward", "host")
        }
        return Change(**numbers, **factors, seed=self.seed)

    def _changed(self, replay: Replay, change: Change, console: Console) -> list[dict[str, Any]]:
        from rollflow.whatif.changes import Change
        from rollflow.whatif.scenarios import scenarios

        asked = str(change) != str(Change())
        rows = scenarios(replay, [change] if asked else None)
        if asked and len(rows) == 1:
            replay.run(change)  # says why it cannot be
        console.print(_table(rows))
        return rows

    def _fleets(self, replay: Replay, change: Change, console: Console) -> list[dict[str, Any]]:
        from rollflow.whatif.capacity import capacity

        assert self.p95 is not None
        fleets = [*capacity(replay, change, self.p95)]
        table = Table(box=SIMPLE_HEAD, title=f"{change}, p95 at most {self.p95:g} s")
        for name in ("GPUs", "load", "p50 s", "p95 s", ""):
            table.add_column(name, justify="right")
        for fleet in fleets:
            word = "enough" if fleet.enough else "overloaded" if fleet.load >= 1 else "too slow"
            table.add_row(str(fleet.gpus), f"{fleet.load:.0%}", f"{fleet.p50:.2f}", f"{fleet.p95:.2f}", word)
        console.print(table)
        return [asdict(fleet) for fleet in fleets]


def _factor(name: str, text: str) -> float:
    try:
        return float(text.removesuffix("x"))
    except ValueError:
        raise RequestError(f"--{name} {shown(text)}: it must be a factor of its time, such as 0.5x") from None


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("what if", "seconds", "NFE/s", "speed", "p50 s", "p95 s", "occupancy"):
        table.add_column(name, justify="left" if name == "what if" else "right")
    for row in rows:
        table.add_row(
            row["name"], f"{row['seconds']:.2f}", f"{row['nfe_per_second']:.0f}", f"{row['speedup']:.2f}x",
            f"{row['p50']:.2f}", f"{row['p95']:.2f}", f"{row['occupancy']:.0%}",
        )  # fmt: skip
    return table
