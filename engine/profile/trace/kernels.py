"""torch.profiler's own events, operators and the device's kernels, beside the slices of a recording.

    with Kernels(seconds=2) as kernels, engine.profile() as p:
        engine.generate(...)
    trace.save(p.recording, "trace.json.gz", kernels.trace)

torch.profiler watches the thread that starts it alone, unless its experimental option `profile_all_threads` says
otherwise; an engine computes on threads of its own. Its times count from `baseTimeNanoseconds` of the epoch (from the
epoch itself in the traces of older versions, which have no such field), and a recording knows when of the epoch it
began: that is how the two clocks meet.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch._C._profiler import _ExperimentalConfig

from rollflow.errors import RequestError, RollflowError, said, shown
from rollflow.profile.trace.format import Placed, Tracks, Unit, arrow, nested, piece, plain

SECONDS = 2.0  # on two cores, a second of the model `shapes` has 34,000 events
SPAN = "Trace"  # torch's category of the time that it watched
# Seconds from when torch stops watching to when it collects what it saw. A thread that is about to write something down
# must be done with it by then: collecting at once, while operators run on other threads, corrupts memory. With torch
# 2.13, 10 of 16 processes that did so 60 times did not survive it; all of 18 that waited 0.1 s, 40 times each, did.
GRACE = 0.2
NOISE = ("Ev Idx", "Record function id")  # arguments that only torch's own tools use
EIGHTH = 125  # nanoseconds, of a microsecond


class Kernels:
    """A context in which torch says what it runs on every thread and on the GPU, for so many seconds at most.

    It slows down what it watches. Put it around the recording, as above: at its end it waits, and synchronizes with the
    GPU, while no CUDA graph may be captured.

    Args:
        seconds: how long it watches at most; traces of longer times are more than viewers open.

    Attributes:
        over: set when it does not watch any more.

    Raises:
        RequestError: these are no seconds, or a torch.profiler runs already.
    """

    def __init__(self, seconds: float = SECONDS):
        if not (math.isfinite(seconds) and seconds > 0):
            raise RequestError(f"seconds={shown(seconds)}: give how long torch's events are recorded, above 0")
        self.seconds, self.over = seconds, threading.Event()
        self._lock = threading.Lock()
        self._trace: dict[str, Any] | None = None
        self._timer = threading.Timer(seconds, self._look_away)
        self._timer.daemon = True
        self._activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            self._activities.append(torch.profiler.ProfilerActivity.CUDA)
        config = _ExperimentalConfig(profile_all_threads=True)
        self._profile = torch.profiler.profile(activities=self._activities, experimental_config=config)

    @property
    def trace(self) -> dict[str, Any]:
        """What torch wrote: a trace of its own; raises `RollflowError` before the end of the block."""
        if self._trace is None:
            raise RollflowError("torch's events are there when their `with` block is over")
        return self._trace

    def __enter__(self) -> Kernels:
        if torch.autograd.profiler._is_profiler_enabled:
            raise RequestError("a torch.profiler runs already: end it before torch's events are recorded here")
        self._profile.start()
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._look_away()
        time.sleep(GRACE)
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernels.json"
            self._profile.export_chrome_trace(str(path))
            self._trace = load(path)

    def _look_away(self) -> None:
        """Torch stops watching, on any thread."""
        with self._lock:
            if not self.over.is_set():
                self._profile.toggle_collection_dynamic(False, self._activities)
                self.over.set()


def load(path: str | Path) -> dict[str, Any]:
    """Reads a trace that torch.profiler wrote.

    Raises:
        RequestError: it cannot be read, or is none.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{shown(str(path))} cannot be read as a trace of torch.profiler ({said(error)})") from error
    if not isinstance(found, dict) or not isinstance(found.get("traceEvents"), list):
        raise RequestError(f"{shown(str(path))} is no trace of torch.profiler: it has no list `traceEvents`")
    return found


def merged(
    trace: Mapping[str, Any], began: float, seconds: float, tracks: Tracks, numbers: Iterator[int]
) -> tuple[list[Unit], list[Unit]]:
    """Torch's events as slices and arrows of a recording's trace.

    Args:
        trace: what torch wrote.
        began: seconds of the epoch, of the recording.
        seconds: how long it is; what torch saw before and after is left out.
        tracks: get torch's processes and threads.
        numbers: for arrows.
    """
    found = [event for event in trace["traceEvents"] if event.get("ph") == "X" and event.get("cat") != SPAN]
    starts, durations = (_nanoseconds(event.get(name, 0) for event in found) for name in ("ts", "dur"))
    starts += int(trace.get("baseTimeNanoseconds", 0)) - round(began * 1e9)
    first, last = starts // EIGHTH, (starts + durations) // EIGHTH
    inside = (last >= 0) & (starts <= seconds * 1e9)
    threads: dict[tuple[Any, Any], list[int]] = {}
    for i in np.flatnonzero(inside).tolist():
        threads.setdefault((found[i]["pid"], found[i]["tid"]), []).append(i)
    first = np.maximum(first, 0)
    units, places, names = [], {}, _names(trace)
    for order, (thread, own) in enumerate(sorted(threads.items(), key=lambda item: str(item[0]))):
        process, name = names(*thread)
        rows, ends = nested(first[own], last[own])
        at = tracks.rows(process, name, rows, order)
        for k in np.lexsort((-ends, first[own])).tolist():  # what is around others before them
            event = found[own[k]]
            pid, tid = at[int(rows[k])]
            place = Placed(pid, tid, int(first[own[k]]), int(ends[k]))
            places[thread[0], thread[1], event["ts"]] = place
            args = plain({key: value for key, value in event.get("args", {}).items() if key not in NOISE})
            units.append(Unit(place.long, [piece(place, event["name"], str(event.get("cat", "")), args)]))
    return units, [*_arrows(trace, places, numbers)]


def _nanoseconds(microseconds: Iterable[float]) -> np.ndarray:
    """Whole nanoseconds, which are what torch writes: so that what nests or touches there does so here."""
    return np.rint(np.array([*microseconds], np.float64) * 1000).astype(np.int64)


def _names(trace: Mapping[str, Any]) -> Callable[[Any, Any], tuple[str, str]]:
    """What torch calls the process and the thread of a pid and a tid."""
    told: dict[tuple[str, Any, Any], str] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "M":
            tid = event.get("tid") if event["name"] == "thread_name" else None
            told[event["name"], event["pid"], tid] = " ".join(str(value) for value in event.get("args", {}).values())

    def names(pid: Any, tid: Any) -> tuple[str, str]:
        name, labels = (told.get((what, pid, None), "") for what in ("process_name", "process_labels"))
        words = ("torch:", name, str(pid), labels)
        return " ".join(word for word in words if word), told.get(("thread_name", pid, tid), str(tid))

    return names


def _arrows(trace: Mapping[str, Any], places: Mapping[Any, Placed], numbers: Iterator[int]) -> Iterator[Unit]:
    """Torch's arrows, from what launches a kernel to the kernel, where both are in the trace."""
    ends: dict[str, dict[tuple[Any, Any], Placed]] = {"s": {}, "f": {}}
    for event in trace["traceEvents"]:
        if (own := ends.get(event.get("ph"))) is not None:
            place = places.get((event["pid"], event["tid"], event["ts"]))
            if place is not None:
                own[event.get("cat"), event.get("id")] = place
    for (category, number), place in ends["s"].items():
        other = ends["f"].get((category, number))
        if other is not None and other.start >= place.start:
            yield Unit(0.0, arrow(next(numbers), str(category), [(place, place.start), (other, other.start)]))
