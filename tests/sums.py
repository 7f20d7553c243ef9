"""What must add up in every recording, computed from its raw tables without the package's own accounts."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from rollflow.profile import accounts
from rollflow.profile.records import CHORES, FATES, KINDS, LANE_STAGES, STAGES, STATES, WORK

SPENT = {"committed": "committed", "guided": "guided", "finish": "finish", "refresh": "refresh"}


def words(table, field, names):
    """The words that a field's numbers stand for."""
    return [names[code] for code in table[field].tolist()]


def spent_on(rows):
    """NFE and rows by what they were for, row by row."""
    nfe, count = Counter(), Counter()
    for kind, state, cost in zip(
        words(rows, "kind", KINDS), words(rows, "state", STATES), rows["nfe"].tolist(), strict=True
    ):
        assert state != "open", "a row was never taken back"
        if kind != "image":
            what = "speculative" if kind != "padding" and state == "dropped" else kind
            nfe[what] += cost
            count[what] += 1
        else:
            assert cost == 0 and state == "kept"
    return nfe, count


def lane_stages(batch):
    """The stages that the lane itself does."""
    return (*LANE_STAGES, "reward") if WORK[batch["work"]] == "guided" else LANE_STAGES


def assert_adds_up(recording, results=(), ledger=None):
    """Rows, batches, calls and requests of a recording in which everything began and ended tell the same.

    Args:
        recording: of all that the engine did.
        results: in the order of the table of requests; None for one that failed.
        ledger: whose counters began with the recording, or None.
    """
    rows, batches = recording.rows, recording.batches
    assert not any(recording.about["forgotten"].values())
    nfe, count = spent_on(rows)
    if ledger is not None:
        assert {k: v for k, v in ledger.executed.items() if v} == dict(count)
        work = batches[np.isin(batches["work"], [WORK.index("rows"), WORK.index("guided")])]
        assert work["network_rows"].sum() == ledger.network_rows and len(work) == ledger.ticks
        for stage in STAGES:
            assert batches[f"{stage}_seconds"].sum() == pytest.approx(ledger.seconds.get(stage, 0.0), abs=1e-9)
        for number, cost in recording.costs.items():  # by the request's own rows where that is enough
            again = ledger.cost(number)
            assert (again.nfe, again.batches) == (cost.nfe, cost.batches)
            assert again.seconds == pytest.approx(cost.seconds, abs=1e-9)
    assert accounts.nfe_by_kind(rows) == {kind: nfe[kind] for kind in accounts.SPENT}
    assert_rows_are_in_batches(rows, batches)
    assert_batches_follow_one_another(recording)
    assert_costs_add_up(recording)
    assert sum(recording.requests["executed"].clip(0).tolist()) == sum(nfe.values())
    for entry, result in zip(recording.requests, results, strict=bool(results)):
        assert_request(entry, rows[rows["request"] == entry["request"]], recording.costs, result)


def assert_rows_are_in_batches(rows, batches):
    members = defaultdict(list)
    for number, kind, scored in zip(
        rows["batch"].tolist(), words(rows, "kind", KINDS), rows["scored"].tolist(), strict=True
    ):
        members[number].append((kind, scored))
    assert members.keys() <= {*batches["batch"].tolist()}
    for batch in batches:
        own, what = members[int(batch["batch"])], WORK[batch["work"]]
        assert len(own) == batch["bucket"] and sum(kind != "padding" for kind, _ in own) == batch["rows"]
        assert sum(scored for _, scored in own) == batch["judged"]
        assert (what in CHORES) == (not own)
        assert ({kind for kind, _ in own} <= {"image"}) == (what in ("images", *CHORES))


def assert_batches_follow_one_another(recording):
    """Of each batch and lane, what was done and what was not add up to what passed."""
    batches = recording.batches
    assert (batches["chosen"] <= batches["submitted"]).all() and (batches["submitted"] <= batches["started"]).all()
    for batch in batches:
        stages = sum(float(batch[f"{stage}_seconds"]) for stage in lane_stages(batch))
        assert stages + batch["host"] == pytest.approx(batch["ended"] - batch["started"], abs=1e-9)
        assert batch["host"] >= -1e-9, "stages of one lane overlap"
        for stage in STAGES:
            start, end, seconds = (float(batch[f"{stage}_{what}"]) for what in ("started", "ended", "seconds"))
            assert (seconds == 0 and math.isnan(start)) or start <= end
            if stage in lane_stages(batch) and seconds:
                assert batch["started"] <= start and end <= batch["ended"] and seconds <= end - start + 1e-9
    for lane in np.unique(batches["lane"]).tolist():
        own = np.sort(batches[batches["lane"] == lane], order="started")
        gaps = own["started"][1:] - own["ended"][:-1]
        assert (gaps >= 0).all(), "two batches on one lane at a time"
        assert own["idle"][1:] == pytest.approx(gaps, abs=1e-9)
    for lane in recording.lanes:
        own = batches[batches["lane"] == lane.lane]
        busy = sum((own["ended"] - own["started"]).tolist())
        assert sum(lane.stages.values()) + sum(lane.chores.values()) == pytest.approx(busy, abs=1e-6)
        assert busy + lane.idle == pytest.approx(recording.seconds, rel=0.02)


def assert_costs_add_up(recording):
    """What requests cost is what the engine did, chores aside, stage by stage."""
    batches, costs = recording.batches, recording.costs
    work = batches[~np.isin(batches["work"], [WORK.index(kind) for kind in CHORES])]
    for stage in STAGES:
        total = sum(work[f"{stage}_seconds"].tolist())
        assert sum(cost.seconds[stage] for cost in costs.values()) == pytest.approx(total, abs=1e-9), stage
    assert sum(cost.seconds["host"] for cost in costs.values()) == pytest.approx(sum(work["host"].tolist()), abs=1e-9)
    for part in accounts.PARTS:
        assert accounts.seconds_by_stage(work)[part] == pytest.approx(sum(c.seconds[part] for c in costs.values()))
    lanes = sum(cost.lane_seconds for cost in costs.values())
    assert lanes == pytest.approx(sum((work["ended"] - work["started"]).tolist()), abs=1e-9)
    shares = defaultdict(float)
    for cost in costs.values():
        for number, share in cost.batches.items():
            assert 0 < share <= 1
            shares[number] += share
    assert shares == {int(number): pytest.approx(1.0) for number in work["batch"]}


def assert_request(entry, rows, costs, result):
    """One request's rows, its entry, its cost and its result tell the same."""
    nfe, _ = spent_on(rows)
    kept = sum(nfe[kind] for kind in SPENT)
    assert entry["executed"] in (sum(nfe.values()), -1)
    state = FATES[entry["state"]]
    times = [entry[name] for name in ("submitted", "started", "searched", "ended")]
    known = [float(time) for time in times if not math.isnan(time)]
    assert known == sorted(known) and not math.isnan(entry["submitted"]) and not math.isnan(entry["ended"])
    if int(entry["request"]) in costs:
        assert costs[int(entry["request"])].nfe == {kind: nfe[kind] for kind in accounts.SPENT}
    if result is None:
        assert state in ("failed", "cancelled")
        return
    assert state == ("cancelled" if result.stopped == "cancelled" else "done") and len(known) == 4
    assert (entry["committed"], entry["executed"]) == (result.committed_nfe, result.executed_nfe)
    assert (entry["stopped"], entry["score"]) == (result.stopped, pytest.approx(result.reward, nan_ok=True))
    assert math.isnan(entry["held_out"]) if result.held_out is None else entry["held_out"] == result.held_out
    assert kept == result.committed_nfe and sum(nfe.values()) == result.executed_nfe
    assert result.cost is not None and result.cost.nfe == {kind: nfe[kind] for kind in accounts.SPENT}
    assert sum(result.cost.nfe.values()) == result.executed_nfe
    assert sum(result.cost.nfe[kind] for kind in SPENT) == result.committed_nfe
    own = rows[(rows["state"] == STATES.index("kept")) & (rows["number"] >= 0)]
    assert len(own) == len(result.history)
    assert_history(own, result.history)


def assert_history(kept, history):
    """The rows that were kept are the particles of the history, with their parents."""
    by_number = {int(row["number"]): row for row in kept}
    # The last step of an only finalist is judged by its image, whose reward is the record's.
    ends = {i for i, one in enumerate(history) if one.kind == "finish"} - {one.parent for one in history}
    unjudged = {int(row["number"]) for row in kept if KINDS[row["kind"]] == "finish" and not row["scored"]}
    by_image = len(ends) == 1 and bool(unjudged - {int(row["origin"]) for row in kept})

    def ancestry(level, time, reward, kind):
        return level, float(np.float32(time)), None if reward is None or math.isnan(reward) else reward, kind

    def of_row(row):
        one = ancestry(int(row["level"]), float(row["time"]), float(row["reward"]), KINDS[row["kind"]])
        return (one,) if row["origin"] < 0 else (one, *of_row(by_number[int(row["origin"])]))

    def of_record(record):
        reward = None if by_image and record.index in ends else record.reward
        one = ancestry(record.level, record.time, reward, record.kind)
        return (one,) if record.parent is None else (one, *of_record(history[record.parent]))

    ours, theirs = (sorted(map(of, them), key=repr) for of, them in ((of_row, kept), (of_record, history)))
    assert ours == theirs
