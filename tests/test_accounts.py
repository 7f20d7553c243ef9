"""Accounts of hand-written tables: what NFE were for, what requests and lanes cost, what overlaps."""

import math

import numpy as np
import pytest

from rollflow.profile import accounts
from rollflow.profile.accounts import PARTS, costs, lanes
from rollflow.profile.records import KINDS, LANE_STAGES, STAGES, STATES, TABLES, WORK, Ring

NEVER = {f"{stage}_seconds": 0.0 for stage in STAGES}


def table(name, *entries):
    """A table with entries of these fields; others are as the ledger leaves them."""
    found = np.full(len(entries), Ring(TABLES[name], 1).fresh)
    for i, fields in enumerate(entries):
        for field, value in fields.items():
            found[field][i] = value
    return found


def rows(*entries):
    """Entries (batch, request, kind, state, scored)."""
    return table(
        "rows",
        *(
            {"batch": b, "request": r, "kind": KINDS.index(k), "state": STATES.index(s), "scored": scored,
             "nfe": {"guided": 2, "image": 0}.get(k, 1)}
            for b, r, k, s, scored in entries
        ),
    )  # fmt: skip


def batch(number, bucket=4, judged=0, work="rows", lane=0, times=(0.0, 1.0), **fields):
    started, ended = times
    own = {**NEVER, "batch": number, "bucket": bucket, "judged": judged, "work": WORK.index(work), "lane": lane}
    lane_stages = (*LANE_STAGES, "reward") if work == "guided" else LANE_STAGES
    host = ended - started - sum(fields.get(f"{stage}_seconds", 0.0) for stage in lane_stages)
    return {**own, "started": started, "ended": ended, "host": host, **fields}


MIXED = rows(
    (0, 7, "committed", "kept", True), (0, 7, "committed", "dropped", True), (0, 8, "finish", "kept", False),
    (0, 7, "padding", "dropped", False), (1, 8, "guided", "kept", True), (1, 8, "guided", "dropped", True),
    (2, 8, "committed", "open", True), (2, 7, "image", "kept", True),
)  # fmt: skip


def test_what_rows_were_for():
    names = (*accounts.SPENT, None)
    found = [names[place] for place in accounts.purpose(MIXED)]
    assert found == ["committed", "speculative", "finish", "padding", "guided", "speculative", None, None]
    spent = {"committed": 1, "guided": 2, "finish": 1, "refresh": 0, "speculative": 3, "padding": 1}
    assert accounts.nfe_by_kind(MIXED) == spent
    assert accounts.nfe_by_kind(MIXED[:0]) == dict.fromkeys(spent, 0)


def test_a_batch_is_shared_by_its_entries_and_its_images_by_those_who_have_some():
    timed = {"propose_seconds": 0.04, "forward_seconds": 0.4, "decode_seconds": 0.1, "reward_seconds": 0.3}
    batches = table("batches", batch(0, 4, judged=2, decide_seconds=0.02, **timed))
    found = costs(MIXED, batches, table("calls"))
    assert found.keys() == {7, 8}
    host = 1.0 - 0.54
    assert found[7].nfe == {"committed": 1, "guided": 0, "finish": 0, "refresh": 0, "speculative": 1, "padding": 1}
    assert found[8].nfe == {"committed": 0, "guided": 2, "finish": 1, "refresh": 0, "speculative": 2, "padding": 0}
    assert found[7].batches == {0: 0.75} and found[8].batches == {0: 0.25}, "batches 1 and 2 are not there"
    wanted = {"propose": 0.03, "forward": 0.3, "decode": 0.1, "reward": 0.3, "decide": 0.015, "host": 0.75 * host}
    assert found[7].seconds == pytest.approx({part: wanted.get(part, 0.0) for part in PARTS})
    wanted = {"propose": 0.01, "forward": 0.1, "decide": 0.005, "host": 0.25 * host}
    assert found[8].seconds == pytest.approx({part: wanted.get(part, 0.0) for part in PARTS})
    assert found[7].lane_seconds == pytest.approx(0.03 + 0.3 + 0.1 + 0.75 * host)
    assert found[7].usd(7.2) == pytest.approx(found[7].lane_seconds * 0.002)
    assert costs(MIXED, batches, table("calls"), only=[8]) == {8: found[8]}
    assert costs(MIXED, batches, table("calls"), only=[9]) == {}


def test_the_share_of_a_batch_does_not_depend_on_whether_others_are_still_kept():
    batches = table("batches", batch(0, 4, judged=2, forward_seconds=0.4, reward_seconds=0.2))
    whole, part = (costs(own, batches, table("calls"))[8] for own in (MIXED[:4], MIXED[2:3]))
    assert whole == part and whole.batches == {0: 0.25}


def test_what_was_judged_though_nobody_asked_is_everybodys():
    batches = table("batches", batch(0, 4, judged=0, decode_seconds=0.4, reward_seconds=0.2))
    own = rows((0, 1, "committed", "kept", False), (0, 2, "committed", "kept", False))
    found = costs(own, batches, table("calls"))
    assert found[1].seconds["decode"] == pytest.approx(0.1) and found[1].seconds["reward"] == pytest.approx(0.05)


def test_nothing_costs_nothing():
    none = costs(MIXED[:0], table("batches"), table("calls"))
    assert none == {}
    forgotten = costs(MIXED, table("batches"), table("calls", {"batch": 3, "reward": "a"}, {"batch": 3, "reward": "b"}))
    assert forgotten[7].batches == {} and not any(forgotten[7].seconds.values())
    assert sum(forgotten[7].nfe.values()) == 3


def call(number, reward, seconds, **fields):
    return {"batch": number, "reward": reward, "started": 10.0, "ended": 10.0 + seconds, **fields}


def test_a_call_is_shared_by_those_who_asked_for_it():
    own = rows(
        (0, 1, "committed", "kept", True), (0, 2, "committed", "kept", True), (0, 2, "committed", "kept", False),
        (0, 3, "committed", "kept", True), (5, 1, "image", "kept", True), (5, 2, "image", "kept", True),
    )  # fmt: skip
    batches = table(
        "batches", batch(5, 2, judged=2, work="images", reward_seconds=0.6), batch(0, 4, judged=3, reward_seconds=1.2)
    )
    long = "x" * 70
    calls = table(
        "calls", call(0, "a", 0.1), call(0, long, 0.3), call(5, "a", 0.1), call(5, "judge", 0.2), call(9, "other", 1.0)
    )
    specs = {
        1: {"terms": ["a"], "held_out": ["judge"]},
        2: {"terms": ["a", long], "held_out": None},
        3: {"terms": [long], "held_out": ["a"]},  # a held-out judge sees the final image alone
    }
    found = costs(own, batches, calls, specs)
    # The call of "a" is a quarter of the 1.2 s of batch 0, and a third of the 0.6 s of batch 5.
    assert found[1].seconds["reward"] == pytest.approx(0.3 / 2 + 0.2 / 2 + 0.4)
    assert found[2].seconds["reward"] == pytest.approx(0.3 / 2 + 0.9 / 2 + 0.2 / 2)
    assert found[3].seconds["reward"] == pytest.approx(0.9 / 2)
    unknown = costs(own, batches, calls, {1: specs[1]})  # those of whom nothing is known asked for all
    assert unknown[3].seconds["reward"] == pytest.approx(0.3 / 3 + 0.9 / 2)
    assert sum(cost.seconds["reward"] for cost in unknown.values()) == pytest.approx(1.8)
    nobody = costs(own, batches, calls, {1: {"terms": []}, 2: {"terms": []}, 3: {"terms": []}})
    assert nobody[1].seconds["reward"] == pytest.approx(1.2 / 3 + 0.6 / 2)


def test_rewards_without_a_call_are_shared_by_all_that_are_judged():
    own = rows((0, 1, "committed", "kept", True), (0, 2, "committed", "kept", True), (1, 1, "committed", "kept", True))
    batches = table("batches", batch(0, 2, judged=2, reward_seconds=1.0), batch(1, 1, judged=1, reward_seconds=0.5))
    calls = table("calls", call(1, "a", 0.1), call(1, "b", 0.1))
    found = costs(own, batches, calls, {1: {"terms": ["a", "b"]}, 2: {"terms": ["a"]}})
    assert (found[1].seconds["reward"], found[2].seconds["reward"]) == (pytest.approx(1.0), pytest.approx(0.5))


GPU = {
    "forward_seconds": 0.01, "forward_device_seconds": 0.5, "decode_seconds": 0.02, "decode_device_seconds": 0.3,
    "reward_seconds": 0.05, "reward_device_seconds": 0.4,
}  # fmt: skip


def test_on_cuda_a_stage_takes_what_it_took_the_device_and_the_lane_waits_less():
    batches = table("batches", batch(0, **GPU), batch(1, work="guided", **GPU), batch(2, forward_seconds=0.25))
    assert accounts.seconds_of(batches, "forward").tolist() == [0.5, 0.5, 0.25]
    assert accounts.seconds_of(batches, "propose").tolist() == [0.0, 0.0, 0.0]
    host = accounts.seconds_of(batches, "host")
    assert host.tolist() == pytest.approx([0.2, 0.0, 0.75]), "of a guided batch the reward is the lane's, and too long"
    found = costs(rows((0, 1, "committed", "kept", True)), batches[:1], table("calls"))[1]
    assert found.lane_seconds == pytest.approx(0.25), "a quarter of the second that its lane took"
    total = accounts.seconds_by_stage(batches)
    assert total["forward"] == pytest.approx(1.25) and total["reward"] == pytest.approx(0.8)
    assert math.isfinite(sum(total.values())) and total.keys() == {*PARTS}


def test_lanes():
    batches = table(
        "batches",
        batch(0, times=(1.0, 2.0), forward_seconds=0.5, decode_seconds=0.2, reward_seconds=9.0),
        batch(
            1, lane=1, times=(1.5, 4.0), work="guided", forward_seconds=1.0, backward_seconds=0.5, reward_seconds=0.5
        ),
        batch(2, times=(2.5, 3.0), work="encode"),
        batch(3, times=(3.0, 3.5), work="peek", decode_seconds=0.5),
        batch(4, times=(4.0, math.nan), propose_seconds=0.5, host=math.nan),  # it is running
        batch(5, lane=-1, times=(math.nan, math.nan)),  # it has not begun
        batch(6, lane=1, times=(4.5, 4.75), finish_seconds=0.25),
        batch(7, lane=1, times=(6.0, 7.0)),  # later
        batch(8, lane=2, times=(-1.0, 0.5)),  # before
    )
    first, second = lanes(batches, 0.5, 5.0)
    stages = dict.fromkeys((*LANE_STAGES, "reward", "host"), 0.0)
    assert (first.lane, first.wall, second.lane, second.wall) == (0, 4.5, 1, 4.5)
    assert first.stages == pytest.approx({**stages, "forward": 0.5, "decode": 0.2, "propose": 0.5, "host": 0.8})
    assert first.chores == {"encode": 0.5, "peek": 0.5} and first.idle == 1.5
    wanted = {"forward": 1.0, "backward": 0.5, "reward": 0.5, "finish": 0.25, "host": 0.5}
    assert second.stages == pytest.approx({**stages, **wanted}) and second.chores == {} and second.idle == 1.75
    for lane in (first, second):
        assert sum(lane.stages.values()) + sum(lane.chores.values()) + lane.idle == pytest.approx(lane.wall)
    assert np.isnan(batches["ended"][4]), "what is asked stays as it was"
    assert lanes(batches[:0], 0.0, 1.0) == []


def test_lanes_on_cuda_have_the_times_of_the_device():
    (lane,) = lanes(table("batches", batch(0, times=(1.0, 2.0), **GPU)), 0.0, 2.0)
    assert lane.stages["forward"] == 0.5 and lane.stages["decode"] == 0.3 and lane.stages["reward"] == 0.0
    assert lane.stages["host"] == pytest.approx(0.2) and lane.idle == 1.0


def test_overlap_of_intervals():
    nan = math.nan
    others = np.array([[0.0, 1.0], [0.5, 2.0], [nan, nan], [5.0, 6.0]])
    assert accounts.overlap(np.array([[1.5, 3.5]]), others) == pytest.approx(0.25)
    assert accounts.overlap(np.array([[0.0, 2.0], [5.0, 5.5], [nan, 1.0]]), others) == 1.0
    assert accounts.overlap(np.array([[2.0, 5.0]]), others) == 0.0
    assert accounts.overlap(np.array([[nan, nan]]), others) is None
    assert accounts.overlap(np.array([[1.0, 2.0]]), others[:0]) == 0.0


def test_intervals_are_the_devices_where_it_was_timed():
    device = {
        "forward_device_started": 3.0,
        "forward_device_seconds": 0.5,
        "propose_started": 7.0,
        "propose_ended": 8.0,
    }
    host = {"forward_started": 1.0, "forward_ended": 2.0}
    batches = table("batches", batch(0, **host, **device), batch(1, **host), batch(2))
    np.testing.assert_equal(accounts.intervals(batches, "forward"), [[3.0, 3.5], [1.0, 2.0], [math.nan, math.nan]])
    np.testing.assert_equal(accounts.intervals(batches, "propose")[0], [7.0, 8.0])
