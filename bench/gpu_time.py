"""Where the wall time of searches goes: shares of it that add up to 1, so that the largest losses can be read off.

A moment counts as the first of these that is under way: a forward, the decoder, a reward, work of the host (a lane has
a batch, the scheduler chooses one, the loop takes rows back), and else nothing. So all but `forward` is what the bare
transformer would not have spent: of decodes beside forwards nothing counts, however long they take. On CUDA the first
three are the device's own time, by events.
"""

from __future__ import annotations

import numpy as np

from rollflow.profile import spans
from rollflow.profile.accounts import done, intervals

SHARES = ("forward", "decode", "reward", "host", "idle")


def shares(batches: np.ndarray, begin: float, end: float) -> dict[str, float]:
    """By each of `SHARES`, its share of the time from `begin` to `end`.

    Args:
        batches: the ledger's entries of all that ran then.
        begin: seconds of the ledger's clock.
        end: later than that.
    """
    busy = {stage: spans.union(intervals(batches, stage)) for stage in ("forward", "decode", "reward")}
    busy["forward"] = spans.union(busy["forward"], intervals(batches, "backward"))
    host = (("chosen", "submitted"), ("decide_started", "decide_ended"))
    busy["host"] = spans.union(
        spans.between(batches["started"], done(batches)), *(spans.between(batches[a], batches[b]) for a, b in host)
    )
    rest, found = np.array([[begin, end]], float), dict[str, float]()
    for name, times in busy.items():
        found[name] = spans.length(spans.common(rest, times)) / (end - begin)
        rest = spans.without(rest, times)
    return {**found, "idle": spans.length(rest) / (end - begin)}
