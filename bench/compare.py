"""What changed between two result files: `python -m rollflow.bench compare BEFORE AFTER`.

Rows are matched by what they are of (`IDENTITY`), and each known measurement of a pair is divided, after by before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from rollflow.bench import outputs
from rollflow.errors import RequestError, shown

Row = dict[str, Any]
Key = tuple[tuple[str, str], ...]

IDENTITY = (
    "command", "contender", "part", "claim", "ahead", "of", "kernel", "model", "reward", "label", "method", "path",
    "set", "prompts", "seed", "seeds", "nfe", "steps", "level", "point", "mode", "bucket", "geometry", "height",
    "width", "rows", "token", "channel", "dtype", "concurrency", "load",
)  # fmt: skip
"""The keys that say what a row is of; a row is known by those of them that it has."""

HIGHER_IS_BETTER = (
    "nfe_per_second", "images_per_second", "requests_per_second", "efficiency", "gigabytes_per_second",
)  # fmt: skip
LOWER_IS_BETTER = (
    "executed_over_committed", "peak_memory_bytes", "milliseconds_per_nfe", "seconds", "host_microseconds_per_row",
    "host_microseconds_per_tick", "seconds_to_first_update_p50", "seconds_to_first_update_p95",
    "seconds_to_first_update_p99", "seconds_to_result_p50", "seconds_to_result_p95", "seconds_to_result_p99",
)  # fmt: skip
MEASUREMENTS = HIGHER_IS_BETTER + LOWER_IS_BETTER

EXPECTED_TO_DIFFER = ("date", "commit")  # of two environments; anything else may be why a figure changed


class Results(NamedTuple):
    """A result file: its rows by identity, in the file's order, and its environment, None if it has none."""

    rows: dict[Key, Row]
    environment: Row | None


class Change(NamedTuple):
    """One measurement of one pair of rows.

    Attributes:
        key: the rows' identity.
        measurement: which of `MEASUREMENTS`.
        before: its value in the first file; None where it has none.
        after: its value in the second file; None where it has none.
    """

    key: Key
    measurement: str
    before: float | None
    after: float | None

    @property
    def ratio(self) -> float | None:
        """After over before: 1 of two zeros, infinite where only before is 0, None where a value is missing."""
        if self.before is None or self.after is None:
            return None
        if self.before == 0:
            return 1.0 if self.after == 0 else math.inf
        return self.after / self.before

    def verdict(self, threshold: float) -> str:
        """`worse` or `better` if the ratio is more than `threshold` away from 1; else nothing, or where it is missing.

        With `threshold` 0.05 a throughput is worse below a ratio of 0.95, and a time above 1.05.
        """
        if self.ratio is None:
            return "only before" if self.after is None else "only after"
        if abs(self.ratio - 1) <= threshold + 1e-9:  # 95 of 100 is not worse than 5 % less, rounded as it may be
            return ""
        return "better" if (self.ratio > 1) == (self.measurement in HIGHER_IS_BETTER) else "worse"


@dataclass(frozen=True)
class Compare:
    """Compares two result files of the bench commands, row by row.

    The exit code is 1 if a measurement of a matched row got worse by more than the threshold, 2 if the files cannot be
    compared, else 0: a row or a measurement that only one file has is said, and does not fail.
    """

    before: Positional[Path]
    """The JSON file to compare with: a list of rows, or an object that has them as "rows"."""
    after: Positional[Path]
    """The JSON file to judge."""
    threshold: float = 0.05
    """How far a ratio may be from 1 before it counts as worse or better."""

    def __call__(self) -> None:
        """Prints every ratio, what only one file has and in what the environments differ.

        Raises:
            RequestError: a file cannot be read or holds no results, or nothing in the two can be compared.
            SystemExit: with code 1, if something got worse.
        """
        if not 0 <= self.threshold < 1:
            raise RequestError(f"threshold={self.threshold}: at least 0 and less than 1, say 0.05 for 5 %")
        before, after = load(self.before), load(self.after)
        found = changes(before, after)
        if all(change.ratio is None for change in found):
            raise RequestError(
                f"no measurement is in both {shown(str(self.before))} and {shown(str(self.after))}: rows match by "
                f"{', '.join(_names(before, after))}, measurements are {', '.join(MEASUREMENTS)}"
            )
        console, worse = Console(), [c for c in found if c.verdict(self.threshold) == "worse"]
        lines = [
            *_report(found, self.threshold),
            *(Text(f"only before: {_text(key)}") for key in before.rows if key not in after.rows),
            *(Text(f"only after: {_text(key)}") for key in after.rows if key not in before.rows),
            *(Text(f"warning: {line}", style="yellow") for line in disagreements(before, after)),
            Text(f"{len(worse)} of {len(found)} measurements got worse by more than {100 * self.threshold:g} %"),
        ]
        for line in lines:
            console.print(line, soft_wrap=True)
        if worse:
            raise SystemExit(1)


def load(file: Path) -> Results:
    """The results in a file.

    Raises:
        RequestError: it cannot be read, is no JSON, holds no rows, or two of its rows have the same identity.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"the results {shown(str(file))} cannot be read: {outputs.reason(error)}") from error
    except ValueError as error:  # of the encoding as of the syntax
        raise RequestError(f"the results {shown(str(file))} are not JSON: {outputs.reason(error)}") from error
    listed, where = (content.get("rows"), content.get("environment")) if isinstance(content, dict) else (content, None)
    if not isinstance(listed, list) or not listed or not all(isinstance(row, dict) for row in listed):
        raise RequestError(
            f"there are no results in {shown(str(file))}: expected a list of rows, or an object with such a list "
            "as 'rows'"
        )
    rows: dict[Key, Row] = {}
    for row in listed:
        key = tuple((name, str(row[name])) for name in IDENTITY if row.get(name) is not None)
        if key in rows:
            raise RequestError(
                f"two rows of {shown(str(file))} are of the same ({_text(key)}): no key that compare knows "
                "tells them apart"
            )
        for name in MEASUREMENTS:
            value = _number(row, name)
            if value is not None and not 0 <= value < math.inf:
                raise RequestError(
                    f"{name} is {value} in {shown(str(file))} ({_text(key)}): a finite number, not negative, is "
                    "expected"
                )
        rows[key] = row
    return Results(rows, where if isinstance(where, dict) else None)


def changes(before: Results, after: Results) -> list[Change]:
    """Every measurement of the rows that both files have, in the order of the first."""
    return [
        Change(key, name, old, new)
        for key in before.rows
        if key in after.rows
        for name in MEASUREMENTS
        for old, new in [(_number(before.rows[key], name), _number(after.rows[key], name))]
        if old is not None or new is not None
    ]


def disagreements(before: Results, after: Results) -> list[str]:
    """In what the environments differ beyond date and commit: machine, versions, threads. A line each."""
    old, new = before.environment, after.environment
    if old is None or new is None:
        sides = [side for side, where in (("before", old), ("after", new)) if where is None]
        return [f"no environment in {' and '.join(sides)}: machines and versions may differ"]
    return [
        f"{name} was {old.get(name, 'not given')} before and is {new.get(name, 'not given')} after"
        for name in dict.fromkeys((*old, *new))
        if name not in EXPECTED_TO_DIFFER and old.get(name) != new.get(name)
    ]


def _number(row: Row, name: str) -> float | None:
    """The measurement, None where the row has none or has a list of them."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _names(*files: Results) -> list[str]:
    """The identity keys that occur."""
    used = {name for results in files for key in results.rows for name, _ in key}
    return [name for name in IDENTITY if name in used]


def _text(key: Key) -> str:
    return ", ".join(f"{name} {value}" for name, value in key) or "no identity"


def _report(found: list[Change], threshold: float) -> Iterator[Text]:
    """A heading for each pair of rows, then a line a measurement; first, once, the identity that all pairs share."""
    pairs = {change.key: [c for c in found if c.key == change.key] for change in found}
    shared = set.intersection(*(set(key) for key in pairs)) if len(pairs) > 1 else set()
    if shared:
        yield Text(f"of all: {_text(tuple(part for part in next(iter(pairs)) if part in shared))}")
    for key, of_pair in pairs.items():
        yield Text(_text(tuple(part for part in key if part not in shared)), style="bold")
        for change in of_pair:
            verdict = change.verdict(threshold)
            before, after = (f"{'-' if v is None else f'{v:.4g}':>10}" for v in (change.before, change.after))
            ratio = "-" if change.ratio is None else f"{change.ratio:.3f}"
            line = f"  {change.measurement:28} {before} -> {after}   after/before {ratio:>8}  {verdict}"
            yield Text(line.rstrip(), style={"worse": "bold red", "better": "green"}.get(verdict, ""))
