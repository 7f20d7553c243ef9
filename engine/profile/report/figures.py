"""All numbers of a recording's report, as plain dictionaries, lists and numbers; None is what there is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rollflow.profile.accounts import PARTS as STAGES
from rollflow.profile.accounts import SPENT, intervals, is_chore, overlap, purpose, seconds_of
from rollflow.profile.recording import Recording
from rollflow.profile.records import CHORES, FATES, WORK
from rollflow.profile.report.buckets import bucket_curves
from rollflow.profile.report.lane_time import PARTS, lane_time, limit
from rollflow.profile.report.prices import prices
from rollflow.profile.report.progress import bands, curves
from rollflow.profile.report.slowest import slowest
from rollflow.profile.report.timeline import timeline

KINDS = (*SPENT, "open")  # open: on their way when the recording ended
SHARED = ("propose", "forward", "finish", "backward", "host")  # of a batch's lane time, what all of its rows share


def figures(
    recording: Recording, scenarios: Sequence[Mapping[str, Any]] = (), usd_per_hour: float | None = None
) -> dict[str, Any]:
    """All numbers of the report.

    Args:
        recording: what they are computed from.
        scenarios: predictions, see `rollflow.profile.report.page`.
        usd_per_hour: price of the whole device.
    """
    forgotten = {name: int(count) for name, count in recording.about.get("forgotten", {}).items()}
    recording = remembered(recording)
    lanes = lane_time(recording)
    count, progress = max(1, len(lanes)), curves(recording)
    return {
        "span": _span(recording, lanes),
        "totals": _totals(recording),
        "limit": limit(lanes, scenarios),
        "stages": _stages(lanes),
        "lanes": lanes,
        "beside": _beside(recording),
        "kinds": _kinds(recording),
        "timeline": timeline(recording),
        "levels": _levels(recording),
        "methods": _methods(recording),
        "curves": progress,
        "bands": bands(progress),
        "buckets": bucket_curves(recording),
        "prices": prices(recording, progress, count, usd_per_hour),
        "slowest": slowest(recording),
        "scenarios": [{**one} for one in scenarios],
        "requests": _requests(recording, count, usd_per_hour),
        "chores": _chores(recording),
        "forgotten": forgotten,
    }


def remembered(recording: Recording) -> Recording:
    """The end of a recording from which on every batch has its rows: all of it, unless the rings lost some."""
    rows, batches, lost = recording.rows, recording.batches, recording.about.get("forgotten", {})
    if not (lost.get("rows") or lost.get("batches")) or not len(batches):
        return recording
    first = int(batches["batch"][0])
    if lost.get("rows") and len(rows):
        first = max(first, int(rows["batch"][0]) + 1)  # of the oldest batch, some rows may be lost
    rows, batches = rows[rows["batch"] >= first], batches[batches["batch"] >= first]
    begin = float(np.nanmin(batches["chosen"])) if len(batches) else recording.end
    return replace(recording, rows=rows, batches=batches, about={**recording.about, "begin": begin})


def row_seconds(recording: Recording) -> np.ndarray:
    """Of each row its share of its batch's lane time, rewards of guided rows included.

    It is shared as by `rollflow.profile.accounts.costs`, but for rewards of guided rows: all of a batch share those.
    """
    rows, batches = recording.rows, recording.batches
    order = np.argsort(batches["batch"], kind="stable")
    place = np.searchsorted(batches["batch"], rows["batch"], sorter=order)
    known = np.isin(rows["batch"], batches["batch"])
    at, found = order[place[known]], np.zeros(len(rows))
    share, judged = 1.0 / np.maximum(batches["bucket"], 1)[at], batches["judged"][at]
    image = np.where(judged > 0, rows["scored"][known] / np.maximum(judged, 1), share)
    seen = seconds_of(batches, "decode")
    seen = seen + np.where(batches["work"] == WORK.index("guided"), seconds_of(batches, "reward"), 0.0)
    rest = sum((seconds_of(batches, part) for part in SHARED), np.zeros(len(batches)))
    found[known] = rest[at] * share + seen[at] * image
    return found


def methods_of(recording: Recording, numbers: np.ndarray) -> np.ndarray:
    """The method of each request; "unknown" where nobody wrote it down."""
    names = {number: str(spec.get("method", "unknown")) for number, spec in recording.specs.items()}
    known = recording.requests
    names.update(zip(known["request"].tolist(), known["method"].tolist(), strict=True))
    return np.array([names.get(int(number), "unknown") for number in numbers], dtype=object)


def _span(recording: Recording, lanes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole = {"seconds": recording.seconds, "lanes": len(lanes), "lane_seconds": recording.seconds * len(lanes)}
    return {**whole, "batches": len(recording.batches), "rows": len(recording.rows)}


def _totals(recording: Recording) -> dict[str, Any]:
    requests, rows, batches, seconds = recording.requests, recording.rows, recording.batches, recording.seconds
    states = {f"{fate}_requests": int((requests["state"] == place).sum()) for place, fate in enumerate(FATES)}
    spent = {name: int(rows["nfe"][purpose(rows) == place].sum()) for place, name in enumerate(SPENT)}
    committed = sum(spent[name] for name in ("committed", "guided", "finish", "refresh"))
    executed = int(rows["nfe"].sum())
    work = batches[np.isin(batches["work"], [WORK.index("rows"), WORK.index("guided")])]
    done = requests[requests["state"] == FATES.index("done")]
    took = (done["ended"] - done["submitted"])[~np.isnan(done["ended"])]
    return {
        "requests": len(requests),
        **states,
        "committed_nfe": committed,
        "executed_nfe": executed,
        "cached_nfe": int(rows["nfe"][rows["cached"]].sum()),
        "committed_per_second": _ratio(committed, seconds),
        "executed_per_second": _ratio(executed, seconds),
        "images": len(done),
        "images_per_second": _ratio(len(done), seconds),
        "occupancy": _ratio(int(work["rows"].sum()), int(work["bucket"].sum())),
        "p50": _quantile(took, 0.5),
        "p95": _quantile(took, 0.95),
        "earlier_requests": int((~np.isin(np.unique(rows["request"]), requests["request"])).sum()),
        "unfinished_batches": int(np.isnan(batches["ended"]).sum()),
        "failed_calls": int(recording.calls["failed"].sum()),
        "device_timed_batches": int((~np.isnan(batches["forward_device_seconds"])).sum()),
    }


def _stages(lanes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    total = {part: sum(lane["seconds"][part] for lane in lanes) for part in PARTS}
    time = sum(total.values())
    return [{"name": part, "seconds": total[part], "share": _ratio(total[part], time)} for part in PARTS]


def _beside(recording: Recording) -> dict[str, Any]:
    """What ran beside the lanes: rewards, on threads of their own, and the engine's loop."""
    batches, calls = recording.batches, recording.calls
    apart = batches[(batches["work"] != WORK.index("guided")) & ~np.isnan(batches["reward_started"])]
    busy = batches[~np.isnan(batches["ended"])]
    terms = []
    for name in sorted({*calls["reward"].tolist()}):
        own = calls[calls["reward"] == name]
        seconds = float((own["ended"] - own["started"]).sum())
        counts = {"calls": len(own), "images": int(own["images"].sum()), "failed": int(own["failed"].sum())}
        terms.append({"reward": name, **counts, "seconds": seconds})
    decide = float(seconds_of(batches, "decide").sum())
    return {
        "reward_seconds": float(seconds_of(apart, "reward").sum()),
        "reward_overlap": overlap(intervals(apart, "reward"), np.stack([busy["started"], busy["ended"]], 1)),
        "judges": len({*calls["thread"].tolist()}),
        "terms": terms,
        "decide_seconds": decide,
        "decide_share": _ratio(decide, recording.seconds),
    }


def _kinds(recording: Recording) -> list[dict[str, Any]]:
    nfe = np.bincount(purpose(recording.rows), weights=recording.rows["nfe"], minlength=len(KINDS))
    return [
        {"name": name, "nfe": int(nfe[place]), "share": _ratio(float(nfe[place]), float(nfe.sum()))}
        for place, name in enumerate(KINDS)
    ]


def _levels(recording: Recording) -> dict[str, Any]:
    """NFE and lane seconds by method and level, padding and final images apart."""
    rows, seconds = recording.rows, row_seconds(recording)
    methods = methods_of(recording, rows["request"])
    leveled = rows["level"] >= 0
    levels = np.unique(rows["level"][leveled]).tolist()
    found = []
    for name in sorted({*methods.tolist()}):
        own = methods == name
        chosen = [own & (rows["level"] == level) for level in levels]
        rest = own & ~leveled
        padding, images = rest & (rows["nfe"] > 0), rest & (rows["nfe"] == 0)
        found.append(
            {
                "method": name,
                "nfe": [int(rows["nfe"][mask].sum()) for mask in chosen],
                "seconds": [float(seconds[mask].sum()) for mask in chosen],
                "padding_nfe": int(rows["nfe"][padding].sum()),
                "padding_seconds": float(seconds[padding].sum()),
                "image_seconds": float(seconds[images].sum()),
            }
        )
    return {"levels": levels, "methods": found}


def _methods(recording: Recording) -> list[dict[str, Any]]:
    """What each method spent."""
    costs = recording.costs
    methods = methods_of(recording, np.array([*costs], dtype=np.int64))
    found = []
    for name in sorted({*methods.tolist()}):
        own = [cost for cost, method in zip(costs.values(), methods, strict=True) if method == name]
        nfe = {kind: sum(cost.nfe[kind] for cost in own) for kind in SPENT}
        lane, total = sum(cost.lane_seconds for cost in own), sum(nfe.values())
        seconds = {f"{part}_seconds": sum(cost.seconds[part] for cost in own) for part in STAGES}
        whole = {"nfe": total, "lane_seconds": lane, "seconds_per_nfe": _ratio(lane, total)}
        found.append({"method": name, "requests": len(own), **nfe, **whole, **seconds})
    return found


def _requests(recording: Recording, lanes: int, usd_per_hour: float | None) -> list[dict[str, Any]]:
    found = []
    for one in recording.requests:
        cost = recording.costs.get(int(one["request"]))
        words = {name: str(one[name]) for name in ("prompt", "method", "reward", "stopped")}
        numbers = {name: int(one[name]) for name in ("request", "nfe", "committed", "executed")}
        seconds = None if cost is None else cost.lane_seconds
        found.append(
            {
                **words,
                **numbers,
                "state": FATES[one["state"]],
                "wait": _number(one["started"] - one["submitted"]),
                "seconds": _number(one["ended"] - one["submitted"]),
                "score": _number(one["score"]),
                "held_out": _number(one["held_out"]),
                "lane_seconds": seconds,
                "usd": None if cost is None or usd_per_hour is None else cost.usd(usd_per_hour / lanes),
            }
        )
    return found


def _chores(recording: Recording) -> list[dict[str, Any]]:
    chores = recording.batches[is_chore(recording.batches)]
    found = []
    for kind in CHORES:
        own = chores[chores["work"] == WORK.index(kind)]
        if len(own):
            found.append({"kind": kind, "count": len(own), "seconds": float(np.nansum(own["ended"] - own["started"]))})
    return found


def _ratio(one: float, other: float) -> float | None:
    return float(one) / float(other) if other > 0 else None


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _quantile(values: np.ndarray, share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None
