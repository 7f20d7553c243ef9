"""The changes that a report asks about when nobody says which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rollflow.errors import RollflowError
from rollflow.whatif.changes import Change, Predicted
from rollflow.whatif.replay import Replay

USUAL = (
    Change(decode=0.5), Change(forward=0.5), Change(reward=0.1), Change(gpus=2),
)  # fmt: skip


def scenarios(replay: Replay, changes: Sequence[Change] | None = None) -> list[dict[str, Any]]:
    """What changes would bring, as rows of a table: the recording first, then each change.

    Args:
        replay: of a recording.
        changes: by default `USUAL`, twice as many requests and half of the largest budget. What cannot be replayed is
            left out.
    """
    if changes is None:
        budgets = [int(nfe) for nfe in replay.recording.requests["nfe"]]
        half = (Change(nfe=max(1, max(budgets) // 2)),) if budgets else ()
        changes = (*USUAL, Change(prompts=2 * len(replay)), *half)
    rows = [_row(replay, "as recorded", replay.base)]
    for change in changes:
        try:
            rows.append(_row(replay, str(change), replay.run(change)))
        except RollflowError:  # such as a budget that a method cannot spend
            continue
    return rows


def _row(replay: Replay, name: str, found: Predicted) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": found.seconds,
        "speedup": found.nfe_per_second / replay.base.nfe_per_second if replay.base.nfe_per_second else 1.0,
        "nfe_per_second": found.nfe_per_second,
        "p50": found.latency(0.5),
        "p95": found.latency(0.95),
        "occupancy": found.occupancy,
        "batches": found.batches,
    }
