"""Arrows between slices of a trace, and its counters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from rollflow.profile.records import WORK
from rollflow.profile.trace.format import EIGHTHS, MISSING, Placed, Tracks, Unit, arrow, counter, eighths
from rollflow.profile.trace.slices import Slices

POINTS = 100  # of the rate of NFE, at most
SHORTEST = 0.1  # seconds that one of its points stands for, at least
SEARCHING = tuple(WORK.index(work) for work in ("rows", "guided"))  # batches with rows of searches


def answers(slices: Slices, numbers: Iterator[int]) -> list[Unit]:
    """From the forward of each draw to the calls of its rewards, and on to where the loop takes it back.

    Args:
        slices: that are placed.
        numbers: for arrows.
    """
    found, called = [], set()
    for i, batch in enumerate(slices.recording.calls["batch"].tolist()):
        if (source := slices.sources.get(batch)) is None:
            continue
        called.add(batch)
        call = slices.calls[i]
        stops = [(source, max(source.start, min(source.last, call.start))), (call, call.start)]
        if (back := slices.decides.get(batch)) is not None and back.last >= call.start:
            stops.append((back, max(back.start, min(back.last, call.end))))
        found.append((batch, stops))
    for batch, source in slices.sources.items():  # not judged
        if batch not in called and (back := slices.decides.get(batch)) is not None:
            found.append((batch, [(source, source.last), (back, back.last)]))
    return [
        Unit(float(stops[-1][1] - stops[0][1]), arrow(next(numbers), "answer", stops, {"batch": batch}))
        for batch, stops in found
        if _in_order(stops)
    ]


def parents(slices: Slices, numbers: Iterator[int]) -> list[Unit]:
    """From the finish of each row's parent to its propose: one arrow from batch to batch, for however many rows."""
    rows = slices.recording.rows
    made: dict[tuple[int, int], int] = {}  # of each row its latest batch: one that failed runs again
    pairs: Counter[tuple[int, int]] = Counter()
    columns = (rows[name].tolist() for name in ("request", "number", "origin", "batch"))
    for request, number, origin, batch in zip(*columns, strict=True):
        if origin >= 0 and (before := made.get((request, origin))) is not None:
            pairs[before, batch] += 1
        if number >= 0:
            made[request, number] = batch
    found = []
    for (before, batch), many in pairs.items():
        parent, child = slices.exits.get(before), slices.entries.get(batch)
        if parent is not None and child is not None:
            stops = [(parent, min(parent.last, child.start)), (child, child.start)]
            if _in_order(stops):
                args = {"from batch": before, "to batch": batch, "rows": many}
                found.append(Unit(float(many), arrow(next(numbers), "parent", stops, args)))
    return found


def _in_order(stops: list[tuple[Placed, int]]) -> bool:
    """Whether each stop lies inside of its slice, and none before the last."""
    times = [when for _, when in stops]
    return times == sorted(times) and all(at.start <= when <= at.last for at, when in stops)


def counters(slices: Slices, tracks: Tracks, most: int) -> tuple[list[Unit], dict[str, int]]:
    """Live and queued requests, rows in flight, free lanes, and NFE a second; a unit each.

    Slots that are free are none of them: the ledger does not know when a search gives one back.

    Args:
        slices: that are placed.
        tracks: get the counters.
        most: values of each.

    Returns:
        The counters, and how many values of how many were left out.
    """
    recording, pid = slices.recording, tracks.process("counters")
    table, requests = recording.batches, recording.requests
    came, started, ended = (eighths(requests[name], recording.begin) for name in ("submitted", "started", "ended"))
    let_in = np.where(started == MISSING, ended, started)
    searching = np.isin(table["work"], SEARCHING)
    back = np.where(slices.times("decide_ended") == MISSING, slices.times("ended"), slices.times("decide_ended"))
    lanes = max([int(recording.about["lanes"]), *(table["lane"] + 1).tolist()])
    one, rows = np.ones(len(requests), np.int64), table["rows"][searching].astype(np.int64)
    ran = np.ones(len(table), np.int64)
    found = {
        "live requests": _steps(0, (started, one), (np.where(started == MISSING, MISSING, ended), -one)),
        "queued requests": _steps(0, (came, one), (let_in, -one)),
        "rows in flight": _steps(0, (slices.times("submitted")[searching], rows), (back[searching], -rows)),
        "free lanes": _steps(lanes, (slices.times("started"), -ran), (slices.times("ended"), ran)),
        "NFE per second": rate(slices),
    }
    units, of = [], 0
    for title, (times, values) in found.items():
        kept = thinned(times, values, most)
        units.append(Unit(-float(len(kept)), counter(pid, title, times[kept], values[kept])))
        of += len(times)
    kept_in_all = sum(-int(unit.weight) for unit in units)
    return units, {"left out": of - kept_in_all, "of": of}


def thinned(times: np.ndarray, values: np.ndarray, most: int) -> np.ndarray:
    """Which values of a counter are shown: its peaks stay.

    Where there are more than `most`, those are the lowest, the highest and the last of each of `most` / 3 stretches of
    time.
    """
    if len(times) <= most:
        return np.arange(len(times))
    stretches = times * (most // 3) // (int(times[-1]) + 1)
    by_value = np.lexsort((values, stretches))
    last = np.append(stretches[1:] != stretches[:-1], True)  # of its stretch, in either order
    first = np.append(True, last[:-1])
    return np.unique(np.concatenate([by_value[first], by_value[last], np.flatnonzero(last)]))


def _steps(first: int, *changes: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Times and values of a count that is `first` at 0 and changes by so much at those times."""
    times = np.concatenate([[0], *(times for times, _ in changes)])
    values = np.concatenate([[first], *(values for _, values in changes)])
    times, values = times[times != MISSING], values[times != MISSING]
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(values[order])


def rate(slices: Slices) -> tuple[np.ndarray, np.ndarray]:
    """Times, and NFE a second from each on, padding included; of a batch they are spread over its time on the lane."""
    recording = slices.recording
    points = int(np.clip(recording.seconds / SHORTEST, 1, POINTS))
    last = int(eighths(recording.end, recording.begin))
    edges = np.linspace(0, last, points + 1)
    done = np.zeros(points + 1)
    spent: dict[int, int] = {}
    rows = recording.rows
    for batch, nfe in zip(rows["batch"].tolist(), rows["nfe"].tolist(), strict=True):
        spent[batch] = spent.get(batch, 0) + nfe
    for batch, place in slices.batches.items():
        if nfe := spent.get(batch, 0):
            done += nfe * np.clip((edges - place.start) / max(1, place.end - place.start), 0.0, 1.0)
    each = np.diff(done) / np.maximum(np.diff(edges), 1) * EIGHTHS * 1e6
    return np.rint(edges).astype(np.int64), np.append(each.round(3), 0.0)
