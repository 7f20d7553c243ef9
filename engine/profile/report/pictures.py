"""The report's pictures with what each says in words, from its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rollflow.profile.report import charts
from rollflow.profile.report.units import UNITS, text

PANELS = 6  # rewards, and image sizes, with pictures
# Parts of the lanes' time, in the order in which they are shown: what they are called, and what they are.
PARTS = {
    "forward": ("forward", "the network"),
    "decode": ("decode", "latents become images, for a reward or to be returned"),
    "propose": ("propose", "particles take their step"),
    "finish": ("finish", "posterior means of the velocities"),
    "backward": ("backward", "gradients of guided rows"),
    "reward": ("reward on a lane", "rewards of guided rows, whose gradient is needed"),
    "host": ("host", "of a batch, outside of its stages"),
    "queue": ("queue", "the device works for another lane's batch"),
    "encode": ("encode", "prompts are encoded"),
    "measure": ("measure", "batch sizes are timed"),
    "start": ("start", "given images are encoded"),
    "peek": ("peek", "looks at particles"),
    "other": ("other chores", "other work that is no batch"),
    "idle_rewards": ("idle, rewards", "rewards are being judged"),
    "idle_loop": ("idle, loop", "answers are taken back, rows are chosen and handed over"),
    "idle_rows": ("idle, no row", "all rows that could run are on another lane"),
    "idle_nothing": ("idle, no request", "nobody asks for anything"),
    "outside": ("cut off", "batches that began before the recording or had not ended with it"),
}


def pictures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures as SVG for a page.

    Args:
        found: see `rollflow.profile.figures.figures`.

    Returns:
        "lanes", "kinds", "timeline" and "levels", None where there is nothing to draw; "progress", of up to `PANELS`
        rewards the "reward", how many "requests" there are and are "drawn", whether the others are a "band", "methods"
        and the "picture"; and "buckets", of up to `PANELS` image sizes that ran, by their place in the figures.
    """
    kinds = {one["name"]: one["nfe"] for one in found["kinds"] if one["nfe"]}
    bars, nfe = (
        charts.bars(_lane_bars(found), "share of a lane's time"),
        charts.bars([("NFE", kinds)], "share of all NFE"),
    )
    times, levels = charts.timeline(found["timeline"]), charts.levels(found["levels"])
    sizes = sorted(enumerate(found["buckets"]), key=lambda pair: -pair[1]["batches"])
    ran = bool(found["timeline"].get("edges") or found["timeline"].get("lanes"))
    return {
        "lanes": _picture("lanes", _of_stages(found), bars) if any(one["seconds"] for one in found["stages"]) else None,
        "kinds": _picture("kinds", _of_kinds(kinds), nfe) if kinds else None,
        "timeline": _picture("timeline", _of_batches(found), times) if ran else None,
        "levels": _picture("levels", _of_levels(found["levels"]), levels) if kinds else None,
        "progress": [*_progress(found)],
        "buckets": {
            place: _picture(f"buckets{place}", _of_size(size), charts.buckets(size))
            for place, size in sizes[:PANELS]
            if size["batches"]
        },
    }


def _picture(name: str, label: str, draw: charts.Draw) -> Any:
    from markupsafe import Markup

    return Markup(charts.drawn(name, label, draw))


def _lane_bars(found: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """The parts of each lane's time, or of all lanes where there are many."""
    total = {one["name"]: one["seconds"] for one in found["stages"]}
    lanes = [(f"lane {lane['lane']}", lane["seconds"]) for lane in found["lanes"]]
    rows = lanes if len(lanes) <= charts.LANES else [("lanes", total)]
    return [(name, {part: seconds[part] for part in PARTS if seconds[part]}) for name, seconds in rows]


def _progress(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    colors = {one["method"]: place for place, one in enumerate(found["methods"])}
    images = {one["request"]: (one["committed"], one["seconds"], one["score"]) for one in found["requests"]}
    for place, reward in enumerate([*dict.fromkeys(one["reward"] for one in found["curves"])][:PANELS]):
        own = [one for one in found["curves"] if one["reward"] == reward]
        drawn = [one for one in own if one["drawn"]]
        band = next((one for one in found["bands"] if one["reward"] == reward), None)
        draw = charts.progress(drawn, band, colors, images)
        yield {
            "reward": reward,
            "requests": len(own),
            "drawn": len(drawn),
            "band": band is not None,
            "methods": [*dict.fromkeys(one["method"] for one in own)],
            "picture": _picture(f"progress{place}", _of_progress(own), draw),
        }


# What the pictures say, for those who cannot see them.


def _of_stages(found: Mapping[str, Any]) -> str:
    most = sorted((one for one in found["stages"] if one["share"]), key=lambda one: -one["share"])[:4]
    words = ", ".join(f"{PARTS[one['name']][0]} {text(one['share'], UNITS['share'])}" for one in most)
    return f"Where the lanes' time goes: {words}"


def _of_kinds(kinds: Mapping[str, int]) -> str:
    whole = sum(kinds.values())
    return "NFE by row kind: " + ", ".join(f"{name} {text(nfe / whole, UNITS['share'])}" for name, nfe in kinds.items())


def _of_batches(found: Mapping[str, Any]) -> str:
    filled = text(found["totals"]["occupancy"], UNITS["share"])
    return f"Rows on the lanes over time: {filled} of the places in batches hold a row, the rest is padding"


def _of_levels(levels: Mapping[str, Any]) -> str:
    totals = np.sum([one["nfe"] for one in levels["methods"]], axis=0)
    if not np.any(totals):
        return "NFE and lane seconds by point of the time grid"
    most, share = levels["levels"][int(np.argmax(totals))], text(float(totals.max() / totals.sum()), UNITS["share"])
    return f"NFE and lane seconds by point of the time grid: point {most} takes {share} of the NFE"


def _of_size(size: Mapping[str, Any]) -> str:
    if size["ratio"] is None:
        return f"Seconds of {size['batches']} batches by bucket; there is no cost model to compare them with"
    return f"Seconds of batches by bucket: they took {text(size['ratio'], UNITS['x'])} of what the cost model says"


def _of_progress(curves: Sequence[Mapping[str, Any]]) -> str:
    first, last = (
        float(np.mean(ends)) for ends in zip(*((one["first"], one["best"][-1]) for one in curves), strict=True)
    )
    words = f"{text(first, UNITS['number'])} at first and {text(last, UNITS['number'])} at last, on average"
    return f"Best reward so far of {len(curves)} searches: {words}"
