"""The trace: valid for its viewers whatever ran, true to the recording, and bounded."""

import gzip
import json
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import PATIENCE, Gate, bon, brightness, ended, engine, rbf
from traces import assert_valid, batch, made_up, of, ran, timed, track

from rollflow import RequestError, rewards
from rollflow.profile.records import DEVICE_STAGES, FATES, KINDS, LANE_STAGES, STATES, WORK
from rollflow.profile.trace.arrows import thinned
from rollflow.profile.trace.format import nested, packed
from rollflow.profile.trace.writing import LEAST, save, trace


def smooth(images, prompts):
    return images.square().mean((1, 2, 3))


smooth.differentiable = True


def broken(images, prompts):
    raise ValueError("no")


@pytest.fixture(scope="module")
def recording():
    """Of two lanes: searches of several batches, finishes, two terms, guidance, a failure, a cancellation."""
    gate, both = Gate(), rewards.combine("a + 0.5*b", {"a": brightness, "b": smooth})
    with engine(lanes=2, buckets=(4, 8)) as made:
        made.generate(bon())
        with made.profile() as p:
            jobs = [made.submit(rbf(30, seed=seed, finish=2)) for seed in range(3)]
            jobs += [made.submit(rbf(30, reward=both)), made.submit(rbf(30, method="dps", reward=smooth))]
            held, failing = made.submit(rbf(30, reward=gate)), made.submit(bon(6, reward=broken))
            assert gate.called.wait(PATIENCE)
            held.cancel()
            gate.open.set()
            for job in (*jobs, held, failing):
                ended(job)
    return p.recording


# What it shows.


def test_a_trace_of_everything_is_valid(recording):
    found = trace(recording)
    assert_valid(found)
    assert found["otherData"]["left out"] == {} and not of(found, "i")
    states = {FATES[state] for state in recording.requests["state"]}
    assert states == {"done", "failed", "cancelled"}, "or it was no test of everything"
    assert {e["cat"] for e in of(found, "X")} >= {"rows", "guided", "images", "stage", "reward", "decide"}


def was_for(row):
    """What a row ran for."""
    kind, state = KINDS[row["kind"]], STATES[row["state"]]
    if kind in ("padding", "image"):
        return {"image": "images"}.get(kind, kind)
    return {"dropped": "speculative", "open": "on its way"}.get(state, kind)


def test_each_batch_is_a_slice_that_says_what_was_in_it(recording):
    found, begin = trace(recording), recording.begin
    slices = {e["args"]["batch"]: e for e in of(found, "X") if e["cat"] in WORK}
    assert {*slices} == {*recording.batches["batch"].tolist()}
    lanes = {e["tid"]: e["args"]["name"] for e in of(found, "M", name="thread_name")}
    seen = Counter()
    for entry in recording.batches:
        one = slices[int(entry["batch"])]
        own = recording.rows[recording.rows["batch"] == entry["batch"]]
        assert one["ts"] == pytest.approx((entry["started"] - begin) * 1e6, abs=0.1)
        assert one["dur"] == pytest.approx((entry["ended"] - entry["started"]) * 1e6, abs=0.2)
        assert lanes[one["tid"]] == f"lane {entry['lane']}"
        assert sum(one["args"]["rows by kind"].values()) == len(own) == entry["bucket"]
        assert one["args"]["requests"] == sorted({*own["request"].tolist()})
        calls = recording.calls[recording.calls["batch"] == entry["batch"]]
        assert sum(each["calls"] for each in one["args"]["rewards"].values()) == len(calls)
        kinds = Counter(was_for(row) for row in own)
        assert one["args"]["rows by kind"] == kinds
        seen += kinds
        if one["cat"] == "rows":
            assert one["name"] == f"rows {entry['rows']}/{entry['bucket']}"
    assert {*seen} >= {"committed", "guided", "finish", "padding", "speculative", "images"}


def test_stages_lie_inside_of_their_batches_with_their_times(recording):
    found = trace(recording)
    slices = {e["args"]["batch"]: e for e in of(found, "X") if e["cat"] in WORK}
    checked = 0
    for entry in recording.batches[recording.batches["work"] == WORK.index("rows")]:
        outer = slices[int(entry["batch"])]
        inner = [e for e in of(found, "X", tid=outer["tid"]) if e["cat"] in ("stage", "host")]
        inner = [e for e in inner if outer["ts"] <= e["ts"] and e["ts"] + e["dur"] <= outer["ts"] + outer["dur"]]
        stages = [e for e in inner if e["cat"] == "stage"]
        assert [e["name"] for e in stages] == [s for s in LANE_STAGES if not np.isnan(entry[f"{s}_started"])]
        for stage in stages:
            assert stage["ts"] == pytest.approx((entry[f"{stage['name']}_started"] - recording.begin) * 1e6, abs=0.1)
            assert stage["dur"] == pytest.approx(entry[f"{stage['name']}_seconds"] * 1e6, abs=0.2)
        host = sum(e["dur"] for e in inner if e["cat"] == "host")
        assert host <= entry["host"] * 1e6 + 1 <= host + 50 * (len(stages) + 1) + 2, "gaps of 50 us are left empty"
        checked += 1
    assert checked


def test_stages_that_took_turns_are_one_slice():
    times = {**ran("forward", 0.1, 0.6), **ran("decode", 0.2, 0.7), **ran("backward", 0.7, 0.8)}
    found = trace(made_up([batch(0, 0.05, 0.9, work="guided", **{**times, "forward_seconds": 0.3})]))
    assert_valid(found)
    first, second = track(found, "lanes", "lane 0")[2:4]
    assert (first["name"], second["name"]) == ("forward, decode in turns", "backward")
    assert first["args"] == {"seconds": {"forward": 0.3, "decode": 0.5}} and first["dur"] == pytest.approx(6e5)


def test_requests_are_asynchronous_with_their_phases_and_what_they_cost(recording):
    found = trace(recording)
    begun = {e["id2"]["local"]: e for e in of(found, "b") if e["name"].startswith("#")}
    assert len(begun) == len(recording.requests) == 7
    for entry in recording.requests:
        number, one = int(entry["request"]), begun[hex(entry["request"])]
        assert one["name"].endswith(f"{number} {entry['method']}: {entry['prompt']}")
        assert one["args"]["state"] == FATES[entry["state"]] and one["args"]["spec"] == recording.specs[number]
        cost = recording.costs[number]
        assert one["args"]["cost"]["nfe"] == cost.nfe and one["args"]["cost"]["batches"] == len(cost.batches)
        assert one["args"]["cost"]["seconds"] == pytest.approx({**cost.seconds}, abs=1e-6)
        own = [e for e in found["traceEvents"] if e["ph"] in "be" and e["id2"]["local"] == hex(number)]
        phases = [(e["name"], e["ts"]) for e in own[1:-1] if e["ph"] == "b"]
        wanted = ["queued", "search", "image"] if FATES[entry["state"]] == "done" else ["queued", "search"]
        assert [name for name, _ in phases] == wanted
        for name, mark in zip(wanted, ("submitted", "started", "searched"), strict=False):
            assert dict(phases)[name] == pytest.approx((entry[mark] - recording.begin) * 1e6, abs=0.1)
        assert own[-1]["ts"] == pytest.approx((entry["ended"] - recording.begin) * 1e6, abs=0.1)


def test_what_had_not_ended_goes_on_to_the_end_of_the_recording():
    queued, running = {"request": 7, "submitted": 0.5}, {"request": 8, "submitted": 0.1, "started": 0.2}
    found = trace(made_up([batch(3, 0.3, np.nan, **ran("forward", 0.4, np.nan))], requests=[queued, running]))
    assert_valid(found)
    phases = [(e["name"], e["ph"], e["ts"] / 1e6) for e in of(found, "b") + of(found, "e")]
    assert sorted(phases) == sorted([
        ("#7 : ", "b", 0.5), ("queued", "b", 0.5), ("queued", "e", 1.0), ("#7 : ", "e", 1.0),
        ("#8 : ", "b", 0.1), ("queued", "b", 0.1), ("queued", "e", 0.2), ("search", "b", 0.2), ("search", "e", 1.0),
        ("#8 : ", "e", 1.0),
    ])  # fmt: skip
    (one,) = [e for e in of(found, "X") if e["cat"] == "rows"]
    assert one["ts"] + one["dur"] == 1e6


def test_counters_count(recording):
    found, begin = trace(recording), recording.begin
    values = defaultdict(list)
    for event in of(found, "C"):
        ((series, value),) = event["args"].items()
        values[f"{event['name']} {series}"].append((event["ts"], value))
    assert {*values} == {"live requests", "queued requests", "rows in flight", "free lanes", "NFE per second"}
    for name, last in (("live requests", 0), ("queued requests", 0), ("rows in flight", 0), ("free lanes", 2)):
        assert values[name][-1][1] == last and all(value >= 0 for _, value in values[name]), name
    requests, batches = recording.requests, recording.batches
    for when, value in values["live requests"]:
        at = begin + (when + 0.1) / 1e6
        assert value == ((requests["started"] <= at) & (requests["ended"] > at)).sum()
    for when, value in values["free lanes"]:
        at = begin + (when + 0.1) / 1e6
        assert value == 2 - ((batches["started"] <= at) & (batches["ended"] > at)).sum()
    nfe = sum((later - when) / 1e6 * value for (when, value), (later, _) in pairwise(values["NFE per second"]))
    assert nfe == pytest.approx(
        recording.rows["nfe"][np.isin(recording.rows["batch"], batches["batch"])].sum(), rel=1e-3
    )


def test_answers_lead_from_the_forward_to_the_call_to_the_loop(recording):
    found = trace(recording)
    inside = defaultdict(list)
    for event in of(found, "X"):
        inside[event["tid"]].append(event)
    arrows = defaultdict(list)
    for event in found["traceEvents"]:
        if event["ph"] in "stf" and event["name"] == "answer":
            met = [e for e in inside[event["tid"]] if e["ts"] <= event["ts"] <= e["ts"] + e["dur"]]
            arrows[event["id"]].append((event, met))
    judged = Counter()
    for (start, at), *middle, (_, last) in arrows.values():
        number = start["args"]["batch"]
        assert any(e["cat"] in WORK and e["args"]["batch"] == number for e in at)
        assert any(e["cat"] in ("decide", "reward") and e["args"]["batch"] == number for e in last)
        work = WORK[recording.batches[recording.batches["batch"] == number]["work"][0]]
        assert any("decode" if work == "images" else "forward" in e["name"] for e in at)
        for _, met in middle:
            judged[number] += any(e["cat"] == "reward" and e["args"]["batch"] == number for e in met)
    taken = recording.batches["batch"][~np.isnan(recording.batches["decide_started"])]
    calls = Counter(recording.calls["batch"][np.isin(recording.calls["batch"], taken)].tolist())
    assert judged and all(judged[number] <= many for number, many in calls.items())
    assert sum(judged.values()) >= 0.9 * sum(calls.values())


def test_arrows_lead_from_each_parent_to_its_children(recording):
    rows = recording.rows
    made = {(r, n): b for r, n, b in zip(rows["request"], rows["number"], rows["batch"], strict=True) if n >= 0}
    wanted = Counter()
    for row in rows[(rows["origin"] >= 0) & (rows["number"] >= 0)]:
        wanted[int(made[row["request"], row["origin"]]), int(row["batch"])] += 1
    found = trace(recording)
    args = [e["args"] for e in of(found, "s", name="parent")]
    assert wanted and {(each["from batch"], each["to batch"]): each["rows"] for each in args} == wanted


def test_no_arrow_goes_back_in_time():
    batches = [batch(0, 0.5, 0.7, **ran("forward", 0.5, 0.6)), batch(1, 0.1, 0.3, **ran("forward", 0.1, 0.2))]
    rows = [{"batch": i, "request": 1, "number": i, "origin": i - 1} for i in range(2)]
    call = {"batch": 0, "thread": 0, "started": 0.1, "ended": 0.2}
    found = trace(made_up(batches, rows, [call, {**call, "started": 0.65, "ended": 0.7}]))
    assert_valid(found)
    assert [e["ts"] / 1e6 for e in of(found, "f")] == [0.65]


# Times of a device.


def test_a_device_has_tracks_by_its_own_time():
    host = {**ran("forward", 0.11, 0.12), **ran("decode", 0.12, 0.13)}
    first = {**timed("forward", 0.2, 0.5), **timed("decode", 0.5, 0.7), **timed("reward", 0.8, 0.85)}
    second = {**timed("forward", 0.499999, 0.6), **timed("decode", 0.6, 0.8)}
    batches = [batch(0, 0.1, 0.75, 0, **host, **first), batch(1, 0.1, 0.9, 1, **host, **second)]
    found = trace(made_up(batches, lanes=2))
    assert_valid(found)
    times = {
        name: [(e["args"]["batch"], e["ts"] / 1e6, e["dur"] / 1e6) for e in track(found, "device", name)]
        for name in ("forward", "decode", "decode (2)", "reward")
    }
    assert times["forward"] == [(0, 0.2, pytest.approx(0.3)), (1, 0.5, pytest.approx(0.1))]  # not before it was free
    assert times["decode"] == [(0, 0.5, pytest.approx(0.2))] and times["decode (2)"] == [(1, 0.6, pytest.approx(0.2))]
    assert times["reward"] == [(0, 0.8, pytest.approx(0.05))]
    assert [e["name"] for e in track(found, "lanes", "lane 0")] == [
        "rows 1/1", "host", "forward", "decode", "wait for the device"
    ]  # fmt: skip
    assert "decode" not in {e["args"]["name"] for e in of(found, "M", name="process_name")}


def test_decodes_of_two_lanes_that_overlap_have_a_row_each():
    batches = [batch(i, 0.1, 0.9, i, **ran("decode", 0.2 + i / 10, 0.5 + i / 10)) for i in range(3)]
    batches.append(batch(3, 0.9, 1.0, **ran("decode", 0.91, 0.92)))
    found = trace(made_up(batches, lanes=3))
    assert_valid(found)
    rows = [[e["args"]["batch"] for e in track(found, "decode", f"decode{n}")] for n in ("", " (2)", " (3)")]
    assert rows == [[0, 3], [1], [2]]


# Whatever ran.

moment = st.one_of(st.just(float("nan")), st.floats(-0.1, 1.1), st.sampled_from([0.0, 0.25, 0.5, 0.5 + 1e-8]))
number = st.integers(-1, 5)


@st.composite
def tables(draw):
    stages = [f"{stage}_{end}" for stage in (*LANE_STAGES, "reward", "decide") for end in ("started", "ended")]
    stages += [f"{stage}_device_{what}" for stage in DEVICE_STAGES for what in ("started", "seconds")]
    works, entries = st.integers(0, len(WORK) - 1), []
    for i in range(draw(st.integers(0, 6))):
        times = {name: draw(moment) for name in (*stages, "started", "ended", "submitted")}
        entries.append({"batch": i, "lane": draw(st.integers(-1, 2)), "work": draw(works), "rows": 2, **times})
    row = st.fixed_dictionaries({"batch": number, "request": number, "number": number, "origin": number})
    row = st.tuples(row, st.fixed_dictionaries({"nfe": st.integers(0, 4), "kind": st.integers(0, 4)}))
    call = {"batch": number, "thread": st.integers(0, 1), "started": st.floats(0, 1), "ended": st.floats(0, 1)}
    marks = dict.fromkeys(("started", "searched", "ended"), moment)
    request = st.fixed_dictionaries({"submitted": st.floats(0, 1), **marks})
    requests = [{"request": i, **entry} for i, entry in enumerate(draw(st.lists(request, max_size=4)))]
    rows = [{**a, **b} for a, b in draw(st.lists(row, max_size=12))]
    return made_up(entries, rows, draw(st.lists(st.fixed_dictionaries(call), max_size=5)), requests)


@given(tables())
def test_a_trace_of_whatever_times_is_valid(recording):
    assert_valid(trace(recording))


intervals = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=30)


@given(intervals)
def test_rows_hold_slices_that_do_not_overlap_or_cross(given_ones):
    starts = np.array([start for start, _ in given_ones], np.int64) * 40
    ends = starts + np.array([long for _, long in given_ones], np.int64) * 40
    rows, first, last = packed(starts, ends)
    for row in {*rows.tolist()}:
        own = sorted(zip(first[rows == row].tolist(), last[rows == row].tolist(), strict=True))
        assert all(after[0] >= before[1] for before, after in pairwise(own))
    assert (
        (first >= starts).all() and (first - starts <= 40).all() and (last >= ends).all() and (last - ends <= 40).all()
    )
    rows, last = nested(starts, ends)
    for row in {*rows.tolist()}:
        own = [*zip(starts[rows == row].tolist(), last[rows == row].tolist(), strict=True)]
        assert not any(a < c < b < d for a, b in own for c, d in own)
    assert (last == ends).all(), "they are further from one another than what is rounded"


def test_calls_of_a_stack_stay_on_one_row():
    starts, ends = np.array([0, 0, 5, 5, 20, 30]), np.array([100, 10, 10, 7, 101, 40])
    rows, last = nested(starts, ends)
    assert rows.tolist() == [0] * 6 and last.tolist() == [100, 10, 10, 7, 100, 40]
    rows, _ = nested(np.array([0, 50]), np.array([100, 150]))
    assert rows.tolist() == [0, 1]


# What is too much.


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(-5, 5)), min_size=1, max_size=80), st.integers(3, 40))
def test_a_counter_with_fewer_values_keeps_its_peaks_and_its_end(given_ones, most):
    times, values = (np.array(column) for column in zip(*sorted(given_ones), strict=True))
    kept = thinned(times, values, most)
    assert len(kept) <= max(3, most) and (np.diff(kept) > 0).all()
    assert values[kept].min() == values.min() and values[kept].max() == values.max() and values[kept][-1] == values[-1]
    assert len(kept) == len(times) or len(times) > most


def test_a_trace_is_bounded_and_says_what_it_left_out():
    batches = [
        batch(i, i / 1000, (i + 0.9) / 1000, **ran("forward", i / 1000, (i + 0.5 + i / 5000) / 1000))
        for i in range(1000)
    ]
    rows = [{"batch": i, "request": 1, "number": i, "origin": i - 1, "nfe": 1} for i in range(1000)]
    request = {"request": 1, "submitted": 0.0, "started": 0.0, "searched": 0.9, "ended": 1.0}
    recording = made_up(batches, rows, requests=[request])
    whole, found = trace(recording), trace(recording, most=LEAST)
    assert_valid(whole)
    assert_valid(found)
    assert len(found["traceEvents"]) <= LEAST < len(whole["traceEvents"]) <= 200_000
    left = found["otherData"]["left out"]
    arrows = "arrows from a parent's batch to a child's"
    assert left["batches"]["of"] == left["stages of batches"]["of"] == 1000 and left[arrows] == {
        "left out": 999,
        "of": 999,
    }
    assert len([e for e in of(found, "X") if e["cat"] == "rows"]) == 1000 - left["batches"]["left out"] > 0
    assert left["stages of batches"]["left out"] == 1000 and len(of(found, "b", cat="request")) == 4
    (note,) = of(found, "i")
    assert f"{left['batches']['left out']} of 1000 batches" in note["name"] and f"999 of 999 {arrows}" in note["name"]
    some = trace(recording, most=3000)
    assert_valid(some)
    stages = some["otherData"]["left out"]["stages of batches"]["left out"]
    assert 0 < stages < 1000 and "batches" not in some["otherData"]["left out"] and len(some["traceEvents"]) <= 3000
    with pytest.raises(RequestError, match="most=10: a trace has room for at least 1000 events"):
        trace(recording, most=10)


def test_of_each_sort_the_longest_stay():
    batches = [batch(i, i / 1000, i / 1000 + i / 2e6, **ran("forward", i / 1000, i / 1000)) for i in range(1000)]
    found = trace(made_up(batches), most=LEAST)
    kept = sorted(e["args"]["batch"] for e in of(found, "X") if e["cat"] == "rows")
    assert kept == [*range(1000 - len(kept), 1000)] and 0 < len(kept) < 1000


def test_it_is_written_compressed(tmp_path, recording):
    path = save(recording, tmp_path / "trace.json.gz")
    assert json.loads(gzip.decompress(path.read_bytes())) == trace(recording)
    again = save(recording, tmp_path / "again.json.gz")
    assert path.read_bytes() == again.read_bytes()
    with pytest.raises(RequestError, match=r"give it a name that ends with \.json\.gz"):
        save(recording, tmp_path / "trace.json")
    with pytest.raises(RequestError, match="cannot be written"):
        save(recording, tmp_path / "not here" / "trace.json.gz")
