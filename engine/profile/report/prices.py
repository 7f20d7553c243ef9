"""What an image and a point of reward cost: function evaluations, lane seconds and dollars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollflow.profile.accounts import Cost
from rollflow.profile.recording import Recording
from rollflow.profile.records import FATES


def prices(
    recording: Recording, curves: Sequence[Mapping[str, Any]], lanes: int, usd_per_hour: float | None
) -> dict[str, Any]:
    """What the requests that are done cost, by method and reward, and what the others did.

    A request costs its share of its batches' lane time, see `rollflow.profile.accounts.costs`. It gained the reward of
    its image over the reward of the first particle of it that was judged. Costs of a point are sums over the requests
    of which both are known, divided by the sum of what these gained.

    Args:
        recording: what is paid for.
        curves: see `rollflow.profile.report.progress`.
        lanes: among which the price is divided.
        usd_per_hour: price of the whole device; None if unknown: no dollars then.

    Returns:
        "usd_per_hour"; "usd_per_lane_second"; "usd" of the recording's whole time, and that "usd_per_image"; "images";
        "methods", a list; and "rest", of the requests that have no image: "requests", "nfe", "lane_seconds", "usd".
    """
    dollars = None if usd_per_hour is None else usd_per_hour / lanes / 3600
    first = {one["request"]: one["first"] for one in curves}
    requests = recording.requests
    done = requests[requests["state"] == FATES.index("done")]
    spent = recording.costs
    found = []
    for method, reward in sorted({(str(one["method"]), str(one["reward"])) for one in done}):
        own = [
            one for one in done if (one["method"], one["reward"]) == (method, reward) and int(one["request"]) in spent
        ]
        if not own:
            continue
        judged = [one for one in own if int(one["request"]) in first and not np.isnan(one["score"])]
        gain = sum(float(one["score"]) - first[int(one["request"])] for one in judged)
        entry = {"method": method, "reward": reward, "images": len(own), "judged": len(judged)}
        image = _spent([spent[int(one["request"])] for one in own], len(own), dollars)
        point = _spent([spent[int(one["request"])] for one in judged], gain, dollars)
        entry.update((f"{name}_per_image", value) for name, value in image.items())
        entry["gain_per_image"] = gain / len(judged) if judged else None
        entry.update((f"{name}_per_point", value) for name, value in point.items())
        found.append(entry)
    finished = {int(one["request"]) for one in done}
    rest = [cost for number, cost in spent.items() if number not in finished]
    whole = None if usd_per_hour is None else usd_per_hour * recording.seconds / 3600
    return {
        "usd_per_hour": usd_per_hour,
        "usd_per_lane_second": dollars,
        "usd": whole,
        "usd_per_image": None if whole is None or not len(done) else whole / len(done),
        "images": len(done),
        "methods": found,
        "rest": {"requests": len(rest), **_spent(rest, 1.0, dollars)},
    }


def _spent(costs: Sequence[Cost], among: float, dollars: float | None) -> dict[str, float | None]:
    """Evaluations, lane seconds and dollars of some requests, divided; None where there is nothing to divide by."""
    if among <= 0:
        return {"nfe": None, "lane_seconds": None, "usd": None}
    seconds = sum(cost.lane_seconds for cost in costs) / among
    nfe = sum(sum(cost.nfe.values()) for cost in costs) / among
    return {"nfe": nfe, "lane_seconds": seconds, "usd": None if dollars is None else seconds * dollars}
