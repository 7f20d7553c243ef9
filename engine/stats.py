"""What an engine holds at a moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rollflow.device.costs import RewardCost


@dataclass(frozen=True)
class Stats:
    """What an engine holds at a moment.

    Attributes:
        queued: requests that wait to be let in.
        running: requests that were let in and are not over.
        rows: rows and final images that are on the device or with a reward.
        live: slots of particles that are in use.
        promised: slots that running requests were promised or have taken beyond that.
        free: slots that are not in use.
        buckets: batch sizes by (height, width), of clips (height, width, frames), of the sizes that were used so far.
        bounds: of the same sizes, why no batches are larger: "time", as larger ones are no faster a row; "memory", as
            they would not fit; "sizes", as none of the engine's batch sizes is. On a GPU a batch size is tried only
            where what it is expected to take, by the peaks of the smaller ones, fits into 90 % of the free memory.
        graph_memory: of the same sizes, bytes of the GPU's memory that their CUDA graphs hold; empty without graphs.
        nfe_per_second: evaluations a second over the last ten seconds, those that ran in vain included.
        abandoned: threads that were given up because a call of a reward did not come back within its timeout.
        rewards: what calls of each reward took so far, by its name.
        healthy: whether it takes requests: it was not closed, and its device did not fail.
    """

    queued: int
    running: int
    rows: int
    live: int
    promised: int
    free: int
    buckets: Mapping[tuple[int, ...], tuple[int, ...]]
    bounds: Mapping[tuple[int, ...], str]
    nfe_per_second: float
    abandoned: int
    healthy: bool
    rewards: Mapping[str, RewardCost] = field(default_factory=dict)
    graph_memory: Mapping[tuple[int, ...], int] = field(default_factory=dict)
