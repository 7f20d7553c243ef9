"""What tests of traces share: a validator of the format, and recordings that are made up."""

import json
from collections import defaultdict

import numpy as np

from rollflow.profile.recording import Recording
from rollflow.profile.records import FRESH, TABLES, WORK

FIELDS = {  # that an event of a phase has besides ph, name, pid and tid
    "M": {"args"}, "X": {"cat", "ts", "dur", "args"}, "i": {"cat", "ts", "s"}, "C": {"ts", "args"},
    "b": {"cat", "ts", "id2", "args"}, "e": {"cat", "ts", "id2"},
    "s": {"cat", "ts", "id", "args"}, "t": {"cat", "ts", "id"}, "f": {"cat", "ts", "id", "bp"},
}  # fmt: skip


def of(found, phase, **fields):
    """The events of a phase with these fields."""
    return [e for e in found["traceEvents"] if e["ph"] == phase and all(e[name] == v for name, v in fields.items())]


def track(found, process, thread):
    """The slices of a track, by the names of its process and thread."""
    (pid,) = (e["pid"] for e in of(found, "M", name="process_name") if e["args"]["name"] == process)
    (tid,) = (e["tid"] for e in of(found, "M", name="thread_name", pid=pid) if e["args"]["name"] == thread)
    return of(found, "X", pid=pid, tid=tid)


def assert_valid(found):
    """What both viewers demand of a trace."""
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found and found["displayTimeUnit"] == "ms"
    events = found["traceEvents"]
    for event in events:
        assert set(event) == {"ph", "name", "pid", "tid", *FIELDS[event["ph"]]}, event
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int) and 0 not in (event["pid"], event["tid"])
    timed = [event for event in events if event["ph"] != "M"]
    assert events == [*of(found, "M"), *timed]
    times = [event["ts"] for event in timed]
    assert times == sorted(times) and all(when >= 0 and (when * 8).is_integer() for when in times)
    assert_named(found, timed)
    assert_nested(found)
    assert_matched(found)


def assert_named(found, timed):
    processes = {e["pid"]: e["args"]["name"] for e in of(found, "M", name="process_name")}
    threads = {e["tid"]: e["pid"] for e in of(found, "M", name="thread_name")}
    assert len(processes) == len(of(found, "M", name="process_sort_index")) == len({*processes.values()})
    assert len(threads) == len(of(found, "M", name="thread_name")) == len(of(found, "M", name="thread_sort_index"))
    for event in timed:
        assert event["pid"] in processes
        # of counters and asynchronous events the process's own
        assert event["tid"] == event["pid"] if event["ph"] in "beC" else threads[event["tid"]] == event["pid"]
    assert {*processes} == {e["pid"] for e in timed} and {*threads} <= {e["tid"] for e in timed}
    for event in of(found, "C"):
        assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values())


def assert_nested(found):
    """No slice of a track crosses another."""
    by_track = defaultdict(list)
    for event in of(found, "X"):
        by_track[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for slices in by_track.values():
        open_ends = []
        for start, end in slices:  # in the order of the file: by start, the outer first
            assert end >= start
            while open_ends and open_ends[-1] <= start:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], (start, end, open_ends)
            open_ends.append(end)


def assert_matched(found):
    """Asynchronous events end as they began; arrows go forward in time from slice to slice."""
    stacks, arrows, slices = defaultdict(list), defaultdict(list), defaultdict(list)
    for event in of(found, "X"):
        slices[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for event in found["traceEvents"]:
        if event["ph"] == "b":
            stacks[event["pid"], event["cat"], event["id2"]["local"]].append(event["name"])
        elif event["ph"] == "e":
            assert stacks[event["pid"], event["cat"], event["id2"]["local"]].pop() == event["name"]
        elif event["ph"] in "stf":
            arrows[event["id"]].append(event)
    assert not any(stacks.values())
    for events in arrows.values():
        assert "".join(e["ph"] for e in events) in ("sf", "stf") and events[-1]["bp"] == "e"
        assert len({(e["cat"], e["name"]) for e in events}) == 1
        for event in events:
            assert any(start <= event["ts"] <= end for start, end in slices[event["tid"]]), event


def table(name, entries):
    """A table of the ledger; what an entry does not say is missing."""
    kind = TABLES[name]
    found = np.zeros(len(entries), kind)
    for field in kind.names:
        found[field] = FRESH[kind[field].kind]
        if field.endswith("_seconds") and "device" not in field:
            found[field] = 0.0
    for i, entry in enumerate(entries):
        for field, value in entry.items():
            found[field][i] = value
    return found


def made_up(batches=(), rows=(), calls=(), requests=(), seconds=1.0, lanes=1):
    """A recording of these entries, whose clock begins at 0."""
    tables = {"rows": rows, "batches": batches, "calls": calls, "requests": requests}
    about = {"begin": 0.0, "end": seconds, "began": 1.8e9, "lanes": lanes, "specs": {}}
    return Recording(**{name: table(name, entries) for name, entries in tables.items()}, about=about)


def batch(number, started, ended, lane=0, work="rows", bucket=1, **fields):
    given = {"batch": number, "lane": lane, "work": WORK.index(work), "rows": bucket, "bucket": bucket, "host": 0.0}
    return {**given, "chosen": started, "submitted": started, "started": started, "ended": ended, **fields}


def ran(stage, start, end):
    """The times of a stage."""
    return {f"{stage}_started": start, f"{stage}_ended": end, f"{stage}_seconds": end - start}


def timed(stage, start, end):
    """The device's times of a stage."""
    return {f"{stage}_device_started": start, f"{stage}_device_seconds": end - start}
