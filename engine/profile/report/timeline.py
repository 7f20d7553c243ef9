"""Which rows were on each lane over time."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollflow.profile.accounts import SPENT, is_chore, purpose
from rollflow.profile.recording import Recording
from rollflow.profile.records import KINDS

ROWS = (*SPENT, "open", "image")  # what a row of a batch is for; open: on its way when the recording ended
BATCHES, LANES = 200, 4  # of one lane, and lanes, up to which each batch is drawn
BINS = 160


def timeline(recording: Recording) -> dict[str, Any]:
    """Rows by what they were for, batch by batch, or where there are many, as means over time.

    Returns:
        "binned" and "seconds", how long the recording is. Batch by batch, "lanes": of each "lane" the batches'
        "started" and "ended" (seconds since the recording began), "bucket" and "rows" by `ROWS`. Binned: "edges" in
        seconds, and means over lanes and the time of a bin of "rows" by `ROWS` and "bucket"; an idle lane has none.
    """
    batches = recording.batches
    batches = np.sort(batches[~is_chore(batches) & ~np.isnan(batches["ended"])], order="started")
    rows = _rows(recording, batches["batch"])
    lanes = np.unique(batches["lane"]).tolist()
    many = max((int((batches["lane"] == lane).sum()) for lane in lanes), default=0)
    started, ended = batches["started"] - recording.begin, batches["ended"] - recording.begin
    if many > BATCHES or len(lanes) > LANES:
        count = max(len(lanes), int(recording.about.get("lanes", 0)))
        return _binned(started, ended, batches["bucket"], rows, recording.seconds, count)
    found = []
    for lane in lanes:
        own = batches["lane"] == lane
        found.append(
            {
                "lane": lane,
                "started": started[own].tolist(),
                "ended": ended[own].tolist(),
                "bucket": batches["bucket"][own].tolist(),
                "rows": {name: rows[own, place].tolist() for place, name in enumerate(ROWS)},
            }
        )
    return {"binned": False, "seconds": recording.seconds, "lanes": found}


def _rows(recording: Recording, numbers: np.ndarray) -> np.ndarray:
    """Rows of each of these batches by what they were for, [batch, len(ROWS)]."""
    rows = recording.rows[np.isin(recording.rows["batch"], numbers)]
    what = purpose(rows)
    what[rows["kind"] == KINDS.index("image")] = ROWS.index("image")
    order = np.argsort(numbers)
    at = order[np.searchsorted(numbers, rows["batch"], sorter=order)] if len(numbers) else np.zeros(0, np.int64)
    found = np.zeros((len(numbers), len(ROWS)), np.int64)
    np.add.at(found, (at, what), 1)
    return found


def _binned(
    started: np.ndarray, ended: np.ndarray, bucket: np.ndarray, rows: np.ndarray, seconds: float, lanes: int
) -> dict[str, Any]:
    edges = np.linspace(0.0, seconds, BINS + 1)
    inside = np.minimum(ended, edges[1:, None]) - np.maximum(started, edges[:-1, None])
    share = np.clip(inside, 0.0, None) / (seconds / BINS * lanes)  # [bin, batch]
    means = share @ rows
    return {
        "binned": True,
        "seconds": seconds,
        "edges": edges.tolist(),
        "rows": {name: means[:, place].tolist() for place, name in enumerate(ROWS)},
        "bucket": (share @ bucket).tolist(),
    }
