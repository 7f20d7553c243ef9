"""How the best reward of each search rose with its evaluations and with time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollflow.profile.recording import Recording
from rollflow.profile.records import STATES
from rollflow.profile.report.lane_time import answered

DRAWN = 16  # requests whose curves are drawn by themselves
LEAST = 4  # requests of a band
POINTS = 64  # of a band
QUANTILES = {"low": 0.1, "middle": 0.5, "high": 0.9}


def curves(recording: Recording) -> list[dict[str, Any]]:
    """The best reward so far of each request that came within the recording and had a particle judged.

    Rows that were kept count, in the order in which their batches' answers were back with the search, those of a batch
    by their number.

    Returns:
        Of each "request", "method", "reward" (its expression), "judged" rows, "first" (the first one's reward), and the
        steps of the curve: "nfe" (that the request's kept rows took up to this one), "seconds" since it was submitted,
        and "best", at each row that was better than all before it, and at the last that was judged; "drawn", whether
        it is among the `DRAWN` that are drawn by themselves, evenly spread.
    """
    rows, batches, found = recording.rows, recording.batches, []
    kept = rows[rows["state"] == STATES.index("kept")]
    when = dict(zip(batches["batch"].tolist(), answered(batches).tolist(), strict=True))
    times = np.array([when.get(number, np.nan) for number in kept["batch"].tolist()])
    order = np.lexsort((kept["number"], kept["batch"], times, kept["request"]))
    kept, times = kept[order], times[order]
    first, last = (np.searchsorted(kept["request"], recording.requests["request"], side) for side in ("left", "right"))
    for one, start, end in zip(recording.requests, first, last, strict=True):
        own, seconds = kept[start:end], times[start:end] - one["submitted"]
        judged = ~np.isnan(own["reward"]) & ~np.isnan(seconds)
        if not judged.any():
            continue
        nfe, best = np.cumsum(own["nfe"].astype(int))[judged], np.maximum.accumulate(own["reward"][judged])
        steps = np.flatnonzero(np.diff(best, prepend=-np.inf) > 0)
        steps = np.union1d(steps, [len(best) - 1])
        found.append(
            {
                "request": int(one["request"]),
                "method": str(one["method"]),
                "reward": str(one["reward"]),
                "judged": int(judged.sum()),
                "first": float(own["reward"][judged][0]),
                "nfe": nfe[steps].tolist(),
                "seconds": seconds[judged][steps].tolist(),
                "best": best[steps].astype(float).tolist(),
            }
        )
    drawn = {*np.linspace(0, len(found) - 1, min(DRAWN, len(found))).round().astype(int).tolist()}
    return [{**one, "drawn": place in drawn} for place, one in enumerate(found)]


def bands(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Quantiles of the curves that are not drawn, by reward: "at", "low", "middle", "high" against "nfe" and "seconds".

    A curve counts from its first point on, and keeps its last value.
    """
    bands = []
    for reward in dict.fromkeys(one["reward"] for one in found):
        rest = [one for one in found if one["reward"] == reward and not one["drawn"]]
        if len(rest) < LEAST:
            continue
        band: dict[str, Any] = {"reward": reward, "requests": len(rest)}
        for axis in ("nfe", "seconds"):
            at = np.linspace(min(one[axis][0] for one in rest), max(one[axis][-1] for one in rest), POINTS)
            values = np.stack([_value(one, axis, at) for one in rest])
            band[axis] = {"at": at.tolist()}
            for name, share in QUANTILES.items():
                band[axis][name] = np.nanquantile(values, share, axis=0).tolist()
        bands.append(band)
    return bands


def _value(curve: Mapping[str, Any], axis: str, at: np.ndarray) -> np.ndarray:
    """A curve at some points; NaN before it begins."""
    step = np.searchsorted(curve[axis], at, side="right") - 1
    return np.where(step < 0, np.nan, np.array(curve["best"])[step])
