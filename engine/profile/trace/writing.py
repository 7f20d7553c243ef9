"""A recording as a trace for Perfetto and chrome://tracing.

    rollflow.profile.trace.save(p.recording, "trace.json.gz")

To open it, go to https://ui.perfetto.dev and drag the .gz file into the page, which does not send it anywhere; or load
it in chrome://tracing where the Chrome still has that. Both read it compressed.

From above: counters; the lanes, a slice a batch with its stages inside; what the device ran, where CUDA timed it;
decodes; calls of rewards by thread; where the loop took batches back; a row a request. Arrows `answer` lead from a
draw's forward to the call of its reward and on to where the loop took it back, arrows `parent` from the batch of a
row's parent to its own. torch.profiler's operators and kernels come below, see `rollflow.profile.trace.kernels`.

Times are microseconds from the recording's beginning. What is too much for a viewer is left out, and the trace says so:
in `otherData`, and by a mark at its beginning.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from rollflow.errors import RequestError, said, shown
from rollflow.profile.recording import Recording
from rollflow.profile.trace import arrows
from rollflow.profile.trace.format import Event, Tracks, Unit, instant, plain
from rollflow.profile.trace.kernels import merged
from rollflow.profile.trace.slices import Slices

MOST = 200_000  # events; viewers become slow at a few times as many
LEAST = 1_000
COUNTED = 50  # a counter has at most so small a part of all events
ABOUT = ("model", "adapter", "device", "dtype", "machine", "versions", "lanes", "threads", "began", "forgotten")
ARROWS = 0.1  # the share of all events that arrows of one sort are at most


def trace(recording: Recording, kernels: Mapping[str, Any] | None = None, most: int = MOST) -> dict[str, Any]:
    """A recording in the Trace Event format, as JSON holds it.

    Args:
        recording: of an engine.
        kernels: what torch.profiler wrote at the same time, see `rollflow.profile.kernels.Kernels`.
        most: events that it may have. Left out first are arrows, then torch's events, then the stages of batches, then
            what follows from batches; of each sort the shortest.

    Raises:
        RequestError: `most` is too few.
    """
    if most < LEAST:
        raise RequestError(f"most={shown(most)}: a trace has room for at least {LEAST} events")
    tracks, numbers = Tracks(), count(1)
    slices = Slices(recording, tracks)
    requests, batches = slices.requests(), slices.lanes()
    counted, thinned = arrows.counters(slices, tracks, most // COUNTED)
    found = {
        "requests": requests,
        "batches": batches,
        "counters": counted,
        "calls of rewards": slices.rewards(),
        "decodes": slices.decodes(),
        "decisions of the loop": slices.loop(),
        "spans of the device": slices.on_device(),
        "stages of batches": slices.stages(),
    }
    about = recording.about
    seen: list[Unit] = []
    launches: list[Unit] = []
    if kernels is not None:
        seen, launches = merged(kernels, float(about["began"]), recording.seconds, tracks, numbers)
    found["torch's events"] = seen
    found["arrows from a draw to its answer"] = arrows.answers(slices, numbers)
    found["arrows from a parent's batch to a child's"] = arrows.parents(slices, numbers)
    found["torch's arrows"] = launches
    note = tracks.thread("notes", "notes")
    events, left_out = _chosen(found, max(0, most - len(tracks.names) - 1))
    if thinned["left out"]:
        left_out["values of counters"] = thinned
    if left_out:
        told = ", ".join(f"{one['left out']} of {one['of']} {what}" for what, one in left_out.items())
        events.insert(0, instant(*note, f"left out: {told}"))
    told_of = {name: about[name] for name in ABOUT if name in about}
    return {
        "traceEvents": [*_used(tracks.names, events), *events],
        "displayTimeUnit": "ms",
        "otherData": plain({**told_of, "seconds": recording.seconds, "most": most, "left out": left_out}),
    }


def save(recording: Recording, path: str | Path, kernels: Mapping[str, Any] | None = None, most: int = MOST) -> Path:
    """Writes a recording as a compressed trace, `trace.json.gz`; returns the path.

    Args:
        recording, kernels, most: see `trace`.
        path: of the file, which ends with .gz.

    Raises:
        RequestError: the path ends with something else, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".gz":
        raise RequestError(f"{shown(str(path))}: a trace is compressed, give it a name that ends with .json.gz")
    content = json.dumps(trace(recording, kernels, most), allow_nan=False, separators=(",", ":"))
    try:
        path.write_bytes(gzip.compress(content.encode(), 6, mtime=0))
    except OSError as error:
        raise RequestError(f"{shown(str(path))} cannot be written ({said(error)})") from error
    return path


def _chosen(found: Mapping[str, list[Unit]], room: int) -> tuple[list[Event], dict[str, dict[str, int]]]:
    """Events that fit in, of each sort the heaviest, in order of time; and how many of which sort do not fit in."""
    events: list[Event] = []
    left_out: dict[str, dict[str, int]] = {}
    for what, units in found.items():
        most = min(room, len(events) + int(ARROWS * room)) if "arrows" in what else room
        heaviest = np.argsort([-unit.weight for unit in units], kind="stable")
        sizes = np.array([len(units[i].events) for i in heaviest], np.int64)
        kept = heaviest[: int((len(events) + np.cumsum(sizes) <= most).sum())]
        for i in sorted(kept.tolist()):
            events += units[i].events
        if len(kept) < len(units):
            left_out[what] = {"left out": len(units) - len(kept), "of": len(units)}
    # A slice stands before those inside of it, and an arrow after the slices that it joins: sorting keeps that.
    return sorted(events, key=lambda event: event["ts"]), left_out


def _used(names: list[Event], events: list[Event]) -> list[Event]:
    """The names of processes and threads that have an event."""
    pids, tids = {event["pid"] for event in events}, {event["tid"] for event in events}
    return [name for name in names if (name["tid"] in tids or name["pid"] == name["tid"]) and name["pid"] in pids]
