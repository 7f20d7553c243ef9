"""What batches took by their bucket, beside what the cost model takes them to take."""

from __future__ import annotations

from typing import Any

import numpy as np

from rollflow.profile.accounts import seconds_of
from rollflow.profile.recording import Recording
from rollflow.profile.records import WORK

DRAWN = 600  # batches that are drawn, of all sizes together
SIZE = ("height", "width", "frames")


def bucket_curves(recording: Recording) -> list[dict[str, Any]]:
    """Seconds of batches by bucket, for each image size, guided batches and final images aside.

    Returns:
        Of each size "height", "width", "frames" (0 of images), "batches", "decoded" (those whose rows were all
        decoded, so that the model's seconds are of the same work), "fit", {"bucket", "seconds"} of forward and decode
        as measured at warm-up, empty where they were not, "points", {"bucket", "network", "decode"} of at most its part
        of `DRAWN` (network: propose, forward and finish; decode is None where nothing was decoded), "table" of medians
        by bucket of decoded batches, and "ratio", the median of a decoded batch's seconds over the model's.
    """
    batches = recording.batches
    rows = (batches["work"] == WORK.index("rows")) & ~np.isnan(batches["ended"])
    known = [one for one in recording.about.get("sizes", []) if one.get("measured", True)]
    fits = {_size(one["geometry"]): one["seconds"] for one in known}
    seen = {tuple(int(value) for value in one) for one in batches[rows][[*SIZE]].tolist()}
    found, sizes = [], sorted({*fits, *seen})
    most = DRAWN // max(1, len(sizes))
    for size in sizes:
        own = rows & np.logical_and.reduce([batches[name] == value for name, value in zip(SIZE, size, strict=True)])
        fit = {int(bucket): float(seconds) for bucket, seconds in fits.get(size, {}).items()}
        found.append({**dict(zip(SIZE, size, strict=True)), **_curve(batches[own], fit, most)})
    return found


def _size(geometry: Any) -> tuple[int, ...]:
    return tuple(int(geometry[name] or 0) for name in SIZE)


def _curve(batches: np.ndarray, fit: dict[int, float], most: int) -> dict[str, Any]:
    network = seconds_of(batches, "propose") + seconds_of(batches, "forward") + seconds_of(batches, "finish")
    decode, bucket = seconds_of(batches, "decode"), batches["bucket"]
    whole = (batches["judged"] == batches["rows"]) & (decode > 0)
    total = network + decode
    model = np.array([fit.get(int(one), np.nan) for one in bucket])
    ratios = (total / model)[whole & ~np.isnan(model)]
    drawn = np.linspace(0, len(batches) - 1, min(most, len(batches))).round().astype(int)
    table = []
    for one in np.unique(bucket[whole]):
        own = whole & (bucket == one)
        medians = {"network": network[own], "decode": decode[own], "total": total[own]}
        entry = {name: float(np.median(values)) for name, values in medians.items()}
        table.append({"bucket": int(one), "batches": int(own.sum()), **entry, "model": fit.get(int(one))})
    return {
        "batches": len(batches),
        "decoded": int(whole.sum()),
        "fit": {"bucket": [*fit], "seconds": [*fit.values()]},
        "points": {
            "bucket": bucket[drawn].tolist(),
            "network": network[drawn].tolist(),
            "decode": [float(one) if one > 0 else None for one in decode[drawn]],
        },
        "table": table,
        "ratio": float(np.median(ratios)) if len(ratios) else None,
    }
