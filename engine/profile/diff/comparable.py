"""Whether two sides' recordings are of the same thing, in words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollflow.errors import RequestError, line, shown
from rollflow.profile.recording import Recording
from rollflow.profile.records import FATES, WORK

SAME = ("model", "adapter", "device", "dtype", "machine")  # of repetitions of a side
LIKE = ("cores", "lanes", "threads", "parallel", "preview", "versions")


def alike(side: Sequence[Recording], name: str) -> None:
    """Makes sure that recordings are repetitions of one another.

    Raises:
        RequestError: there is none, or they are of different models, machines or requests.
    """
    if not side:
        raise RequestError(f"{name} is no recording at all: give at least one")
    for field in SAME:
        values = {json.dumps(one.about.get(field)) for one in side}
        if len(values) > 1:
            raise RequestError(
                f"the recordings of {name} differ in {field} ({line(', '.join(sorted(values)), 200)}): they are no "
                "repetitions; compare them one by one"
            )
    if any(_asked(one, seeds=False) != _asked(side[0], seeds=False) for one in side[1:]):
        raise RequestError(
            f"the recordings of {name} are of different requests: they are no repetitions; compare them one by one"
        )


def differences(a: Sequence[Recording], b: Sequence[Recording]) -> list[str]:
    """What differs between two sides though they are compared, and what spoils a recording, a line each."""
    found = []
    for field in (*SAME, *LIKE):
        first, second = (sorted({json.dumps(one.about.get(field)) for one in side}) for side in (a, b))
        if first != second:
            words = _changed(a[0].about, b[0].about, field) if field == "versions" else _against(first, second)
            found.append(f"another {field}: {words}")
    first, second = (sorted({size for one in side for size in _sizes(one)}) for side in (a, b))
    if first != second:
        found.append(f"other image sizes: {_against(first, second)}")
    found += _requests(a[0], b[0])
    for name, side in (("A", a), ("B", b)):
        states = Counter(FATES[state] for one in side for state in one.requests["state"])
        if other := {state: count for state, count in states.items() if state != "done"}:
            words = ", ".join(f"{count} {state}" for state, count in sorted(other.items()))
            found.append(f"{name} has requests that came to no image: {words} of {sum(states.values())}")
        lost = sum(sum(one.about.get("forgotten", {}).values()) for one in side)
        if lost:
            found.append(f"{name} lost {lost} of its entries: its ledger was full; record for a shorter time")
    return found


def _against(first: Sequence[str], second: Sequence[str]) -> str:
    return f"{line(' and '.join(first), 150) or 'none'} against {line(' and '.join(second), 150) or 'none'}"


def _changed(a: Mapping[str, Any], b: Mapping[str, Any], field: str) -> str:
    first, second = a.get(field) or {}, b.get(field) or {}
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return ", ".join(f"{name} {first.get(name)} against {second.get(name)}" for name in names)


def _sizes(recording: Recording) -> set[str]:
    """Image sizes of its batches."""
    batches = recording.batches[recording.batches["work"] <= WORK.index("images")]
    sizes = np.unique(batches[["height", "width", "frames"]])
    return {f"{one['height']}x{one['width']}" + (f", {one['frames']} frames" if one["frames"] else "") for one in sizes}


def _asked(recording: Recording, seeds: bool) -> Counter[str]:
    """What its requests asked for, as text."""
    return Counter(
        json.dumps({name: value for name, value in spec.items() if seeds or name != "seed"}, sort_keys=True)
        for spec in recording.specs.values()
    )


def _requests(a: Recording, b: Recording) -> list[str]:
    first, second = _asked(a, seeds=False), _asked(b, seeds=False)
    if first == second:
        return [] if _asked(a, seeds=True) == _asked(b, seeds=True) else ["the same requests with other seeds"]
    both = (first & second).total()
    found = f"other requests: {first.total()} against {second.total()}, of which {both} ask for the same"
    if not both and first and second:
        one, other = (json.loads(next(iter(asked))) for asked in (first, second))
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        found += "; the first differ in " + ", ".join(
            f"{name} ({shown(one.get(name), 40)}, {shown(other.get(name), 40)})" for name in names[:4]
        )
    return [found]
