"""A recording batch by batch, in order of time: what each took of its lane, and what for."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from rollflow.profile.accounts import SPENT, done, purpose, seconds_of
from rollflow.profile.recording import Recording
from rollflow.profile.records import KINDS, LANE_STAGES, STATES, WORK

WORKS = ("rows", "guided", "images")  # of batches
ROW_KINDS = (*SPENT, "open", "image")  # what an entry of a batch was for; open: its search had not taken it back
Picked = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys, seconds and units of a `rollflow.profile.matched.Sample`


class Batchwise:
    """What ran on the lanes of a recording; arrays have an entry for each batch and chore that was started.

    Attributes:
        recording: which.
        lanes: how many there were.
        table: entries of the ledger's table, by their start.
        span: seconds of the lane, until the device is done with it, and until the recording's end at most.
        cycle: those with the lane's idle time before it, and after the last.
        work: place in `WORKS`; -1 of chores.
        kinds: entries of it, padding included, by what they were for, [n, len(ROW_KINDS)].
        nfe: NFE by what they were for, [n, len(SPENT)].
        kept: NFE that are part of a search.
        scored: rows that were decoded and judged.
        decoded: those, padded to a batch size.
    """

    def __init__(self, recording: Recording):
        self.recording = recording
        table = recording.batches
        table = table[(table["lane"] >= 0) & ~np.isnan(table["started"])]
        self.table = table = table[np.argsort(table["started"], kind="stable")]
        self.lanes = max(int(recording.about.get("lanes", 1)), int(table["lane"].max(initial=0)) + 1)
        self.cycle, self.span = self._times()
        found = np.full(len(WORK), -1)
        found[[WORK.index(work) for work in WORKS]] = range(len(WORKS))
        self.work = found[table["work"]]
        self._count()

    def _times(self) -> tuple[np.ndarray, np.ndarray]:
        """Cycles and spans. A batch that comes while the device is on the one before it begins when that is done."""
        table, end = self.table, self.recording.end
        until = np.minimum(np.nan_to_num(done(table), nan=end), end)
        cycle, span = np.zeros(len(table)), np.zeros(len(table))
        for lane in np.unique(table["lane"]):
            own = np.flatnonzero(table["lane"] == lane)
            edges = np.maximum.accumulate(np.concatenate([[self.recording.begin], until[own]]))
            cycle[own] = np.diff(edges)
            span[own] = np.minimum(cycle[own], edges[1:] - table["started"][own])
            cycle[own[-1]] += end - edges[-1]
        return cycle, np.maximum(0.0, span)

    def _count(self) -> None:
        rows, many = self.recording.rows, len(self.table)
        order = np.argsort(self.table["batch"], kind="stable")
        numbers = self.table["batch"][order]
        place = np.minimum(np.searchsorted(numbers, rows["batch"]), max(many - 1, 0))
        known = numbers[place] == rows["batch"] if many else np.zeros(len(rows), bool)
        rows, at = rows[known], order[place[known]] if many else place[:0]
        what = purpose(rows)
        image = rows["kind"] == KINDS.index("image")
        column = np.where(image, ROW_KINDS.index("image"), what)
        self.kinds, self.nfe = np.zeros((many, len(ROW_KINDS))), np.zeros((many, len(SPENT)))
        np.add.at(self.kinds, (at, column), 1)
        spent = (what < len(SPENT)) & ~image
        np.add.at(self.nfe, (at[spent], what[spent]), rows["nfe"][spent])
        kept = (rows["state"] == STATES.index("kept")) & ~image
        self.kept = np.bincount(at[kept], weights=rows["nfe"][kept], minlength=many)
        self.scored = np.bincount(at[rows["scored"]], minlength=many)
        sizes = np.array([0, *sorted(self.recording.about.get("buckets", []))])
        padded = sizes[np.minimum(np.searchsorted(sizes, self.scored), len(sizes) - 1)]
        self.decoded = np.maximum(padded, self.scored)  # of images, more than the largest size come in several decodes

    @property
    def lane_seconds(self) -> float:
        """Seconds of all lanes."""
        return self.lanes * self.recording.seconds

    @cached_property
    def idle(self) -> float:
        """Seconds of lanes without work."""
        return self.lane_seconds - float(self.span.sum())

    @cached_property
    def executed(self) -> np.ndarray:
        """Rows of the batch, padding included, images not."""
        return self.kinds.sum(1) - self.kinds[:, ROW_KINDS.index("image")]

    def seconds(self, stage: str) -> np.ndarray:
        """Seconds of a stage, on CUDA the device's; "host" is the rest of a lane's, waiting for the device included."""
        if stage != "host":
            return np.where(self.work < 0, 0.0, seconds_of(self.table, stage))
        own = sum(self.seconds(lane_stage) for lane_stage in LANE_STAGES)
        own += np.where(self.work == WORKS.index("guided"), self.seconds("reward"), 0.0)
        return np.where(self.work < 0, 0.0, self.span - own)

    def batches(self, stage: str, work: str) -> Picked:
        """Batches of a kind of work by size, for a `Sample`, with their seconds of a stage ("batch": all of them)."""
        own, table = self.work == WORKS.index(work), self.table
        size = [table[name] for name in ("height", "width", "frames")]
        columns = {
            "decode": [self.decoded],
            "decide": [table["rows"]],
            "batch": [table["bucket"], table["network_rows"], self.decoded],
        }.get(stage, [table["bucket"], table["network_rows"]])
        keys = np.stack([*size, *columns], 1).astype(np.int64)[own]
        seconds = self.span if stage == "batch" else self.seconds(stage)
        units = self.scored if stage == "decode" else table["rows"]
        return keys, seconds[own], units[own].astype(float)

    def calls(self, reward: str) -> Picked:
        """Calls of a reward by images, for a `Sample`; where the device's time is known, their share of it.

        Guided batches call rewards on their lane, and are left out.
        """
        calls = self.recording.calls[np.argsort(self.recording.calls["started"], kind="stable")]
        took = calls["ended"] - calls["started"]
        numbers = {int(number): i for i, number in enumerate(self.table["batch"])}
        at = np.array([numbers.get(int(number), -1) for number in calls["batch"]], dtype=np.int64)
        known = at >= 0
        total = np.bincount(at[known], weights=took[known], minlength=len(self.table))
        device = self.table["reward_device_seconds"]
        timed = known.copy()
        timed[known] = ~np.isnan(device[at[known]]) & (total[at[known]] > 0)
        took[timed] *= device[at[timed]] / total[at[timed]]
        guided = known.copy()
        guided[known] = self.work[at[known]] == WORKS.index("guided")
        own = (calls["reward"] == reward) & ~guided
        return calls["images"][own].astype(np.int64)[:, None], took[own], calls["images"][own].astype(float)
