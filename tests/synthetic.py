"""Recordings that no engine made: of many requests, of a device that times itself, of rings that forgot."""

import numpy as np

from rollflow.profile.recording import Recording
from rollflow.profile.records import (
    BATCH,
    CALL,
    DEVICE_STAGES,
    FATES,
    FRESH,
    KINDS,
    REQUEST,
    ROW,
    STAGES,
    STATES,
    TABLES,
    WORK,
)

BEGIN = 1000.0
METHODS = ("rbf", "sprout", "bon")
REWARDS = ("count", "count + 0.1*jpeg")
ROW_MS, LAUNCH_MS = {"propose": 0.1, "forward": 2.0, "finish": 0.1, "decode": 1.5}, 1.0


def fresh(kind, many=1):
    """Entries of a table as they are before they are written."""
    table = np.zeros(many, kind)
    for name in kind.names:
        table[name] = FRESH[kind[name].kind]
    return table


def empty(**about):
    """A recording of a second in which nothing came."""
    tables = {name: np.zeros(0, kind) for name, kind in TABLES.items()}
    return Recording(**tables, about={"begin": BEGIN, "end": BEGIN + 1, "specs": {}, "forgotten": {}, **about})


def made(batches=(), rows=(), requests=(), calls=(), seconds=1.0, **about):
    """A recording of entries that are given as mappings of fields; seconds count from its beginning."""
    tables = {}
    for name, given in (("batches", batches), ("rows", rows), ("requests", requests), ("calls", calls)):
        tables[name] = fresh(TABLES[name], len(given))
        for entry, fields in zip(tables[name], given, strict=True):
            if name == "batches":
                for stage in STAGES:
                    entry[f"{stage}_seconds"] = 0.0
                entry["host"], entry["lane"], entry["rows"], entry["bucket"] = 0.0, 0, 1, 1
            for field, value in fields.items():
                entry[field] = value + BEGIN if _is_time(field) else value
    found = {"begin": BEGIN, "end": BEGIN + seconds, "specs": {}, "forgotten": {}, "lanes": 1, **about}
    return Recording(**tables, about=found)


def _is_time(field):
    return field in ("chosen", "submitted") or field.endswith(("started", "ended", "searched"))


def row(batch, request=1, **fields):
    """A row for `made`."""
    return {"batch": batch, "request": request, "nfe": 1, "state": 1, "scored": True, "number": batch, **fields}


def batch(number, start, end, lane=0, **fields):
    """A batch for `made`."""
    given = {"chosen": start, "submitted": start, "started": start, "ended": end, "judged": 1}
    return {"batch": number, "lane": lane, **given, **fields}


def staged(number, start, end, stage, lane=0, **fields):
    """A batch that is a stage from start to end."""
    times = {f"{stage}_started": start, f"{stage}_ended": end}
    found = batch(number, start, end, lane, **times, **fields)
    return {**found, f"{stage}_seconds": end - start}


def limited(batches, lives=((0.0, 1.0),), **about):
    """A recording of batches of one row each, and of requests that are here for a while."""
    requests = [{"request": n, "submitted": a, "ended": b, "state": 2} for n, (a, b) in enumerate(lives, 1)]
    return made(batches, [row(one["batch"]) for one in batches], requests, **about)


def busy(seed=0, requests=40, batches=60, lanes=2, device=False, frames=0):
    """Searches on lanes that take turns, with all that may come in between: chores, slow batches, padding, rows in vain
    or on their way, requests that came before, failed or were cancelled, and a batch that is not over."""
    run = _Run(seed, requests, lanes, device, frames)
    for number in range(batches):
        run.batch(number, last=number == batches - 2)
    end = float(run.free.max() + 0.05)
    run.batches[-1]["ended"] = np.nan  # it is not over
    rows = np.concatenate(run.rows)
    tables = {"rows": rows, "batches": np.array(run.batches), "calls": np.array(run.calls)}
    tables["requests"] = _requests(run.rng, requests, rows, end)
    shapes = [{"height": side, "width": side, "frames": frames or None} for side in (64, 16)]
    about = {
        "begin": BEGIN, "end": end, "lanes": lanes, "model": "shapes", "device": "cpu",
        "specs": {str(number): _spec(number) for number in range(requests + 1)},
        "sizes": [{"geometry": shape, "seconds": _fit(shape["height"])} for shape in shapes],
        "forgotten": dict.fromkeys(TABLES, 0),
    }  # fmt: skip
    return Recording(**tables, about=about)


class _Run:
    """Writes down batch after batch."""

    def __init__(self, seed, requests, lanes, device, frames):
        self.rng, self.requests, self.device, self.frames = np.random.default_rng(seed), requests, device, frames
        self.free = np.full(lanes, BEGIN + 0.01)
        self.batches, self.rows, self.calls, self.judged_until = [], [], [], BEGIN
        self._count = dict.fromkeys(range(requests + 1), 0)

    def batch(self, number, last):
        work = str(self.rng.choice(["rows", "guided", "images", "encode"], p=[0.86, 0.05, 0.05, 0.04]))
        entry, lane = fresh(BATCH)[0], int(np.argmin(self.free))
        for stage in STAGES:
            entry[f"{stage}_seconds"] = 0.0
        entry["batch"], entry["lane"], entry["work"] = number, lane, WORK.index(work)
        entry["chosen"] = self.free[lane] + self.rng.exponential(0.002)
        entry["submitted"], entry["started"] = entry["chosen"] + 0.0005, entry["chosen"] + 0.001
        entry["idle"] = entry["started"] - self.free[lane]
        if number < len(self.free):
            entry["idle"] = 0.002 if number else np.nan  # of the first nobody knows; others ended a little before
        at = entry["started"] + (0.02 if work == "encode" else 0.0002)
        if work != "encode":
            own = self._rows(number, work, last)
            at = self._stages(entry, own, work, at)
        early = self.device and work == "rows" and not entry["judged"]  # nobody waits for it but the device
        entry["ended"] = entry["forward_ended"] + 0.0001 if early else at + 0.0003
        self.free[lane] = max(at, entry["ended"])
        on_lane = ("propose", "forward", "finish", "backward", "decode", *(["reward"] if work == "guided" else []))
        entry["host"] = entry["ended"] - entry["started"] - sum(entry[f"{stage}_seconds"] for stage in on_lane)
        if work != "encode":
            self._after(entry, work, float(self.free[lane]))
        self.batches.append(entry)

    def _rows(self, number, work, last):
        bucket = int(self.rng.choice([1, 2, 4, 8]))
        count = bucket - int(bucket > 2 and self.rng.random() < 0.3)
        own = fresh(ROW, bucket)
        own["batch"], own["nfe"], own["scored"] = number, 0 if work == "images" else 1, True
        own["request"] = self.rng.integers(0, self.requests + 1, bucket)
        own["kind"], own["state"] = KINDS.index("image" if work == "images" else "guided"), STATES.index("kept")
        if work == "rows":
            own["kind"] = KINDS.index("finish" if self.rng.random() < 0.1 else "committed")
            own["scored"] = self.rng.random() < 0.9 and self.rng.random(bucket) < 0.95
            own["state"] = np.where(self.rng.random(bucket) < 0.1, STATES.index("dropped"), STATES.index("kept"))
        if work != "images":
            own["level"] = self.rng.integers(0, 6, bucket)
            for row in own:
                self._count[int(row["request"])] += 1
                row["number"] = self._count[int(row["request"])]
        own["kind"][count:], own["state"][count:] = KINDS.index("padding"), STATES.index("dropped")
        own["level"][count:], own["number"][count:], own["scored"][count:] = -1, -1, False
        if last:
            own["state"][:count] = STATES.index("open")
        seen = own["scored"] & (own["state"] == STATES.index("kept")) & (work != "images")
        own["reward"] = np.where(seen, self.rng.normal(-1.0, 1.0, bucket).round(3), np.nan)
        self.rows.append(own)
        return own

    def _stages(self, entry, own, work, at):
        bucket = len(own)
        entry["height"] = entry["width"] = 64 if self.rng.random() < 0.8 else 32
        entry["frames"], entry["bucket"], entry["network_rows"] = self.frames, bucket, bucket
        entry["rows"], entry["judged"] = (own["kind"] != KINDS.index("padding")).sum(), own["scored"].sum()
        slow = 3.0 if self.rng.random() < 0.05 else 1.0
        for stage, row in ROW_MS.items():
            if (stage == "decode" and not entry["judged"]) or (work == "images" and stage != "decode"):
                continue
            took = 1e-3 * (LAUNCH_MS + row * bucket) * slow * self.rng.uniform(0.8, 1.25)
            timed = self.device and stage in DEVICE_STAGES
            host = 0.0003 if timed else took
            entry[f"{stage}_started"], entry[f"{stage}_ended"], entry[f"{stage}_seconds"] = at, at + host, host
            if timed:
                at += 0.0005
                entry[f"{stage}_device_started"], entry[f"{stage}_device_seconds"] = at, took
            at += took
        for stage in ("reward", "backward") if work == "guided" else ():
            entry[f"{stage}_started"], entry[f"{stage}_ended"], entry[f"{stage}_seconds"] = at, at + 0.005, 0.005
            at += 0.005
        return at

    def _after(self, entry, work, at):
        """Its rows are judged beside the lanes, and taken back."""
        if work != "guided" and entry["judged"]:
            begun = max(at, self.judged_until)
            self.judged_until = at = begun + self.rng.uniform(0.001, 0.008)
            entry["reward_started"], entry["reward_ended"], entry["reward_seconds"] = begun, at, at - begun
            titles = ("count", "jpeg") if entry["batch"] % 3 == 0 else ("count",)
            for place, title in enumerate(titles):
                call = fresh(CALL)[0]
                call["batch"], call["reward"], call["images"] = entry["batch"], title, entry["judged"]
                call["thread"], call["failed"], call["cpu"] = place, entry["batch"] % 17 == 5, 0.001
                call["started"], call["ended"] = np.linspace(begun, at, len(titles) + 1)[place : place + 2]
                self.calls.append(call)
        entry["decide_started"], entry["decide_ended"], entry["decide_seconds"] = at + 0.0002, at + 0.0007, 0.0005


def _fit(side):
    return {str(bucket): 1e-3 * (4 * LAUNCH_MS + 3.7 * bucket) * side / 64 for bucket in (1, 2, 4, 8)}


def _spec(number):
    terms = ["count"] if number % 2 else ["count", "jpeg"]
    return {"method": METHODS[number % 3], "reward": REWARDS[number % 2 == 0], "terms": terms, "held_out": None}


def _requests(rng, many, rows, end):
    """Requests 1 to `many`; number 0 came before the recording."""
    table = fresh(REQUEST, many)
    for number, one in enumerate(table, 1):
        spec, fate = _spec(number), rng.choice(["done"] * 12 + ["failed", "cancelled", "running", "queued"])
        one["request"], one["prompt"], one["state"] = number, f"prompt {number}", FATES.index(fate)
        one["method"], one["reward"], one["nfe"], one["height"], one["width"] = (
            spec["method"],
            spec["reward"],
            30,
            64,
            64,
        )
        own = rows[rows["request"] == number]
        one["executed"], one["committed"] = own["nfe"].sum(), own["nfe"][own["state"] == 1].sum()
        one["submitted"] = BEGIN + 0.001 * number
        if fate != "queued":
            one["started"] = one["submitted"] + 0.001
        if fate not in ("queued", "running"):
            one["ended"] = end - rng.uniform(0.0, 0.03)
        if fate == "done" and number % 5:
            one["score"] = rng.normal(1.0, 0.5)
    return table
