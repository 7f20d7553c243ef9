"""The batches that took longer than their bucket usually does, and what of them did."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollflow.profile import spans
from rollflow.profile.accounts import done, is_chore, seconds_of
from rollflow.profile.recording import Recording
from rollflow.profile.records import CHORES, LANE_STAGES, WORK
from rollflow.profile.report.buckets import SIZE

LEAST = 4  # batches of a kind, below which nothing is usual
LISTED = 8
RATIO = 1.1  # times the usual, from which a batch is slow


def slowest(recording: Recording) -> dict[str, Any]:
    """The slowest batches, by the seconds that they took beyond what is usual.

    Usual are the medians of the batches of the same work, size, bucket and number of decoded rows.

    Returns:
        "compared" and "alone" (batches with too few of their kind to compare with), "slow" (those that took `RATIO`
        times the usual), and "listed", of at most `LISTED`: "batch", "lane", "work", its size, "bucket", "rows",
        "began" (seconds since the recording began), "seconds", "usual", the "cause", which is a stage or "host", by how
        many seconds it was longer than usual ("by") and what is usual of it ("of"), "idle", the seconds for which its
        lane had nothing to do before it, and "beside", {"kind", "seconds"} of a chore that ran on another lane.
    """
    counted = ~is_chore(recording.batches) & ~np.isnan(recording.batches["ended"])
    batches = recording.batches[counted]
    parts = _parts(batches)
    total = done(batches) - batches["started"]
    keys = np.stack([batches[name] for name in ("work", *SIZE, "bucket", "judged")], 1)
    _, group, size = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    compared = size[group] >= LEAST
    usual, usual_of = np.zeros(len(batches)), {name: np.zeros(len(batches)) for name in parts}
    for one in np.unique(group[compared]):
        own = group == one
        usual[own] = np.median(total[own])
        for name, seconds in parts.items():
            usual_of[name][own] = np.median(seconds[own])
    slow = np.flatnonzero(compared & (total > RATIO * usual))
    order = slow[np.argsort(usual[slow] - total[slow], kind="stable")][:LISTED]
    listed = []
    for place in order:
        more = {name: float(seconds[place] - usual_of[name][place]) for name, seconds in parts.items()}
        cause = max(more, key=lambda name: more[name])
        one = batches[place]
        listed.append(
            {
                **{name: int(one[name]) for name in ("batch", "lane", *SIZE, "bucket", "rows")},
                "work": WORK[one["work"]],
                "began": float(one["started"] - recording.begin),
                "seconds": float(total[place]),
                "usual": float(usual[place]),
                "cause": cause,
                "by": more[cause],
                "of": float(usual_of[cause][place]),
                "idle": None if np.isnan(one["idle"]) else float(one["idle"]),
                "beside": _beside(recording, one),
            }
        )
    counts = {"compared": int(compared.sum()), "alone": int((~compared).sum()), "slow": len(slow)}
    return {**counts, "listed": listed}


def _parts(batches: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds of each batch by what its lane did."""
    parts = {stage: seconds_of(batches, stage) for stage in LANE_STAGES}
    parts["reward"] = np.where(batches["work"] == WORK.index("guided"), seconds_of(batches, "reward"), 0.0)
    parts["host"] = np.maximum(0.0, done(batches) - batches["started"] - sum(parts.values()))
    return parts


def _beside(recording: Recording, batch: np.void) -> dict[str, Any] | None:
    """The chore that ran longest on another lane while this batch ran."""
    own, found = np.array([[batch["started"], batch["ended"]]]), {}
    others = recording.batches[recording.batches["lane"] != batch["lane"]]
    for kind in CHORES:
        chores = others[others["work"] == WORK.index(kind)]
        found[kind] = spans.length(spans.common(own, spans.between(chores["started"], chores["ended"])))
    longest = max(found, key=lambda kind: found[kind])
    return {"kind": longest, "seconds": found[longest]} if found[longest] > 0 else None
