"""Slices of a trace: batches and their stages on lanes, decodes, calls of rewards, the loop's, requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rollflow.profile import export
from rollflow.profile.accounts import SPENT, purpose, seconds_of
from rollflow.profile.recording import Recording
from rollflow.profile.records import DEVICE_STAGES, KINDS, LANE_STAGES, STAGES, WORK
from rollflow.profile.trace.format import (
    EIGHTHS,
    MISSING,
    Event,
    Placed,
    Tracks,
    Unit,
    eighths,
    packed,
    piece,
    plain,
    spans,
)

GAP = 50 * EIGHTHS  # eighths of a microsecond; shorter gaps between stages stay empty
LISTED = 32  # requests of a batch that its slice names
PURPOSES = (*SPENT, "on its way", "images")  # what rows of a batch are for
GUIDED = WORK.index("guided")


class Slices:
    """Slices of a recording by what they are of; each method gives those of one sort.

    Attributes:
        batches: by number, where the slice of a batch is.
        entries, sources, exits: by number, where a batch's propose, forward and finish are, or what is instead of them:
            a CUDA graph is one forward, images are one decode.
        calls: by their place in the table, where the slice of a call is.
        decides: by number, where a batch is taken back.
    """

    def __init__(self, recording: Recording, tracks: Tracks):
        self.recording, self._tracks = recording, tracks
        self._table = recording.batches
        self._times = {
            name: eighths(self._table[name], recording.begin)
            for name in self._table.dtype.names or ()
            if name.endswith(("started", "ended", "submitted"))
        }
        self._seconds = {stage: np.nan_to_num(self._table[f"{stage}_seconds"]).round(6).tolist() for stage in STAGES}
        self._numbers: list[int] = self._table["batch"].tolist()
        self.batches: dict[int, Placed] = {}
        self.entries: dict[int, Placed] = {}
        self.sources: dict[int, Placed] = {}
        self.exits: dict[int, Placed] = {}
        self.calls: dict[int, Placed] = {}
        self.decides: dict[int, Placed] = {}

    def times(self, name: str) -> np.ndarray:
        """A time of every batch, in eighths of a microsecond."""
        return self._times[name]

    def _until(self, ends: np.ndarray) -> np.ndarray:
        """Ends, the recording's where something had not ended."""
        return np.where(ends == MISSING, eighths(self.recording.end, self.recording.begin), ends)

    def _place(
        self, own: np.ndarray, starts: np.ndarray, ends: np.ndarray, process: str, name: str, order: int
    ) -> Iterator[tuple[int, Placed]]:
        """Places some of the slices that start and end then on a track, which gets more rows where they overlap."""
        rows, first, last = packed(starts[own], ends[own])
        tracks = self._tracks.rows(process, name, rows, order)
        for i, row, start, end in zip(own.tolist(), rows.tolist(), first.tolist(), last.tolist(), strict=True):
            pid, tid = tracks[row]
            yield i, Placed(pid, tid, start, end)

    # Batches.

    def lanes(self) -> list[Unit]:
        """A slice for each batch that was started, on the track of its lane."""
        started, ended = self.times("started"), self._until(self.times("ended"))
        found, args = [], _batch_args(self.recording)
        for lane in np.unique(self._table["lane"]).tolist():
            own = np.flatnonzero((self._table["lane"] == lane) & (started != MISSING))
            for i, place in self._place(own, started, ended, "lanes", f"lane {lane}", lane):
                number, work = self._numbers[i], args[i]["work"]
                self.batches[number] = place
                self.entries[number] = self._first_of(("propose", "forward", "decode"), i, place)
                self.sources[number] = self._first_of(("forward", "decode"), i, place)
                self.exits[number] = self._first_of(("finish", "forward", "decode"), i, place)
                size = f" {args[i]['rows']}/{args[i]['bucket']}" if work in ("rows", "guided") else ""
                found.append(Unit(place.long, [piece(place, work + size, work, args[i])]))
        return found

    def _first_of(self, stages: Sequence[str], i: int, place: Placed) -> Placed:
        """Where the first of these stages is that a batch has; of one without stages all of it."""
        times = ((int(self.times(f"{stage}_started")[i]), int(self.times(f"{stage}_ended")[i])) for stage in stages)
        return next((_inside(place, *time) for time in times if time[0] != MISSING), place)

    def stages(self) -> list[Unit]:
        """The stages of each batch, inside of its slice, and the gaps between them; after `lanes`."""
        found = []
        timed = [~np.isnan(self._table[f"{stage}_device_started"]) for stage in DEVICE_STAGES]
        on_device = np.any(timed, axis=0).tolist()
        for i, number in enumerate(self._numbers):
            place, parts = self.batches.get(number), self._parts(i)
            if place is None or not parts:
                continue
            events, at = [], place.start
            for name, start, end, args in parts:
                stage = _inside(place._replace(start=at), start, end)
                if stage.start - at >= GAP:
                    events.append(piece(place._replace(start=at, end=stage.start), "host", "host", {}))
                events.append(piece(stage, name, "stage", args))
                at = stage.end
            if place.end - at >= GAP:
                rest = "wait for the device" if on_device[i] else "host"
                events.append(piece(place._replace(start=at), rest, "host", {}))
            found.append(Unit(place.long, events))
        return found

    def _parts(self, i: int) -> list[tuple[str, int, int, Event]]:
        """Stages of a batch that do not overlap: those that took turns, as of guided batches, are one."""
        stages = (*LANE_STAGES, "reward") if self._table["work"][i] == GUIDED else LANE_STAGES
        found: list[tuple[list[str], int, int]] = []
        times = ((int(self.times(f"{s}_started")[i]), int(self.times(f"{s}_ended")[i]), s) for s in stages)
        for start, end, stage in sorted(time for time in times if time[0] != MISSING):
            if found and start < found[-1][2]:
                before, first, last = found.pop()
                found.append(([*before, stage], first, max(last, end)))
            else:
                found.append(([stage], start, end))
        return [
            (
                f"{', '.join(names)} in turns" if len(names) > 1 else names[0],
                start,
                end,
                {"seconds": {name: self._seconds[name][i] for name in names}},
            )
            for names, start, end in found
        ]

    # What runs beside the lanes, and on the device.

    def decodes(self) -> list[Unit]:
        """The decodes of all batches, by the device's time where it is known."""
        return self._device_or_host("decode")

    def on_device(self) -> list[Unit]:
        """What the device ran, by its own time; decodes aside, which have their track."""
        stages = (stage for stage in DEVICE_STAGES if stage != "decode")
        return [unit for stage in stages for unit in self._device_or_host(stage, host=False)]

    def _device_or_host(self, stage: str, host: bool = True) -> list[Unit]:
        table, begin = self._table, self.recording.begin
        device, seconds = table[f"{stage}_device_started"], table[f"{stage}_device_seconds"]
        timed = ~np.isnan(device)
        starts = np.where(timed, eighths(device, begin), self.times(f"{stage}_started"))
        ends = np.where(timed, eighths(device + seconds, begin), self._until(self.times(f"{stage}_ended")))
        own = np.flatnonzero(starts != MISSING if host else timed)
        process, order = "device" if timed.any() else stage, DEVICE_STAGES.index(stage)
        found = []
        for i, place in self._place(own, starts, ends, process, stage, order):
            args = {"batch": self._numbers[i], "clock": "device" if timed[i] else "host"}
            found.append(Unit(place.long, [piece(place, stage, "stage", args)]))
        return found

    def rewards(self) -> list[Unit]:
        """The calls of rewards, on the track of the thread that made them."""
        calls, found = self.recording.calls, []
        starts, ends = (eighths(calls[name], self.recording.begin) for name in ("started", "ended"))
        for thread in np.unique(calls["thread"]).tolist():
            own = np.flatnonzero(calls["thread"] == thread)
            for i, place in self._place(own, starts, ends, "rewards", f"judging thread {thread}", thread):
                self.calls[i], call = place, calls[i]
                args = {"batch": int(call["batch"]), "images": int(call["images"]), "failed": bool(call["failed"])}
                found.append(Unit(place.long, [piece(place, str(call["reward"]), "reward", args)]))
        return found

    def loop(self) -> list[Unit]:
        """From when to when the loop takes back each batch; its rows may come back in several parts."""
        starts, ends = self.times("decide_started"), self._until(self.times("decide_ended"))
        found = []
        for i, place in self._place(np.flatnonzero(starts != MISSING), starts, ends, "loop", "decide", 0):
            self.decides[self._numbers[i]] = place
            args = {"batch": self._numbers[i], "seconds": self._seconds["decide"][i]}
            found.append(Unit(place.long, [piece(place, "decide", "decide", args)]))
        return found

    # Requests.

    def requests(self) -> list[Unit]:
        """Each request with its phases: asynchronous, as requests overlap."""
        table, found = self.recording.requests, []
        pid = self._tracks.process("requests")
        names = ("submitted", "started", "searched", "ended")
        marks = {name: eighths(table[name], self.recording.begin) for name in names}
        last, args = self._until(marks["ended"]).tolist(), _request_args(self.recording)
        digits = len(str(table["request"].max(initial=0)))  # as many of each: viewers sort by name
        for i, number in enumerate(table["request"].tolist()):
            at = int(marks["submitted"][i])
            end = max(at, last[i])
            parts = [(f"#{number:0{digits}} {args[i]['method']}: {args[i]['prompt']}", at, end, args[i])]
            for phase, until in (("queued", "started"), ("search", "searched"), ("image", "ended")):
                then = int(marks[until][i])
                stop = end if then == MISSING else max(at, min(end, then))
                parts.append((phase, at, stop, {}))
                at = stop
                if then == MISSING:  # it ended, or the recording did, in this phase
                    break
            found.append(Unit(float(end - parts[0][1]), spans(number, pid, "request", parts)))
        return found


def _inside(place: Placed, start: int, end: int) -> Placed:
    """The part of a slice that lies between two times."""
    start = min(max(start, place.start), place.end)
    return place._replace(start=start, end=min(max(start, end), place.end))


def _batch_args(recording: Recording) -> list[Event]:
    """What the slice of each batch says of it."""
    table, rows = recording.batches, recording.rows
    numbers = table["batch"].tolist()
    places = {number: place for place, number in enumerate(numbers)}
    at = np.array([places.get(number, -1) for number in rows["batch"].tolist()], np.int64)
    rows, at = rows[at >= 0], at[at >= 0]
    purposes = purpose(rows)
    purposes[rows["kind"] == KINDS.index("image")] = PURPOSES.index("images")
    kinds = np.zeros((len(table), len(PURPOSES)), np.int64)
    np.add.at(kinds, (at, purposes), 1)
    whose: list[set[int]] = [set() for _ in numbers]
    for place, request in zip(at.tolist(), rows["request"].tolist(), strict=True):
        whose[place].add(request)
    judged = _judged(recording)
    seconds = {stage: np.nan_to_num(seconds_of(table, stage)).round(6).tolist() for stage in (*STAGES, "host")}
    waited = np.nan_to_num(table["started"] - table["submitted"]).round(6).tolist()
    columns = {name: table[name].tolist() for name in ("rows", "bucket", "network_rows", "height", "width", "frames")}
    return [
        {
            "batch": number,
            "work": WORK[table["work"][i]],
            **{name: column[i] for name, column in columns.items()},
            "rows by kind": {name: int(kinds[i, j]) for j, name in enumerate(PURPOSES) if kinds[i, j]},
            "requests": sorted(whose[i])[:LISTED],
            "requests in all": len(whose[i]),
            "rewards": judged.get(number, {}),
            "seconds": {stage: values[i] for stage, values in seconds.items() if values[i]},
            "seconds waited for a lane": waited[i],
        }
        for i, number in enumerate(numbers)
    ]


def _judged(recording: Recording) -> dict[int, dict[str, Event]]:
    """By batch and reward, how often it was called, on how many images, and seconds."""
    found: dict[int, dict[str, Event]] = {}
    for call in recording.calls:
        fresh = {"calls": 0, "images": 0, "seconds": 0.0}
        one = found.setdefault(int(call["batch"]), {}).setdefault(str(call["reward"]), fresh)
        one["calls"], one["images"] = one["calls"] + 1, one["images"] + int(call["images"])
        one["seconds"] = round(one["seconds"] + float(call["ended"] - call["started"]), 6)
    return found


def _request_args(recording: Recording) -> list[Event]:
    """What each request's entry, its specification and its cost say of it; times in seconds from the beginning."""
    table, specs, costs = recording.requests, recording.specs, recording.costs
    columns = {name: column.tolist() for name, column in export.columns(table).items()}
    for name in ("submitted", "started", "searched", "ended"):
        columns[name] = (table[name] - recording.begin).round(6).tolist()
    found: list[Event] = []
    for i, number in enumerate(columns["request"]):
        entry = {name: column[i] for name, column in columns.items() if column[i] == column[i]}  # no NaN
        found.append({**entry, "spec": plain(specs.get(number, {}))})
        if (cost := costs.get(number)) is not None:
            found[-1]["cost"] = {
                "nfe": {**cost.nfe},
                "seconds": {part: round(value, 6) for part, value in cost.seconds.items()},
                "lane_seconds": round(cost.lane_seconds, 6),
                "batches": len(cost.batches),
            }
    return found
