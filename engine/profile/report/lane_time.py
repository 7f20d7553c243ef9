"""What each lane did, second by second, why it was idle, and what of it limits the whole.

Where the device's own times are known (CUDA), a stage lasts as long as on the device, and a lane is taken until the
device is done with its batch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollflow.profile import spans
from rollflow.profile.accounts import done, intervals, is_chore, seconds_of
from rollflow.profile.recording import Recording
from rollflow.profile.records import CHORES, DEVICE_STAGES, LANE_STAGES, WORK

# Why a lane is idle: rewards of rows are awaited; the loop takes answers back, chooses rows or hands them over; all
# rows that could run are on another lane; no request is here.
IDLE = ("idle_rewards", "idle_loop", "idle_rows", "idle_nothing")
# reward: called on the lane, of guided rows. host: of a batch, outside of its stages. queue: the device is busy with
# another lane's batch. outside: batches that began before the recording, or had not ended with it.
PARTS = (*LANE_STAGES, "reward", "host", "queue", *CHORES, *IDLE, "outside")
# What may limit the whole, and the parts that count for it.
LIMITS: Mapping[str, Sequence[str]] = {
    "forward": ("forward",),
    "decode": ("decode",),
    "backward": ("backward",),
    "propose": ("propose",),
    "finish": ("finish",),
    "rewards": ("reward", "idle_rewards"),
    "host": ("host", "idle_loop"),
    "chores": CHORES,
    "rows": ("idle_rows",),
    "nothing": ("idle_nothing",),
}
# What a what-if scenario scales that makes it faster.
SCALED = {"forward": "forward", "decode": "decode", "rewards": "reward", "host": "host"}


def answered(batches: np.ndarray) -> np.ndarray:
    """When a batch's last row was back with its search; the end on its lane where that was not written down."""
    decided = batches["decide_ended"]
    return np.where(np.isnan(decided), _judged(batches), decided)


def _judged(batches: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(batches["reward_ended"]), done(batches), batches["reward_ended"])


def lane_time(recording: Recording) -> list[dict[str, Any]]:
    """Of each lane {"lane", "seconds"}: seconds by part, see `PARTS`; they add up to the recording's."""
    batches = recording.batches[recording.batches["lane"] >= 0]
    count = max([int(recording.about.get("lanes", 0)), *(batches["lane"] + 1).tolist()])
    taken = [_taken(batches[batches["lane"] == lane], recording) for lane in range(count)]
    found = []
    for lane, (ran, outside) in enumerate(taken):
        seconds = _inside(batches, lane, ran)
        seconds["outside"] = spans.length(outside)
        gaps = spans.without(np.array([[recording.begin, recording.end]]), spans.union(ran, outside))
        others = spans.union(spans.NEVER, *(part for other, pair in enumerate(taken) if other != lane for part in pair))
        seconds.update(zip(IDLE, _idle(recording, gaps, others), strict=True))
        found.append({"lane": lane, "seconds": {part: seconds[part] for part in PARTS}})
    return found


def _taken(own: np.ndarray, recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """When a lane was on batches that are known from start to end, and on others."""
    own = np.sort(own[~np.isnan(own["started"])], order="started")
    ran = spans.between(own["started"], done(own))
    at_end = own[np.isnan(own["ended"])]
    outside = spans.between(at_end["started"], np.full(len(at_end), recording.end))
    if len(own) and own["idle"][0] < own["started"][0] - recording.begin:  # something ended within the recording
        outside = spans.union(outside, np.array([[recording.begin, own["started"][0] - own["idle"][0]]]))
    return ran, spans.without(outside, ran)


def _inside(batches: np.ndarray, lane: int, ran: np.ndarray) -> dict[str, float]:
    """What a lane did of its batches."""
    own = batches[(batches["lane"] == lane) & ~np.isnan(batches["ended"])]
    work, guided = own[~is_chore(own)], own[own["work"] == WORK.index("guided")]
    seconds = {stage: float(seconds_of(work, stage).sum()) for stage in LANE_STAGES}
    seconds["reward"] = float(seconds_of(guided, "reward").sum())
    for kind in CHORES:
        chores = own[own["work"] == WORK.index(kind)]
        seconds[kind] = float((chores["ended"] - chores["started"]).sum())
    rest = max(0.0, spans.length(ran) - sum(seconds.values()))
    seconds["queue"] = min(rest, _queue(batches, lane, ran))
    seconds["host"] = rest - seconds["queue"]
    return seconds


def _queue(batches: np.ndarray, lane: int, ran: np.ndarray) -> float:
    """Seconds for which a lane's batch waited while the device worked for another lane."""
    device = [stage for stage in DEVICE_STAGES if stage in LANE_STAGES]

    def timed(some: np.ndarray) -> np.ndarray:
        starts = [(some[f"{stage}_device_started"], some[f"{stage}_device_seconds"]) for stage in device]
        return spans.union(*(spans.between(start, start + seconds) for start, seconds in starts))

    own = batches[batches["lane"] == lane]
    waits = spans.without(ran, spans.union(timed(own), *(_span(own, stage) for stage in ("propose", "finish"))))
    return spans.length(spans.common(waits, timed(batches[batches["lane"] != lane])))


def _span(batches: np.ndarray, stage: str) -> np.ndarray:
    return spans.union(intervals(batches, stage))


def _idle(recording: Recording, gaps: np.ndarray, others: np.ndarray) -> list[float]:
    """Seconds of a lane's gaps by reason, see `IDLE`. A moment counts once: nothing, loop, rewards, rows, in turn."""
    batches = recording.batches
    beside = batches[batches["work"] != WORK.index("guided")]  # the others' rewards are called on a lane
    loop = spans.union(
        spans.between(batches["chosen"], batches["started"]),
        spans.between(_judged(batches), batches["decide_ended"]),
    )
    rewards = spans.between(beside["reward_started"], beside["reward_ended"])
    rest = spans.common(gaps, _live(recording))
    nothing = spans.length(gaps) - spans.length(rest)
    found = {}
    for name, times in (("loop", loop), ("rewards", rewards), ("rows", others)):
        found[name] = spans.length(spans.common(rest, times))
        rest = spans.without(rest, times)
    return [found["rewards"], found["loop"] + spans.length(rest), found["rows"], nothing]


def _live(recording: Recording) -> np.ndarray:
    """When a request was here. Of one that came before the recording it is known from its batches."""
    known, rows, batches = recording.requests, recording.rows, recording.batches
    ended = np.where(np.isnan(known["ended"]), recording.end, known["ended"])
    sets = [spans.between(known["submitted"], ended)]
    strange = rows[~np.isin(rows["request"], known["request"])]
    for request in np.unique(strange["request"]):
        own = batches[np.isin(batches["batch"], strange["batch"][strange["request"] == request])]
        if len(own) and not np.isnan(end := np.nanmax([*answered(own), -np.inf])):
            sets.append(np.array([[recording.begin, end]]))
    return spans.union(*sets)


def limit(lanes: Sequence[Mapping[str, Any]], scenarios: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What limits the whole: the one of `LIMITS` that most of the lanes' time goes to.

    Args:
        lanes: what `lane_time` found.
        scenarios: predictions, see `rollflow.profile.report.page`.

    Returns:
        "what" limits (None where no lane did anything); its "share" of the lanes' time, the time in which a lane waits
        behind another one aside; "halved", how many times as fast all would be if half of that time were saved and
        nothing else changed; "scenario", the one that makes it fastest; and "then", {"what", "share"}, what took most
        of the time in which there was a request, where for most of the time there was none.
    """
    total = {part: sum(lane["seconds"][part] for lane in lanes) for part in PARTS}
    seconds = {what: sum(total[part] for part in parts) for what, parts in LIMITS.items()}
    time = sum(total.values()) - total["queue"]
    if time <= 0 or not any(seconds.values()):
        return {"what": None, "share": None, "halved": None, "scenario": None, "then": None}
    what = max(seconds, key=lambda name: seconds[name])
    share, then = seconds[what] / time, None
    if what == "nothing":
        busy = {name: spent for name, spent in seconds.items() if name != "nothing"}
        second = max(busy, key=lambda name: busy[name])
        then = {"what": second, "share": busy[second] / (time - seconds["nothing"])} if busy[second] else None
    faster = re.compile(rf"{SCALED.get(what, what)} 0\.[0-9]+x")
    named = [one for one in scenarios if faster.fullmatch(str(one["name"]))]
    best = max(named, key=lambda one: one["speedup"], default=None)
    scenario = None if best is None else {"name": str(best["name"]), "speedup": float(best["speedup"])}
    return {"what": what, "share": share, "halved": 1 / (1 - share / 2), "scenario": scenario, "then": then}
