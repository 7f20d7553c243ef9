"""`rollflow profile diff`: what got slower between two recordings."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rollflow.cli.options import File, by_default
from rollflow.errors import RequestError

if TYPE_CHECKING:
    from rich.table import Table

    from rollflow.profile.diff.comparing import Change, Diff
    from rollflow.profile.diff.quantities import Part

WIDTH = 120  # where standard output is no terminal
SHOWN = (  # groups, their title, and whether also those are listed that are the same
    (("overall", "nfe"), "the recording, and NFE for each that was kept", True),
    (("seconds",), "seconds by stage for each NFE that was kept", False),
    (("rows",), "seconds by stage for each row that ran", False),
    (("kinds",), "seconds of lanes by what rows were for, for each NFE that was kept", False),
    (("buckets",), "seconds of a batch by its size", False),
)
SCALE = {"s": (1e3, "ms"), "s/NFE": (1e3, "ms/NFE"), "s/row": (1e3, "ms/row")}  # of small times
Percent = Annotated[float | None, by_default("0 is the exit code, whatever got slower", metavar="PERCENT")]
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]


@dataclass(frozen=True)
class ProfileDiff:
    """Say what got slower from one recording to another, by stage and kind of row, beyond the noise.

    A folder is that of a recording, or holds several in folders, repetitions of the same. With four or more in all, the
    noise is what repetitions differ by; with fewer, what batches differ by within a recording, and nothing is known of
    the noise from run to run. Something is called slower where the 95 % interval of its change excludes 0, and the
    change is at least 1 % of its time in A.
    """

    a: tyro.conf.Positional[Folder]
    """What is compared with."""
    b: tyro.conf.Positional[Folder]
    """What may have got slower."""
    json: File = None
    """A file for all figures."""
    fail_above: Percent = None
    """Exit with code 1 where something is called slower and is so by more than this, in percent of its time in A."""

    def __call__(self) -> int:
        """Runs the command; returns 1 where something is slower than allowed."""
        from rollflow.bench import outputs
        from rollflow.profile.diff.comparing import diff, recordings

        limit = self.fail_above
        if limit is not None and not (math.isfinite(limit) and limit >= 0):
            raise RequestError(f"--fail-above {limit:g}: it must be a percentage of at least 0")
        outputs.check_file(self.json)
        found = diff(recordings(self.a), recordings(self.b))
        if self.json is not None:
            folders = {"folders": {"a": str(self.a), "b": str(self.b)}}
            content = json.dumps({**folders, **found.record()}, indent=2, allow_nan=False)
            self.json.write_text(content + "\n", encoding="utf-8")
        print_diff(found)
        if limit is None or not (failing := found.slower(limit / 100)):
            return 0
        names = ", ".join(f"{_place(one)} {100 * one.loss:+.1f} %" for one in failing)
        print(f"slower by more than {limit:g} %: {names}")
        return 1


def print_diff(found: Diff) -> None:
    """What changed, as tables."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    for name, side in (("A", found.a), ("B", found.b)):
        many = side["recordings"]
        say(
            f"{name}: {side['model']}, {side['device']}, {side['dtype']}, {side['lanes']:g} lanes; "
            f"{f'means of {many} recordings' if many > 1 else '1 recording'}: {side['wall_seconds']:.3f} s, "
            f"{side['batches']:.6g} batches, {side['committed_nfe']:.6g} NFE kept, {side['executed_rows']:.6g} rows run"
        )
    for warning in found.warnings:
        say(f"not alike: {warning}")
    say(_sentence(found))
    console.print(_parts(found))
    for groups, title, everything in SHOWN:
        own = [one for one in found.changes if one.group in groups]
        listed = [one for one in own if everything or one.verdict not in ("same", "unknown")]
        if listed:
            console.print(_table(sorted(listed, key=lambda one: -abs(one.share)) if not everything else listed, title))
        if left := len(own) - len(listed):
            say(f"{title}: {left} {'more ' if listed else ''}are the same or not known")


def _sentence(found: Diff) -> str:
    """What is slower, in words."""
    stages = sorted(found.of("speed").values(), key=lambda one: -abs(one.share))
    named = {word: [f"{o.name} {_percent(o)}" for o in stages if o.verdict == word] for word in ("slower", "faster")}
    words = "; ".join(f"{word}: {', '.join(names)}" for word, names in named.items() if names)
    wall = found.of("overall")["wall"]
    return (
        f"{words or 'no stage is slower or faster in batches of the same size, beyond the noise'}; wall {wall.a:.3f} s "
        f"to {wall.b:.3f} s ({_verdict(wall)})" + ("" if found.repeated else "; the noise between runs is not known")
    )


def _percent(change: Change) -> str:
    """A change with its interval."""
    if change.change is None:
        return ""
    if change.low is None or change.high is None:
        return f"{_hundreds(change.change)} %"
    return f"{_hundreds(change.change)} % ({_hundreds(change.low)} to {_hundreds(change.high)})"


def _hundreds(share: float) -> str:
    return ">+999" if share > 9.99 else f"{100 * share:+.{1 if abs(share) < 1 else 0}f}"


def _verdict(change: Change) -> str:
    if change.verdict == "unknown":
        return "not known from one run"
    if change.verdict != "same":
        return change.verdict
    inside = change.low is not None and change.high is not None and change.low <= 0 <= change.high
    return "same within noise" if inside else "negligible"


def _parts(found: Diff) -> Table:
    """Where the lanes' seconds went and why they changed; threads beside the lanes below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    noise = "between recordings" if found.repeated else "between batches: that from run to run is not known"
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="seconds of the lanes, and of threads beside them; the largest change first",
        caption="slower: batches of the same size took longer; packing: the same rows in batches of other sizes; rows: "
        "more of them,\nat the mean price of one; other: no batches. These add up to the change. A batch: against "
        f"batches of the same size,\nwith 95 % intervals for all stages at once; the noise is that {noise}",
    )
    names = "", "A", "B", "B - A", "of A", "slower", "packing", "rows", "other", "a batch", ""
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i in (0, 10) else "right", no_wrap=i > 0)
    speeds, whole = found.of("speed"), found.a["lane_seconds"]
    for lane in (True, False):
        own = [part for part in found.parts if part.lane is lane]
        for part in own:
            change = speeds.get(part.name)
            told = (
                ("", "")
                if change is None
                else (_percent(change), _verdict(change).removesuffix(" within noise").removesuffix(" from one run"))
            )
            table.add_row(part.name, *_split([part], whole), *told)
        if lane:
            table.add_row("all lanes", *_split(own, whole), "", "", end_section=True)
    return table


def _split(parts: Sequence[Part], whole: float) -> list[str]:
    a, b = sum(part.a for part in parts), sum(part.b for part in parts)
    terms = [sum(getattr(part, name) for part in parts) for name in ("speed", "packing", "work", "other")]
    change = f"{b - a:+.3f}", f"{100 * (b - a) / whole:+.1f} %"
    return [f"{a:.3f}", f"{b:.3f}", *change, *(f"{term:+.3f}" if abs(term) >= 5e-4 else "" for term in terms)]


def _table(listed: Sequence[Change], title: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, title=title)
    for i, name in enumerate(("", "A", "B", "unit", "change", "")):
        table.add_column(name, justify="right" if i in (1, 2, 4) else "left", no_wrap=True)
    for one in listed:
        factor, unit = SCALE[one.unit] if one.unit in SCALE and max(one.a, one.b) < 1 else (1.0, one.unit)
        table.add_row(one.name, f"{factor * one.a:.4g}", f"{factor * one.b:.4g}", unit, _percent(one), _verdict(one))
    return table


def _place(change: Change) -> str:
    """A quantity with its group, as the last line names it."""
    return change.name if change.group in ("speed", "overall") else f"{change.name} ({change.group})"
