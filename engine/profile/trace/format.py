"""Tracks of a trace, and what may lie on them, in the Trace Event format of chrome://tracing and Perfetto.

The format and its phases: Duca and Sinclair, "Trace Event Format". What the two viewers add to it:
slices of a track must nest, or Perfetto drops one that crosses another; it knows a thread by its tid alone, whatever
its pid, and takes 0 for the idle task; an arrow's two ends must have one category and one name.

Times are integers inside: eighths of a microsecond, which are exact in binary and whole nanoseconds, so that no viewer
rounds two neighbours into one another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

Event = dict[str, Any]
EIGHTHS = 8  # a microsecond
JITTER = 5 * EIGHTHS  # by so much a device's clock lets one thing begin before the last has ended
ROUNDING = 2  # eighths of a microsecond by which rounded calls stick out of their caller
ROWS = 100  # of a track, at most, which are shown below one another
MISSING = -1  # of a time that is not there

# Processes, as viewers call the groups of tracks, in the order that a trace asks for.
PROCESSES = ("counters", "lanes", "device", "decode", "rewards", "loop", "requests", "notes")


class Unit(NamedTuple):
    """Events that stay together: all of them are in a trace, or none."""

    weight: float  # of those of one sort, which go last: the heaviest stay
    events: list[Event]


class Placed(NamedTuple):
    """Where a slice lies: its track, and from when to when, in eighths of a microsecond."""

    pid: int
    tid: int
    start: int
    end: int

    @property
    def long(self) -> float:
        """How long it is, which is what it weighs."""
        return float(self.end - self.start)

    @property
    def last(self) -> int:
        """The last time that is inside of it."""
        return max(self.start, self.end - 1)


class Tracks:
    """Numbers and names of processes and threads.

    Attributes:
        names: the events that tell them.
    """

    def __init__(self) -> None:
        self.names: list[Event] = []
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[str, str], int] = {}

    def process(self, name: str) -> int:
        """The pid of a process: by its place in `PROCESSES`, or, of others, after those."""
        if name not in self._processes:
            known = name in PROCESSES
            pid = 1 + PROCESSES.index(name) if known else 1 + len(PROCESSES) + len(self._processes)
            self._processes[name] = pid
            self._name("process", pid, pid, name, pid)
        return self._processes[name]

    def thread(self, process: str, name: str, order: int = 0) -> tuple[int, int]:
        """The pid and tid of a thread."""
        pid = self.process(process)
        if (process, name) not in self._threads:
            tid = self._threads[process, name] = 1001 + len(self._threads)  # no tid is a pid or another's tid
            self._name("thread", pid, tid, name, order)
        return pid, self._threads[process, name]

    def rows(self, process: str, name: str, rows: np.ndarray, order: int = 0) -> list[tuple[int, int]]:
        """The pid and tid of each of the rows that a track takes where its slices overlap, from the first to the last.

        Args:
            rows: of the slices, see `packed`.
        """
        number = int(rows.max(initial=-1)) + 1  # a viewer may go by the tids, so they are given out in order
        names = [name if row == 0 else f"{name} ({row + 1})" for row in range(number)]
        return [self.thread(process, each, order * ROWS + row) for row, each in enumerate(names)]

    def _name(self, what: str, pid: int, tid: int, name: str, order: int) -> None:
        common = {"ph": "M", "pid": pid, "tid": tid}
        self.names.append({**common, "name": f"{what}_name", "args": {"name": name}})
        self.names.append({**common, "name": f"{what}_sort_index", "args": {"sort_index": order}})


def eighths(seconds: Any, begin: float) -> np.ndarray:
    """Times of a clock in eighths of a microsecond from `begin` on, not below 0; `MISSING` of those that are NaN."""
    seconds = np.asarray(seconds, dtype=np.float64)
    since = np.rint(np.maximum(seconds - begin, 0.0) * 1e6 * EIGHTHS)
    return np.where(np.isnan(seconds), MISSING, np.nan_to_num(since)).astype(np.int64)


def plain(value: Any) -> Any:
    """A value as JSON can hold it: None for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def piece(place: Placed, name: str, category: str, args: Event) -> Event:
    """A slice, phase X."""
    start, end = place.start / EIGHTHS, place.end / EIGHTHS
    return {
        "ph": "X", "name": name, "cat": category, "pid": place.pid, "tid": place.tid, "ts": start, "dur": end - start,
        "args": args,
    }  # fmt: skip


def instant(pid: int, tid: int, name: str) -> Event:
    """A mark across all tracks at the beginning, phase i."""
    return {"ph": "i", "s": "g", "name": name, "cat": "note", "pid": pid, "tid": tid, "ts": 0.0}


def spans(number: int, pid: int, category: str, parts: list[tuple[str, int, int, Event]]) -> list[Event]:
    """Phases b and e: one that has the others inside of it, which follow one another. The number is the process's."""
    common = {"cat": category, "id2": {"local": f"{number:#x}"}, "pid": pid, "tid": pid}

    def begin(name: str, start: int, args: Event) -> Event:
        return {"ph": "b", "name": name, **common, "ts": start / EIGHTHS, "args": args}

    def end(name: str, end: int) -> Event:
        return {"ph": "e", "name": name, **common, "ts": end / EIGHTHS}

    outer, *inner = parts
    events = [begin(outer[0], outer[1], outer[3])]
    for name, start, stop, args in inner:
        events += [begin(name, start, args), end(name, stop)]
    return [*events, end(outer[0], outer[2])]


def counter(pid: int, title: str, times: np.ndarray, values: np.ndarray) -> list[Event]:
    """A counter's values from these times on, phase C; of several at one time the last."""
    name, series = title.split(" ", 1)  # viewers put the two together
    keep = np.append(times[1:] != times[:-1], True)
    return [
        {"ph": "C", "name": name, "pid": pid, "tid": pid, "ts": when / EIGHTHS, "args": {series: value}}
        for when, value in zip(times[keep].tolist(), values[keep].tolist(), strict=True)
    ]


def arrow(number: int, name: str, stops: list[tuple[Placed, int]], args: Event | None = None) -> list[Event]:
    """Phases s, t and f: an arrow from slice to slice, each with the time at which it is met, inside of it."""
    phases = ["s", *"t" * (len(stops) - 2), "f"]
    events: list[Event] = [
        {"ph": phase, "name": name, "cat": name, "id": number, "pid": at.pid, "tid": at.tid, "ts": when / EIGHTHS}
        for phase, (at, when) in zip(phases, stops, strict=True)
    ]
    events[0]["args"] = args or {}
    events[-1]["bp"] = "e"  # it ends at the slice around it, not at the next
    return events


def packed(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Puts slices on as few rows as they need in order not to overlap.

    A slice that begins at most `JITTER` before the last of its row has ended begins at that end.

    Returns:
        Their rows, starts and ends.
    """
    rows = np.zeros(len(starts), np.int64)
    starts, ends = starts.copy(), np.maximum(starts, ends)
    until: list[int] = []  # of each row, when its last has ended
    for i in np.lexsort((ends, starts)).tolist():
        start = int(starts[i])
        row = next((row for row, end in enumerate(until) if end <= start + JITTER), len(until))
        if row == len(until):
            until.append(0)
        rows[i], starts[i] = row, max(start, until[row])
        until[row] = ends[i] = max(int(starts[i]), int(ends[i]))
    return rows, starts, ends


def nested(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Puts slices of a call stack on one row, and those that cross another on further rows.

    A slice that sticks out of the one around it by at most `ROUNDING` ends with it.

    Returns:
        Their rows and ends.
    """
    rows, ends = np.zeros(len(starts), np.int64), np.maximum(starts, ends)
    stacks: list[list[int]] = []  # of each row the ends of what is open
    for i in np.lexsort((-ends, starts)).tolist():
        start, end = int(starts[i]), int(ends[i])
        for row in range(len(stacks) + 1):
            if row == len(stacks):
                stacks.append([])
            stack = stacks[row]
            while stack and stack[-1] <= start:
                stack.pop()
            if not stack or end <= stack[-1] + ROUNDING:
                break
        end = min(end, stack[-1]) if stack else end
        stack.append(end)
        rows[i], ends[i] = row, end
    return rows, ends
