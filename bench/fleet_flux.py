"""Replays on paper of a GPU that is not here: a recording of `shapes`, with the seconds that FLUX was measured to take.

What is asked and which rewards come is as it was recorded; batches, decoding and the reward take the seconds of
`bench/results/gpu` at 1024x1024 in bfloat16. Of the searches that were measured there too, it is known how far off that
is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rollflow.errors import RequestError, shown
from rollflow.whatif.changes import Change
from rollflow.whatif.measured import FULL, Curve, Size
from rollflow.whatif.replay import Replay

AROUND = 0.0005  # seconds that the host takes to launch a batch: 0.05 % of the measured searches were the host's
SHOWING = 0.005  # seconds of making an image of a finished search, besides decoding
CORES, LANES = 16, 2  # of the machine that was measured, and of its engine
Row = dict[str, Any]


def rows_of(file: Path, geometry: str = "flux") -> list[Row]:
    """The rows of a result file that are of one network.

    Raises:
        RequestError: there is no such file, or nothing of the network is in it.
    """
    try:
        found = [row for row in json.loads(file.read_text())["rows"] if row.get("geometry") == geometry]
    except (OSError, ValueError, KeyError) as error:
        raise RequestError(f"{shown(str(file))} is no result of rollflow bench gpu: give --gpu its folder") from error
    if not found:
        raise RequestError(f"{shown(str(file))} has nothing of {geometry}: run rollflow bench gpu on such a machine")
    return found


def seconds(rows: Sequence[Row], contender: str, mode: str) -> dict[int, float]:
    """Seconds of a call by batch size."""
    mine = [row for row in rows if (row["contender"], row.get("mode")) == (contender, mode) and "bucket" in row]
    return {int(row["bucket"]): float(row["seconds"]) for row in sorted(mine, key=lambda row: row["bucket"])}


def on_gpu(recorded: Replay, rows: Sequence[Row], lanes: int = LANES) -> Replay:
    """A replay of the same requests whose batches take the measured seconds of a GPU, which are not corrected."""
    replay = copy(recorded)
    graphs, decode, reward = (
        seconds(rows, contender, mode)
        for contender, mode in (("bare transformer", "graph"), ("bare decode", "eager"), ("bare reward", "eager"))
    )
    known = replay.measured
    sizes: dict[tuple[int, int, int], Size] = {}
    for key, size in known.sizes.items():
        whole = {bucket: taken + decode[bucket] for bucket, taken in graphs.items()}
        around = Curve(dict.fromkeys(graphs, AROUND), {})
        decoding, nothing = Curve(decode, {}), Curve({}, {})
        sizes[key] = Size(
            size.geometry, size.slots, whole, Curve(graphs, {}), around, nothing, nothing, {FULL: decoding}, SHOWING
        )
    rising = dict(zip(reward, np.maximum.accumulate([*reward.values()]).tolist(), strict=True))
    judged = {term: Curve(rising, {}) for term in known.rewards}
    replay.measured = replace(
        known, sizes=sizes, rewards=judged, waiting=dict.fromkeys(judged, 0.0), encode=0.0, turnaround=0.0
    )
    machine = {"device": "cuda", "cores": CORES, "lanes": lanes, "threads": 1, "parallel": False, "preview": False}
    replay.recording = replace(recorded.recording, about={**recorded.recording.about, **machine})
    replay.correction = 1.0
    return replay


def checked(recorded: Replay, rows: Sequence[Row], searches: Sequence[Row]) -> list[Row]:
    """The searches that were measured on the GPU, replayed: how far off a replay is, without a correction."""
    found = []
    for lanes, name in ((2, "engine, 2 lanes"), (1, "engine, 1 lane")):
        for row in (row for row in searches if row["contender"] == name):
            replay = on_gpu(recorded, rows, lanes)
            told = replay.run(Change(prompts=row["prompts"], nfe=row["nfe"], together=True)).seconds
            measured = float(np.median(row["seconds"]))
            found.append(
                {
                    "contender": name,
                    "measured_seconds": measured,
                    "replayed_seconds": told,
                    "error": told / measured - 1,
                }
            )
    return found
