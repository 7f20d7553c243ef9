"""Accounts of the ledger's tables: NFE by kind, seconds by stage, what each lane did, and each request's share.

A batch's time is shared among its entries, padding included, which is charged to the requests of its rows: so what
requests cost adds up to what the engine did, chores (encodings, measurements) aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollflow.profile import spans
from rollflow.profile.records import CALL, CHORES, DEVICE_STAGES, KINDS, LANE_STAGES, STAGES, STATES, WORK

SPENT = ("committed", "guided", "finish", "refresh", "speculative", "padding")  # what an NFE was for
PARTS = (*STAGES, "host")  # what a batch's seconds went to
SEEN = ("decode", "reward")  # parts that only rows with images have


@dataclass(frozen=True)
class Cost:
    """What one request cost.

    Attributes:
        nfe: function evaluations that ran for it, by what they were for: "committed", "guided", "finish" and "refresh"
            are those of its history, "speculative" ran ahead and were not needed, or were not when it ended, "padding"
            is its share of that; they add up to `Result.executed_nfe`.
        seconds: of its share of each batch, by stage: of a lane (propose, forward, finish, backward, decode, host), of
            the threads that judge (reward) and of the engine's loop (decide). On CUDA forward, backward, decode and
            reward are the device's time, others the host's.
        batches: its share of each batch, by the batch's number in the ledger.
        lane_seconds: of those seconds, those of lanes, which occupy the device; rewards of guided rows, which are
            called on a lane, are among them.
        cached: those of the function evaluations that were evaluated from a cache, see `rollflow.Request.cache`.
    """

    nfe: Mapping[str, int]
    seconds: Mapping[str, float]
    batches: Mapping[int, float]
    lane_seconds: float
    cached: int = 0

    def usd(self, per_hour: float) -> float:
        """What its share of a lane's time costs where the device, all lanes together, costs so much an hour.

        Args:
            per_hour: dollars an hour of one lane: the price of the device divided by the number of lanes.
        """
        return self.lane_seconds * per_hour / 3600


def purpose(rows: np.ndarray) -> np.ndarray:
    """Of each row the place in `SPENT` of what it was for; len(SPENT) of images and of rows that are on their way."""
    kinds = np.array([SPENT.index(kind) if kind in SPENT else len(SPENT) for kind in KINDS])
    found = kinds[rows["kind"]]
    ran = (rows["kind"] != KINDS.index("padding")) & (rows["kind"] != KINDS.index("image"))
    found[ran & (rows["state"] == STATES.index("dropped"))] = SPENT.index("speculative")
    found[ran & (rows["state"] == STATES.index("open"))] = len(SPENT)
    return found


def ran(rows: np.ndarray) -> np.ndarray:
    """Which rows were for something by now: neither images nor rows that are on their way."""
    return purpose(rows) < len(SPENT)


def nfe_by_kind(rows: np.ndarray) -> dict[str, int]:
    """Executed NFE by what they were for."""
    found = np.bincount(purpose(rows), weights=rows["nfe"], minlength=len(SPENT) + 1)
    return {name: int(found[i]) for i, name in enumerate(SPENT)}


def seconds_of(batches: np.ndarray, part: str) -> np.ndarray:
    """Seconds of a stage, or of the lane's own ("host"), in each batch: on CUDA the device's where it was timed.

    What a lane's stages take on CUDA beyond their launches is then no longer the lane's own.
    """
    if part == "host":
        found = np.nan_to_num(batches["host"])
        guided = batches["work"] == WORK.index("guided")
        for stage in DEVICE_STAGES:
            beyond = seconds_of(batches, stage) - batches[f"{stage}_seconds"]
            found = found - (beyond if stage in LANE_STAGES else np.where(guided, beyond, 0.0))
        return np.maximum(found, 0.0)
    host = batches[f"{part}_seconds"]
    if part not in DEVICE_STAGES:
        return host
    device = batches[f"{part}_device_seconds"]
    return np.where(np.isnan(device), host, device)


def seconds_by_stage(batches: np.ndarray) -> dict[str, float]:
    """Seconds by stage, of all batches."""
    return {part: float(seconds_of(batches, part).sum()) for part in PARTS}


def is_chore(batches: np.ndarray) -> np.ndarray:
    """Which entries are chores: encodings, measurements, looks at particles."""
    return np.isin(batches["work"], [WORK.index(kind) for kind in CHORES])


def costs(
    rows: np.ndarray,
    batches: np.ndarray,
    calls: np.ndarray,
    specs: Mapping[int, Mapping[str, Any]] | None = None,
    only: Sequence[int] | None = None,
) -> dict[int, Cost]:
    """What each request cost.

    Args:
        rows, batches, calls: the ledger's tables; batches that are not among them cost nothing here. Where more than
            one reward is called, the rows of a batch are to be all there.
        specs: by request, the titles of the "terms" that its images are judged by, and of those of a "held_out" judge
            or None: a call of a reward is shared by those of a batch who asked for it. Requests that are not named
            asked for all.
        only: the requests that are wanted; by default all.
    """
    requests, whose = np.unique(rows["request"], return_inverse=True)
    columns = len(SPENT) + 1
    spent = np.bincount(whose * columns + purpose(rows), weights=rows["nfe"], minlength=len(requests) * columns)
    from_cache = np.bincount(whose, weights=rows["nfe"] * (rows["cached"] & ran(rows)), minlength=len(requests))
    at = _places(rows["batch"], batches["batch"])
    known = at >= 0
    at, owner, scored = at[known], whose[known], rows["scored"][known]
    judged, share = batches["judged"][at], 1.0 / np.maximum(batches["bucket"], 1)[at]
    view = np.where(judged > 0, scored / np.maximum(judged, 1), share)  # nobody was judged, and yet it took time: all
    each = {part: seconds_of(batches, part)[at] * (view if part in SEEN else share) for part in PARTS}
    if len(np.unique(calls["reward"])) > 1:
        each["reward"] = _of_rewards(rows[known], at, scored | (judged == 0), batches, calls, specs or {})
    guided = (batches["work"] == WORK.index("guided"))[at]
    each["lane"] = sum((each[part] for part in (*LANE_STAGES, "host")), np.where(guided, each["reward"], 0.0))
    seconds = np.stack([np.bincount(owner, weights=own, minlength=len(requests)) for own in each.values()], 1)
    order, found = np.argsort(owner, kind="stable"), dict[int, Cost]()
    ends = np.searchsorted(owner[order], np.arange(len(requests) + 1))
    for place in range(len(requests)) if only is None else np.flatnonzero(np.isin(requests, only)).tolist():
        places, entries = np.unique(at[order[ends[place] : ends[place + 1]]], return_counts=True)
        shares = entries / batches["bucket"][places]
        found[int(requests[place])] = Cost(
            {name: int(spent[place * columns + i]) for i, name in enumerate(SPENT)},
            dict(zip(PARTS, seconds[place, :-1].tolist(), strict=True)),
            dict(zip(batches["batch"][places].tolist(), shares.tolist(), strict=True)),
            float(seconds[place, -1]),
            int(from_cache[place]),
        )
    return found


def _places(numbers: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each of `numbers` is in `among`; -1 where it is not."""
    order = np.argsort(among, kind="stable")
    found = np.append(order, -1)[np.searchsorted(among, numbers, sorter=order)]
    return np.where(np.append(among, -1)[found] == numbers, found, -1)


def _of_rewards(
    rows: np.ndarray,
    at: np.ndarray,
    viewers: np.ndarray,
    batches: np.ndarray,
    calls: np.ndarray,
    specs: Mapping[int, Mapping[str, Any]],
) -> np.ndarray:
    """Each row's part of the seconds of rewards: a batch's go to its calls as they took, and each to who asked.

    Args:
        rows: all of their batches.
        at: where their batches are.
        viewers: which of them have images that are judged.
        batches, calls, specs: see `costs`.
    """
    seconds, found = seconds_of(batches, "reward"), np.zeros(len(rows))
    place, took = _places(calls["batch"], batches["batch"]), calls["ended"] - calls["started"]
    requests, whose = np.unique(rows["request"], return_inverse=True)
    known = [specs.get(int(number)) for number in requests]
    here = place >= 0
    total = np.bincount(place[here], weights=took[here], minlength=len(batches))
    rest = seconds / np.where(total > 0, total, 1.0)
    for title in np.unique(calls["reward"][here]):
        own = here & (calls["reward"] == title)
        terms, held_out = (
            np.array([spec is None or title in _titles(spec.get(kind)) for spec in known], bool)[whose]
            for kind in ("terms", "held_out")
        )
        asked = viewers & (terms | (held_out & (rows["kind"] == KINDS.index("image"))))
        asked |= viewers & ~np.isin(at, at[asked])  # nobody is known to have asked
        found += _shared(rest * np.bincount(place[own], weights=took[own], minlength=len(batches)), at, asked)
    return found + _shared(np.where(total > 0, 0.0, seconds), at, viewers)


def _shared(seconds: np.ndarray, at: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Each row's part of the seconds of its batch, which its members share."""
    count, found = np.bincount(at[members], minlength=len(seconds)), np.zeros(len(at))
    found[members] = (seconds / np.maximum(count, 1))[at[members]]
    return found


def _titles(given: Sequence[str] | None) -> set[str]:
    """Titles of rewards, as the table of calls has them."""
    return {title[: CALL["reward"].itemsize // 4] for title in given or ()}


@dataclass(frozen=True)
class Lane:
    """What a lane did: seconds of a span of time, which add up to it.

    `stages` are those of batches by stage, with "host" for what is outside of them; `chores` by kind.
    """

    lane: int
    wall: float
    stages: Mapping[str, float]
    chores: Mapping[str, float]
    idle: float


def lanes(batches: np.ndarray, begin: float, end: float) -> list[Lane]:
    """What each lane did from `begin` to `end`, seconds of the ledger's clock; batches are counted whole.

    Idle is what lies between batches, by their starts and ends; the rest is measured inside of them. Batches that are
    not over are counted until `end`.
    """
    found = []
    batches = batches[(batches["lane"] >= 0) & ~(batches["ended"] <= begin) & (batches["started"] < end)]
    for lane in np.unique(batches["lane"]):
        own = batches[batches["lane"] == lane]
        own = own[np.argsort(own["started"])]
        running = np.isnan(own["ended"])
        own["ended"] = np.where(running, end, own["ended"])
        took = own["ended"] - own["started"]
        own["host"] = np.where(running, took - sum(own[f"{stage}_seconds"] for stage in LANE_STAGES), own["host"])
        work = own[~is_chore(own)]
        stages = {stage: float(seconds_of(work, stage).sum()) for stage in LANE_STAGES}
        stages["reward"] = float(seconds_of(work[work["work"] == WORK.index("guided")], "reward").sum())
        stages["host"] = float(seconds_of(work, "host").sum())
        chores = {kind: float(took[own["work"] == WORK.index(kind)].sum()) for kind in CHORES}
        free, taken = np.append(begin, own["ended"]), np.append(own["started"], end)
        idle = float(np.maximum(0.0, taken - free).sum())
        found.append(Lane(int(lane), end - begin, stages, {k: v for k, v in chores.items() if v}, idle))
    return found


def overlap(own: np.ndarray, others: np.ndarray) -> float | None:
    """The share of the time of intervals in which some other ran too; None where there is none.

    Args:
        own, others: starts and ends, [n, 2]. Times in which several of `own` run count once for each.
    """
    own = own[~np.isnan(own).any(1)]
    total = float((own[:, 1] - own[:, 0]).sum())
    shared = sum(
        np.clip(np.minimum(own[:, 1], end) - np.maximum(own[:, 0], start), 0, None).sum()
        for start, end in spans.union(others)
    )
    return float(shared) / total if total > 0 else None


def intervals(batches: np.ndarray, stage: str) -> np.ndarray:
    """Starts and ends of a stage of batches, [n, 2]; on CUDA those of the device."""
    host = np.stack([batches[f"{stage}_started"], batches[f"{stage}_ended"]], 1)
    if stage not in DEVICE_STAGES:
        return host
    start = batches[f"{stage}_device_started"]
    device = np.stack([start, start + batches[f"{stage}_device_seconds"]], 1)
    return np.where(np.isnan(device), host, device)


def done(batches: np.ndarray) -> np.ndarray:
    """When a lane was done with each batch: the device too."""
    found = batches["ended"].copy()
    for stage in LANE_STAGES:
        if stage in DEVICE_STAGES:
            found = np.fmax(found, batches[f"{stage}_device_started"] + batches[f"{stage}_device_seconds"])
    return np.where(np.isnan(batches["ended"]), np.nan, found)
