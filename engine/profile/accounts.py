"""Accounts of the ledger's tables: NFE by kind, seconds by stage, what each lane did, and each request's share.

A batch's time is shared among its entries, padding included, which is charged to the requests of its rows: so what
requests cost adds up to what the engine did, chores (encodings, measurements) aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollflow.profile.records import CHORES, DEVICE_STAGES, KINDS, LANE_STAGES, STAGES, STATES, WORK

SPENT = ("committed", "guided", "finish", "speculative", "padding")  # what an NFE was for
PARTS = (*STAGES, "host")  # what a batch's seconds went to


@dataclass(frozen=True)
class Cost:
    """What one request cost.

    Attributes:
        nfe: function evaluations that ran for it, by what they were for: "committed", "guided" and "finish" are those of
            its history, "speculative" ran ahead and were not needed, "padding" is its share of that; they add up to
            `Result.executed_nfe`.
        seconds: of its share of each batch, by stage: of a lane (propose, forward, finish, backward, decode, host), of
            the threads that judge (reward) and of the engine's loop (decide). On CUDA forward, backward, decode and reward are
            the device's time, others the host's.
        batches: its share of each batch, by the batch's number in the ledger.
    """

    nfe: Mapping[str, int]
    seconds: Mapping[str, float]
    batches: Mapping[int, float]

    @property
    def lane_seconds(self) -> float:
        """Seconds of lanes: what occupied the device."""
        return sum(self.seconds[part] for part in (*LANE_STAGES, "host"))

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


def nfe_by_kind(rows: np.ndarray) -> dict[str, int]:
    """Executed NFE by what they were for."""
    found = np.bincount(purpose(rows), weights=rows["nfe"], minlength=len(SPENT) + 1)
    return {name: int(found[i]) for i, name in enumerate(SPENT)}


def seconds_of(batches: np.ndarray, part: str) -> np.ndarray:
    """Seconds of a stage, or of the lane's own ("host"), in each batch: on CUDA the device's where it was timed."""
    if part == "host":
        return np.nan_to_num(batches["host"])
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
    rows: np.ndarray, batches: np.ndarray, calls: np.ndarray, terms: Mapping[int, Any] | None = None
) -> dict[int, Cost]:
    """What each request cost.

    Args:
        rows, batches, calls: the ledger's tables; batches that are not among them cost nothing here.
        terms: by request, the titles of the terms that its particles are judged by: calls of a reward are shared among
            those who asked for it. Requests that are not named share all of their batches' calls.
    """
    terms = terms or {}
    requests, whose = np.unique(rows["request"], return_inverse=True)
    places = {int(number): place for place, number in enumerate(batches["batch"])}
    at = np.array([places.get(int(number), -1) for number in rows["batch"]], dtype=np.int64)
    known = at >= 0
    seconds = np.zeros((len(requests), len(PARTS)))
    size = np.bincount(at[known], minlength=len(batches)).astype(float)  # entries
    scored = known & rows["scored"]
    judged = np.bincount(at[scored], minlength=len(batches)).astype(float)
    for part, name in enumerate(PARTS):
        mask, number = (scored, judged) if name in ("decode", "reward") else (known, size)
        each = seconds_of(batches, name) / np.maximum(number, 1)
        if name == "reward" and len({*map(str, calls["reward"])}) > 1:
            own = _reward_seconds(rows, at, scored, batches, calls, terms, requests[whose])
            seconds[:, part] = np.bincount(whose, weights=own, minlength=len(requests))
            continue
        none = number == 0  # nobody's rows were judged in it, and yet it took time: everybody's
        if name in ("decode", "reward") and (none & (each > 0)).any():
            shared = known & none[np.maximum(at, 0)]
            rest = seconds_of(batches, name) / np.maximum(size, 1)
            seconds[:, part] += np.bincount(whose[shared], weights=rest[at[shared]], minlength=len(requests))
        seconds[:, part] += np.bincount(whose[mask], weights=each[at[mask]], minlength=len(requests))
    spent = np.zeros((len(requests), len(SPENT) + 1))
    np.add.at(spent, (whose, purpose(rows)), rows["nfe"])
    shares: list[dict[int, float]] = [{} for _ in requests]
    pairs, counts = np.unique(np.stack([whose[known], at[known]]), axis=1, return_counts=True)
    for (request, place), count in zip(pairs.T, counts, strict=True):
        shares[request][int(batches["batch"][place])] = float(count / size[place])
    return {
        int(number): Cost(
            {name: int(spent[i, j]) for j, name in enumerate(SPENT)},
            {name: float(seconds[i, j]) for j, name in enumerate(PARTS)},
            shares[i],
        )
        for i, number in enumerate(requests)
    }


def _reward_seconds(
    rows: np.ndarray, at: np.ndarray, scored: np.ndarray, batches: np.ndarray, calls: np.ndarray,
    terms: Mapping[int, Any], owner: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Seconds of rewards of each row: those of a batch in proportion to its calls, each shared by those who asked."""
    own = np.zeros(len(rows))
    members: dict[int, np.ndarray] = {}
    order = np.argsort(at, kind="stable")
    bounds = np.searchsorted(at[order], np.arange(len(batches) + 1))
    for place in np.unique(at[at >= 0]):
        inside = order[bounds[place] : bounds[place + 1]]
        chosen = inside[scored[inside]]
        members[int(batches["batch"][place])] = chosen if len(chosen) else inside
    total = dict(zip(batches["batch"].tolist(), seconds_of(batches, "reward").tolist(), strict=True))
    called: dict[int, float] = {}
    for call in calls:
        number = int(call["batch"])
        called[number] = called.get(number, 0.0) + float(call["ended"] - call["started"])
    asked = {request: set(names) for request, names in terms.items()}
    for call in calls:
        inside = members.get(int(call["batch"]), np.zeros(0, np.int64))
        if not len(inside):
            continue
        name, number = str(call["reward"]), int(call["batch"])
        wanted = [i for i in inside if name in asked.get(int(owner[i]), {name})] or [*inside]
        share = float(call["ended"] - call["started"]) / called[number] if called[number] else 0.0
        own[wanted] += total[number] * share / len(wanted)
    return own


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

    Idle is what lies between batches, by their starts and ends; the rest is measured inside of them.
    """
    found = []
    for lane in np.unique(batches["lane"][batches["lane"] >= 0]):
        own = np.sort(batches[(batches["lane"] == lane) & ~np.isnan(batches["ended"])], order="started")
        own = own[(own["ended"] > begin) & (own["started"] < end)]
        if not len(own):
            continue
        chore = is_chore(own)
        edges = np.concatenate([[begin], own["ended"]]), np.concatenate([own["started"], [end]])
        stages = {stage: float(own[f"{stage}_seconds"][~chore].sum()) for stage in LANE_STAGES}
        guided = own["work"] == WORK.index("guided")
        stages["reward"] = float(own["reward_seconds"][guided].sum())
        stages["host"] = float(own["host"][~chore].sum())
        chores = {
            kind: float((own["ended"] - own["started"])[own["work"] == WORK.index(kind)].sum()) for kind in CHORES
        }
        idle = float(np.maximum(0.0, edges[1] - edges[0]).sum())
        found.append(Lane(int(lane), end - begin, stages, {k: v for k, v in chores.items() if v}, idle))
    return found


def overlap(own: np.ndarray, others: np.ndarray) -> float | None:
    """The share of the time of intervals in which some other ran too; None where there is none.

    Args:
        own, others: starts and ends, [n, 2]. Times in which several of `own` run count once for each.
    """
    merged: list[list[float]] = []
    for start, end in sorted(map(tuple, others[~np.isnan(others).any(1)].tolist())):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    own = own[~np.isnan(own).any(1)]
    total = float((own[:, 1] - own[:, 0]).sum())
    shared = sum(np.clip(np.minimum(own[:, 1], b) - np.maximum(own[:, 0], a), 0, None).sum() for a, b in merged)
    return float(shared) / total if total > 0 else None


def intervals(batches: np.ndarray, stage: str) -> np.ndarray:
    """Starts and ends of a stage of batches, [n, 2]; on CUDA those of the device."""
    host = np.stack([batches[f"{stage}_started"], batches[f"{stage}_ended"]], 1)
    if stage not in DEVICE_STAGES:
        return host
    start = batches[f"{stage}_device_started"]
    device = np.stack([start, start + batches[f"{stage}_device_seconds"]], 1)
    return np.where(np.isnan(device), host, device)
