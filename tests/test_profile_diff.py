"""What got slower between two recordings: slower batches are told from other packings, and noise from both."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st
from tiny import brightness, engine, rbf

from rollflow import RequestError
from rollflow.cli.comparing import ProfileDiff
from rollflow.profile.diff import comparing as diffs
from rollflow.profile.diff.comparing import diff, recordings
from rollflow.profile.diff.matched import Matched, Sample
from rollflow.profile.diff.noise import Estimate, long_run_error, over_repetitions, within
from rollflow.profile.recording import Recording
from rollflow.profile.records import BATCH, CALL, DEVICE_STAGES, FRESH, KINDS, REQUEST, ROW, STATES, WORK

STAGES = {"propose": 0.05, "forward": 1.0, "finish": 0.05, "decode": 0.6}  # ms of a row
LAUNCH = {"propose": 0.2, "forward": 1.0, "finish": 0.1, "decode": 0.4}  # ms of a batch
SIZES = (1, 2, 4, 8)


def fresh(kind, many):
    table = np.zeros(many, kind)
    for name in kind.names:
        table[name] = FRESH[kind[name].kind]
    return table


def sizes_of(seed, many=120):
    """What the batches of a recording are: buckets, and the rows in each."""
    buckets = np.random.default_rng(seed).choice(SIZES, many)
    return buckets, np.maximum(1, buckets - (np.arange(many) % 3 == 0))


def recording(seed=0, noise=0.0, slower=None, packing=0, drift=0.0, extra=0, device=False, about=None, lanes=2):
    """Two lanes whose batches take what `STAGES` say times noise, one batch in five twice as noisy.

    `slower` is a factor by stage; `drift` is noise that all batches of the recording share; `extra` batches come more.
    """
    rng, slower = np.random.default_rng(seed), slower or {}
    buckets, rows = packing if isinstance(packing, tuple) else sizes_of(packing)
    buckets, rows = np.concatenate([buckets, buckets[:extra]]), np.concatenate([rows, rows[:extra]])
    many = len(buckets)
    batches = fresh(BATCH, many)
    batches["batch"], batches["lane"], batches["work"] = np.arange(many), np.arange(many) % lanes, WORK.index("rows")
    batches["height"] = batches["width"] = 64
    batches["frames"], batches["rows"], batches["bucket"], batches["network_rows"] = 0, rows, buckets, buckets
    shared = np.exp(drift * rng.standard_normal())
    wide = np.where(np.arange(many) % 5 == 0, 2.0, 1.0)
    total = np.zeros(many)
    for stage in ("propose", "forward", "finish", "backward", "decode", "reward", "decide"):
        usual = 1e-3 * (LAUNCH.get(stage, 0.0) + STAGES.get(stage, 0.0) * buckets)
        if stage in ("reward", "decide"):
            usual = np.full(many, 2e-4)
        took = usual * shared * slower.get(stage, 1.0) * np.exp(noise * wide * rng.standard_normal(many))
        batches[f"{stage}_seconds"] = took
        if device and stage in DEVICE_STAGES and stage in STAGES:
            batches[f"{stage}_device_seconds"], batches[f"{stage}_seconds"] = took, 1e-5
        if stage in STAGES:
            total += took
    batches["host"] = 1e-4 * shared
    span, now = total + batches["host"], np.zeros(lanes)
    for i in range(many):
        lane = i % lanes
        batches["started"][i] = now[lane] + 3e-4
        now[lane] = batches["ended"][i] = batches["started"][i] + span[i]
    for stage in STAGES:
        batches[f"{stage}_started"] = batches["started"]
        if device and stage in DEVICE_STAGES:
            batches[f"{stage}_device_started"] = batches["started"]
    if device:
        batches["host"] = span - 4e-5
    table = fresh(ROW, int(buckets.sum()))
    table["batch"] = np.repeat(np.arange(many), buckets)
    place = np.arange(len(table)) - np.repeat(np.cumsum(buckets) - buckets, buckets)
    padding = place >= np.repeat(rows, buckets)
    table["request"], table["nfe"], table["scored"] = np.arange(len(table)) % 4, 1, ~padding
    table["kind"] = np.where(padding, KINDS.index("padding"), KINDS.index("committed"))
    table["state"] = np.where(padding, STATES.index("dropped"), STATES.index("kept"))
    calls = fresh(CALL, many)
    calls["batch"], calls["reward"], calls["images"] = np.arange(many), "count", rows
    calls["started"] = batches["ended"]
    calls["ended"] = batches["ended"] + batches["reward_seconds"]
    end = float(now.max()) + 1e-3
    requests = fresh(REQUEST, 4)
    requests["request"], requests["state"], requests["submitted"], requests["ended"] = np.arange(4), 2, 0.0, end
    specs = {str(i): {"prompt": "a", "seed": i, "terms": ["count"]} for i in range(4)}
    known = {
        "begin": 0.0, "end": end, "began": 0.0, "model": "shapes", "adapter": "FluxModel", "device": "cpu",
        "dtype": "float32", "machine": "m", "lanes": lanes, "threads": 1, "buckets": [*SIZES], "specs": specs,
        "versions": {"torch": "2"}, "forgotten": {},
    }  # fmt: skip
    return Recording(table, batches, calls, requests, {**known, **(about or {})})


def speeds(found, *verdicts):
    return {one.name for one in found.changes if one.group == "speed" and one.verdict in verdicts}


def assert_adds_up(found, a, b):
    """Every part is split exactly, and those of lanes are the lanes' time."""
    for part in found.parts:
        assert part.speed + part.packing + part.work + part.other == pytest.approx(part.b - part.a, abs=1e-9)
    for name, side in (("a", a), ("b", b)):
        lanes = np.mean([one.about["lanes"] * one.seconds for one in side])
        assert sum(getattr(part, name) for part in found.parts if part.lane) == pytest.approx(lanes)


@pytest.mark.parametrize("repetitions", [1, 3])
@pytest.mark.parametrize("device", [False, True])
def test_a_slower_stage_is_found_and_named_and_nothing_else_is(repetitions, device):
    a = [recording(i, 0.05, device=device) for i in range(repetitions)]
    b = [recording(50 + i, 0.05, {"decode": 1.5}, packing=1, device=device) for i in range(repetitions)]
    found = diff(a, b)
    assert speeds(found, "slower") == {"decode"} and not speeds(found, "faster", "new", "gone", "unknown")
    decode = found.of("speed")["decode"]
    assert decode.low < 0.5 < decode.high and decode.change == pytest.approx(0.5, abs=0.05)
    assert found.parts[0].name == "decode" and found.parts[0].speed == max(abs(part.speed) for part in found.parts)
    assert found.of("seconds")["forward"].verdict == "same"
    assert found.repeated == (repetitions > 1) and not found.warnings
    assert_adds_up(found, a, b)
    back = diff(b, a)
    assert speeds(back, "faster") == {"decode"} and not speeds(back, "slower")


@pytest.mark.parametrize(("repetitions", "drift"), [(1, 0.0), (2, 0.03)])
def test_noise_alone_is_called_slower_in_few_of_100_seeds(repetitions, drift):
    called = 0
    for seed in range(100):
        sides = [
            [recording(1000 * seed + 100 * side + i, 0.2, drift=drift) for i in range(repetitions)] for side in (0, 1)
        ]
        called += bool(diff(*sides).slower())
    assert called <= 5


def test_the_whole_gets_slower_with_a_stage():
    a = [recording(i, 0.02, drift=0.01) for i in range(4)]
    b = [recording(50 + i, 0.02, {"forward": 2.0}, drift=0.01) for i in range(4)]
    found = diff(a, b)
    assert {one.name for one in found.slower() if one.group == "overall"} >= {"wall", "NFE a second", "latency, p95"}
    assert {one.name for one in found.slower() if one.group == "seconds"} == {"forward"}
    assert {one.name for one in found.slower() if one.group == "buckets"} == {f"{i} rows of 64x64" for i in SIZES}
    assert found.of("overall")["NFE a second"].loss == pytest.approx(found.of("overall")["wall"].change, abs=0.01)
    assert found.of("kinds")["committed"].verdict == "slower"


def test_another_packing_is_no_slower_batch():
    large, small = np.full(40, 8), np.full(160, 2)
    mixed = np.array([2, 8])
    a = recording(1, 0.01, packing=(np.concatenate([mixed, large]),) * 2)
    b = recording(2, 0.01, packing=(np.concatenate([mixed, small]),) * 2)
    found = diff([a], [b])
    assert not speeds(found, "slower", "faster")
    parts = {part.name: part for part in found.parts}
    launches = 120 * 1e-3 * LAUNCH["forward"]  # as many rows take so many launches more
    assert parts["forward"].packing == pytest.approx(launches, rel=0.1) and parts["forward"].work == 0
    assert abs(parts["forward"].speed) < 0.1 * launches
    assert found.matched == pytest.approx((1.0, 1.0)) and not found.warnings
    assert_adds_up(found, [a], [b])


def test_sizes_that_one_side_has_alone_are_no_slower_batches_and_it_says_so():
    a, b = recording(packing=(np.full(30, 8),) * 2), recording(slower={"forward": 2.0}, packing=(np.full(30, 4),) * 2)
    found = diff([a], [b])
    assert not speeds(found, "slower", "faster") and found.matched == (0.0, 0.0)
    assert all(part.speed == 0 for part in found.parts)
    forward = found.of("speed")["forward"]
    assert forward.verdict == "unknown" and np.isnan(forward.a) and forward.change is None
    assert "0 % of A's time" in found.warnings[0]
    json.dumps(found.record(), allow_nan=False)
    assert_adds_up(found, [a], [b])


def test_more_rows_are_more_work():
    a, b = recording(packing=(np.full(80, 4),) * 2), recording(packing=(np.full(80, 4),) * 2, extra=40)
    found = diff([a], [b])
    parts = {part.name: part for part in found.parts}
    assert parts["forward"].work == pytest.approx(40 * 5e-3) and parts["forward"].packing == pytest.approx(0)
    assert {one.name for one in found.slower()} == {"wall"} and found.of("overall")["wall"].change > 0.4
    assert_adds_up(found, [a], [b])


def test_what_a_hand_counts():
    """Two batches of 4 rows, of which one is padding, against three that take twice as long in the network."""
    four, three = np.array([4, 4]), np.array([3, 3])
    a, b = recording(packing=(four, three), lanes=1), recording(1, 0, {"forward": 2.0}, (four, three), extra=1, lanes=1)
    found = diff([a], [b])
    forward = next(part for part in found.parts if part.name == "forward")
    assert (forward.a, forward.b) == pytest.approx((2 * 5e-3, 3 * 10e-3))
    assert forward.speed == pytest.approx(2.5 * 5e-3) and forward.work == pytest.approx(7.5e-3)
    assert forward.packing == pytest.approx(0)
    assert found.of("nfe")["padding"].a == pytest.approx(1 / 3)
    assert found.of("overall")["occupancy"].a == pytest.approx(0.75)
    assert found.of("seconds")["forward"].a == pytest.approx(10e-3 / 6)
    assert found.of("rows")["forward"].b == pytest.approx(30e-3 / 12)
    assert found.of("kinds")["padding"].a == pytest.approx(a.batches["ended"][1] / 4 / 6 - 2 * 3e-4 / 4 / 6)
    assert found.of("seconds")["idle"].a == pytest.approx((2 * 3e-4 + 1e-3) / 6)
    assert found.of("overall")["wall"].verdict == "unknown" == found.of("speed")["forward"].verdict  # too few batches
    assert found.of("overall")["latency, median"].a == a.seconds


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 10), st.integers(1, 9)), max_size=30), st.integers(0, 30))
def test_shares_add_up_for_any_batches(things, cut):
    def sample(some):
        cells, seconds, units = (np.array([one[i] for one in some], dtype=float) for i in range(3))
        return Sample(cells.astype(np.int64)[:, None], seconds, units, np.zeros(len(some), np.int64), 1)

    a, b = sample(things[:cut]), sample(things[cut:])
    found = Matched(a, b).shares()
    assert (found.a, found.b) == pytest.approx((a.seconds.sum(), b.seconds.sum()))
    assert found.speed + found.packing + found.work == pytest.approx(found.b - found.a, abs=1e-9)


def test_rewards_are_compared_by_term_on_either_clock():
    a, b = recording(noise=0.05), recording(1, noise=0.05, slower={"reward": 2.0})
    assert speeds(diff([a], [b]), "slower") == {"reward count"}
    for one in (a, b):  # the host waits for a device that does the work
        one.batches["reward_device_seconds"] = one.batches["reward_seconds"]
        one.calls["ended"] = one.calls["started"] + 1.0
    assert speeds(diff([a], [b]), "slower") == {"reward count"}
    b.calls["reward"] = "other"
    assert {"reward count", "reward other"} == speeds(diff([a], [b]), "gone", "new")


def test_a_batch_that_waits_for_the_device_overlaps_no_other():
    one = recording(device=True, lanes=1)
    one.batches["ended"] = one.batches["started"] + 1e-4  # the host is done, the device is not
    found = diff([one], [one])
    parts = {part.name: part for part in found.parts}
    assert parts["forward"].a == pytest.approx(one.batches["forward_device_seconds"].sum())
    assert all(part.a > -1e-9 for part in found.parts if part.lane and part.name != "host")
    assert_adds_up(found, [one], [one])


def test_the_error_of_a_sum_takes_neighbours_into_account():
    rng, n = np.random.default_rng(0), 4000
    plain = rng.standard_normal(n)
    one = np.ones(n)
    error, freedom = long_run_error(plain, one)
    assert error == pytest.approx(np.sqrt(n), rel=0.1) and freedom < n
    assert long_run_error(plain, 2 * one)[0] == pytest.approx(2 * error)
    alike = np.zeros(n)
    for i in range(1, n):
        alike[i] = 0.8 * alike[i - 1] + plain[i]
    assert long_run_error(alike, one)[0] == pytest.approx(np.sqrt(n) / 0.2, rel=0.25)
    assert long_run_error(np.zeros(9), np.ones(9)) == (0.0, 8.0)
    heavy = one.copy()
    heavy[0], plain[0] = n, 0.0  # its own error is not seen
    assert long_run_error(plain, heavy)[0] > n


def test_repetitions_give_students_interval():
    from scipy import stats

    def errors(many):
        return np.zeros(many), np.ones(many)

    a, b = [1.0, 1.02, 0.98, 1.0], [1.1, 1.12, 1.08, 1.1]
    low, high = over_repetitions(a, b).interval()
    expected = stats.ttest_ind(np.log(b), np.log(a)).confidence_interval()
    assert (np.log1p(low), np.log1p(high)) == pytest.approx((expected.low, expected.high), abs=2e-3)
    wide = over_repetitions(a, b).interval(20)
    assert wide[0] < low < high < wide[1]
    assert over_repetitions([1.0, 1.1, 1.0], [1.5]).freedom == 2
    assert over_repetitions([1.0, 1.1], [1.5]) is None and over_repetitions([0.0] * 3, [1.0] * 3) is None
    assert within(1.0, 2.0, errors(7), errors(20)) is None
    assert within(1.0, 2.0, errors(8), errors(20)) == Estimate(np.log(2.0), 0.0, 26.0)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"model": "shapes-base"}, 'another model: "shapes" against "shapes-base"'),
        ({"device": "cuda:0"}, "another device"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"machine": "n"}, "another machine"),
        ({"threads": 2}, "another threads: 1 against 2"),
        ({"versions": {"torch": "3"}}, "another versions: torch 2 against 3"),
        ({"specs": {"0": {"prompt": "b", "seed": 0}}}, "other requests: 4 against 1, of which 0 ask for the same"),
        (
            {"specs": {str(i): {"prompt": "a", "seed": 9, "terms": ["count"]} for i in range(4)}},
            "the same requests with other seeds",
        ),
        ({"forgotten": {"rows": 7}}, "B lost 7 of its entries"),
    ],
)
def test_what_is_not_alike_is_said(about, message):
    (warning,) = diff([recording()], [recording(about=about)]).warnings
    assert warning.startswith(message) and "\n" not in warning


def test_other_sizes_and_failed_requests_are_said():
    other = recording()
    other.batches["height"] = 32
    other.requests["state"][0] = 4
    warnings = diff([recording()], [other]).warnings
    assert warnings[0] == "other image sizes: 64x64 against 32x64"
    assert warnings[1] == "B has requests that came to no image: 1 failed of 4"


def test_repetitions_must_be_of_the_same():
    with pytest.raises(RequestError, match=r"the recordings of B differ in model .*compare them one by one"):
        diff([recording()], [recording(), recording(about={"model": "other"})])
    with pytest.raises(RequestError, match="the recordings of A are of different requests"):
        diff([recording(), recording(about={"specs": {}})], [recording()])
    empty = replace(recording(), rows=fresh(ROW, 0), batches=fresh(BATCH, 0))
    with pytest.raises(RequestError, match="a recording of B has no evaluation that a search kept"):
        diff([recording()], [empty])
    with pytest.raises(RequestError, match="A is no recording"):
        diff([], [recording()])


def command(*arguments):
    config = tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone
    return tyro.cli(ProfileDiff, args=[*map(str, arguments)], config=config)()


def test_the_command_on_recordings_of_an_engine(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="the extra `profile` is not installed")
    with engine(lanes=2, name="tiny") as made:
        for folder in ("a/1", "a/2", "b/1", "b/2"):
            with made.profile() as profiled:
                made.generate([rbf(30, seed=seed, reward=brightness, finish=2) for seed in range(2)])
            profiled.recording.save(tmp_path / folder)
    a, b, file = tmp_path / "a", tmp_path / "b", tmp_path / "diff.json"
    assert command(a, b, "--json", file, "--fail-above", 1e9) == 0
    told = capsys.readouterr().out
    assert "A: tiny, cpu, float32, 2 lanes; means of 2 recordings" in told and "all lanes" in told
    assert "not alike" not in told and max(map(len, told.splitlines())) <= 120
    found = json.loads(file.read_text())
    assert found["repeated"] and found["folders"] == {"a": str(a), "b": str(b)}
    sides = recordings(a), recordings(b)
    again = diff(*sides)
    assert json.loads(json.dumps(again.record())) == {key: value for key, value in found.items() if key != "folders"}
    assert_adds_up(again, *sides)
    assert {part.name for part in again.parts} >= {"forward", "decode", "decide", "idle", "decode (images)"}
    assert found["a"]["committed_nfe"] == 60 == again.of("nfe")["committed"].a * 60 + again.of("nfe")["finish"].a * 60
    assert command(a / "1", b / "2") == 0
    assert "that from run to run is not known" in capsys.readouterr().out


def test_the_command_fails_where_something_got_slower(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="the extra `profile` is not installed")
    recording(0, 0.02).save(tmp_path / "a")
    recording(1, 0.02, {"decode": 1.5}).save(tmp_path / "b")
    assert command(tmp_path / "a", tmp_path / "b") == 0
    assert "slower: decode +5" in capsys.readouterr().out.replace("\n", " ")
    assert command(tmp_path / "a", tmp_path / "b", "--fail-above", 20) == 1
    assert "slower by more than 20 %: decode +" in capsys.readouterr().out
    assert command(tmp_path / "a", tmp_path / "b", "--fail-above", 80) == 0
    assert command(tmp_path / "b", tmp_path / "a", "--fail-above", 0) == 0
    with pytest.raises(RequestError, match=r"--fail-above -1: .*at least 0"):
        command(tmp_path / "a", tmp_path / "b", "--fail-above", -1)
    with pytest.raises(RequestError, match="and its folders hold no recording: give one that"):
        command(tmp_path / "a", tmp_path / "none")
    assert {group for family in diffs.FAMILIES for group in family} == {*diffs.GROUPS}
