"""Replays on a simulated clock: the machine, what is measured, and what changes bring."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import bon, brightness, engine, rbf

from rollflow import RequestError
from rollflow.profile.recording import Recording
from rollflow.profile.records import BATCH, CALL, WORK
from rollflow.whatif.capacity import capacity
from rollflow.whatif.changes import Change
from rollflow.whatif.machine import Machine, Task
from rollflow.whatif.measured import Alone, Curve, curve, line, measure
from rollflow.whatif.replay import Replay
from rollflow.whatif.scenarios import scenarios
from rollflow.whatif.scores import Scores


class Timeline:
    """Runs a machine to the end, and keeps when each task was over."""

    def __init__(self, **units):
        self.machine, self.now, self.ends = Machine(units), 0.0, {}

    def post(self, name, seconds, **where):
        self.machine.post(Task(seconds, lambda: self.ends.__setitem__(name, self.now), **where))

    def run(self):
        while (wait := self.machine.wait) < float("inf"):
            self.now += wait
            self.machine.advance(wait)
        return self.ends


def test_tasks_share_a_processor_in_equal_parts():
    line = Timeline(cpu=2.0)
    for name in "abc":
        line.post(name, 2.0)
    line.post("short", 0.5)
    # four on two cores: half each until the short one is over at 1.0, then two thirds each
    assert line.run() == pytest.approx({"short": 1.0, **dict.fromkeys("abc", 1.0 + 1.5 * 1.5)})


def test_what_only_waits_slows_nothing_down():
    line = Timeline(cpu=1.0)
    line.post("server", 5.0, demand=0.0)
    line.post("a", 1.0)
    line.post("b", 1.0)
    assert line.run() == pytest.approx({"a": 2.0, "b": 2.0, "server": 5.0})


def test_processors_are_apart_and_a_demand_may_be_several_units():
    line = Timeline(cpu=4.0, gpu=1.0)
    line.post("wide", 1.0, demand=4.0)
    line.post("narrow", 1.0, demand=2.0)  # six units of four: both get two thirds
    line.post("gpu", 1.0, processor="gpu")
    assert line.run() == pytest.approx({"wide": 1.5, "narrow": 1.5, "gpu": 1.0})


def test_tasks_of_a_line_run_in_order():
    line = Timeline(cpu=4.0)
    for name in "abc":
        line.post(name, 1.0, line="loop")
    line.post("other", 2.5)
    assert line.run() == pytest.approx({"a": 1.0, "b": 2.0, "other": 2.5, "c": 3.0})
    assert line.machine.busy["host"] == pytest.approx(5.5)


def test_a_curve_knows_lies_between_and_goes_on():
    found = Curve({2: 2.0, 4: 6.0}, {})
    assert (found(2), found(3), found(4)) == (2.0, 4.0, 6.0)
    assert found(8) == pytest.approx(6.0 * (4 + 8) / (4 + 4)) and found(1) == pytest.approx(2.0 * 5 / 6)
    usual = Curve({4: 6.0}, {1: 1.0, 4: 3.0, 16: 5.0})
    assert usual(16) == pytest.approx(6.0 * 5 / 3) and usual(1) == pytest.approx(6.0 / 3)
    affine = Curve({1: 3.0, 2: 4.0, 4: 6.0}, {})
    assert affine(10) == pytest.approx(12.0)
    assert Curve({}, {})(3) == 0.0


def test_a_curve_of_samples_does_not_fall_and_forgets_interruptions():
    sizes = np.array([1, 1, 1, 2, 2, 3])
    found = curve(sizes, np.array([1.0, 1.0, 40.0, 5.0, 5.0, 2.0]), {})
    assert found(1) == pytest.approx((1 + 1 + 2) / 3)  # 40 counts as twice the median
    assert found(2) == found(3) == pytest.approx((5.0 * 2 + 2.0) / 3)
    assert curve(sizes, np.full(6, np.nan), {}).known == {}


def test_a_line_of_calls_is_that_of_a_thread_that_is_busy():
    sizes = np.repeat([1, 2, 4, 8], 8)
    seconds = 1.0 + 0.25 * sizes
    late = seconds + np.tile([0, 0, 0, 0.1, 0.2, 0.5, 3.0, 9.0], 4)  # some calls find nothing in the caches
    for found in (line(sizes, seconds), line(sizes, late)):
        assert [found(size) for size in (1, 3, 8, 16)] == pytest.approx([1.25, 1.75, 3.0, 5.0], rel=0.02)
    assert line(sizes[:16], seconds[:16])(2) == 1.5  # two sizes alone make no line


def batches_of(**columns):
    """Batches with nothing but what is given."""
    count = len(next(iter(columns.values())))
    table = np.zeros(count, BATCH)
    for name in BATCH.names:
        if BATCH[name].kind == "f":
            table[name] = 0.0 if name.endswith("_seconds") and "device" not in name else np.nan
    table["batch"] = range(count)
    for name, values in columns.items():
        table[name] = values
    return table


def recording_of(batches, calls=None, **about):
    calls = np.zeros(0, CALL) if calls is None else calls
    usual = {"begin": 0.0, "end": 10.0, "began": 0.0, "device": "cpu", "cores": 1, "threads": 1, "specs": {}}
    return Recording(np.zeros(0, "i8"), batches, calls, np.zeros(0, "i8"), {**usual, **about})


def test_recorded_seconds_become_those_without_company():
    # two lanes of one thread on one core: both at half speed while both work, from 1 to 3
    batches = batches_of(
        started=[0.0, 1.0], ended=[3.0, 4.0], forward_started=[0.0, 1.0], forward_ended=[3.0, 4.0],
        forward_seconds=[3.0, 3.0],
    )  # fmt: skip
    assert Alone(recording_of(batches)).stage(batches, "forward") == pytest.approx([2.0, 2.0])
    assert Alone(recording_of(batches, cores=2)).stage(batches, "forward") == pytest.approx([3.0, 3.0])
    calls = np.zeros(1, CALL)
    calls["started"], calls["ended"], calls["cpu"] = 0.0, 4.0, 0.0  # waits for a server
    alone = Alone(recording_of(batches, calls))
    assert alone.stage(batches, "forward") == pytest.approx([2.0, 2.0])
    calls["cpu"] = 4.0  # computes: three share one core from 1 to 3
    alone = Alone(recording_of(batches, calls))
    assert alone.stage(batches, "forward") == pytest.approx([0.5 + 2 / 3, 2 / 3 + 0.5])


def test_on_a_gpu_batches_take_what_the_device_took():
    batches = batches_of(
        started=[0.0, 0.5], ended=[3.0, 4.0], forward_started=[0.0, 0.5], forward_ended=[0.1, 0.6],
        forward_seconds=[0.1, 0.1], forward_device_started=[0.1, 2.0], forward_device_seconds=[1.5, 1.0],
        decode_device_started=[1.6, np.nan], decode_device_seconds=[1.0, np.nan],
    )  # fmt: skip
    alone = Alone(recording_of(batches, device="cuda:0"))
    # the first decode lies beside the second forward from 2.0 to 2.6: each has half of the device
    assert alone.stage(batches, "forward") == pytest.approx([1.5, 0.7])
    assert alone.stage(batches, "decode") == pytest.approx([0.7, 0.0])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A recording of a few searches, whose times are replaced by known ones: nothing runs beside anything."""
    with engine(lanes=1, buckets=(1, 2, 4, 8)) as made:
        made.generate(bon())
        with made.profile() as profile:
            made.generate([bon(16, seed=1), rbf(12, seed=2), rbf(12, seed=3, method="sprout"), bon(5, seed=4)])
    return timed(profile.recording)


FORWARD, DECODE, AROUND, REWARD, CHOOSE, DECIDE, TURN = 1.0, 0.5, 0.25, 2.0, 0.125, 0.0625, 0.03125
LAUNCH = 0.015625


def timed(recording):
    """Every batch one after another: forward 1 + size/4, decode half of that, other parts constant."""
    batches, calls = recording.batches.copy(), recording.calls.copy()
    when = 0.0
    for batch in batches:
        size = float(batch["bucket"])
        batch["chosen"], when = when, when + CHOOSE
        batch["submitted"], when = when, when + TURN
        batch["started"], batch["idle"] = when, CHOOSE + TURN
        batch["propose_started"], batch["propose_ended"], batch["propose_seconds"] = when, when + AROUND, AROUND
        when += AROUND
        forward, decode = FORWARD * (1 + size / 4), DECODE * (1 + size / 4)
        if batch["work"] == WORK.index("rows"):
            batch["forward_started"], batch["forward_ended"], batch["forward_seconds"] = when, when + forward, forward
            when += forward
        else:
            batch["propose_seconds"] = batch["propose_started"] = batch["propose_ended"] = 0.0
        batch["decode_started"], batch["decode_ended"], batch["decode_seconds"] = when, when + decode, decode
        when += decode
        batch["finish_seconds"], batch["host"], batch["ended"] = 0.0, 0.0, when
        own = calls["batch"] == batch["batch"]
        calls["started"][own], calls["ended"][own], calls["cpu"][own] = when, when + REWARD, REWARD
        when += REWARD
        batch["decide_seconds"] = DECIDE * batch["rows"]
        batch["decide_started"], when = when, when + DECIDE * batch["rows"]
        batch["decide_ended"] = when
    requests = recording.requests.copy()
    requests["submitted"], requests["started"], requests["ended"] = 0.0, 0.0, when
    about = json.loads(json.dumps(recording.about)) | {"begin": 0.0, "end": when, "cores": 2, "parallel": True}
    about["sizes"][0]["seconds"] = {str(b): (FORWARD + DECODE) * (1 + b / 4) for b in (1, 2, 4, 8)}
    return Recording(recording.rows, batches, calls, requests, about)


def test_what_is_measured(recorded):
    found = measure(recorded)
    (size,) = found.sizes.values()
    for bucket in (1, 2, 4, 8):
        assert size.forward(bucket) == pytest.approx(FORWARD * (1 + bucket / 4))
        assert size.around(bucket) == pytest.approx(AROUND)
        assert size.decode["full"](bucket) == pytest.approx(DECODE * (1 + bucket / 4))
    assert found.rewards["brightness"](3) == pytest.approx(REWARD) and found.waiting["brightness"] == 0.0
    assert found.choose == pytest.approx(CHOOSE) and found.decide == pytest.approx(DECIDE)
    assert found.turnaround == pytest.approx(TURN) and size.images == pytest.approx(AROUND)


def test_a_prediction_is_the_sum_of_what_happens(recorded):
    # one request of four samples: a batch, their rewards, an image, its reward
    one = replace_requests(recorded, [3])
    replay = Replay(one)
    found = replay.run(Change(nfe=4)).scaled(1 / replay.correction)
    lane = CHOOSE + TURN + AROUND + (FORWARD + DECODE) * (1 + 4 / 4)
    shown = 1  # the chosen one
    image = CHOOSE + TURN + AROUND + DECODE * (1 + shown / 4)
    expected = lane + REWARD + 4 * DECIDE + image + REWARD + DECIDE
    assert found.seconds == pytest.approx(expected) and found.latencies == pytest.approx((expected,))
    assert (found.committed, found.executed, found.batches, found.occupancy) == (4, 4, 1, 1.0)
    faster = replay.run(Change(nfe=4, decode=0.5, reward=0.1)).scaled(1 / replay.correction)
    saved = 0.5 * (DECODE * (1 + 4 / 4) + DECODE * (1 + shown / 4)) + 0.9 * 2 * REWARD
    assert faster.seconds == pytest.approx(expected - saved)
    assert replay.run(Change(nfe=4, forward=3.0)).scaled(1 / replay.correction).seconds == pytest.approx(
        expected + 2 * FORWARD * (1 + 4 / 4)
    )


def test_on_a_gpu_the_host_runs_ahead_and_batches_follow_one_another(recorded):
    batches = recorded.batches.copy()
    for stage in ("forward", "decode"):
        batches[f"{stage}_device_started"] = batches[f"{stage}_started"]
        batches[f"{stage}_device_seconds"] = batches[f"{stage}_seconds"]
        batches[f"{stage}_seconds"] = LAUNCH
        batches[f"{stage}_ended"] = batches[f"{stage}_started"] + LAUNCH
    batches["host"] = 99.0  # the lane waits for the device
    gpu = json.loads(json.dumps(recorded.about)) | {"device": "cuda:0", "parallel": False, "lanes": 1}
    one = replace_requests(replace(recorded, batches=batches, about=gpu), [3])
    replay = Replay(one)
    found = replay.run(Change(nfe=4)).scaled(1 / replay.correction)
    lane = CHOOSE + TURN + AROUND + 2 * LAUNCH + (FORWARD + DECODE) * (1 + 4 / 4)
    image = CHOOSE + TURN + LAUNCH + DECODE * (1 + 1 / 4)
    assert found.seconds == pytest.approx(lane + REWARD + 4 * DECIDE + image + REWARD + DECIDE)
    # twice as many at once: the second forward runs beside the first decode, at half the speed of both
    two = replay.run(Change(nfe=4, prompts=2, lanes=2)).scaled(1 / replay.correction)
    assert found.seconds < two.seconds < 2 * found.seconds


def replace_requests(recording, places):
    return replace(recording, requests=recording.requests[places])


def test_the_recording_itself_is_replayed_and_corrects_the_rest(recorded):
    replay = Replay(recorded)
    assert replay.base.seconds == pytest.approx(replay.recorded) and replay.notes == []
    assert replay.base.committed == recorded.requests["committed"].sum() == 16 + 12 + 12 + 5
    assert replay.run(Change()) == replay.run(Change())
    twice = replay.run(Change(prompts=8))
    assert twice.committed == 2 * replay.base.committed and len(twice.latencies) == 8
    assert twice.seconds > replay.base.seconds
    assert replay.run(Change(gpus=2)).seconds < replay.base.seconds
    assert replay.run(Change(bucket=1)).batches > replay.base.batches
    assert replay.run(Change(method="bon", nfe=10)).committed == 40


def test_arrivals_come_by_chance_at_a_rate(recorded):
    replay = Replay(recorded)
    times = [when for when, _ in replay.arrivals(Change(rate=2.0, prompts=4000, seed=3))]
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.5, rel=0.06) and gaps.std() == pytest.approx(0.5, rel=0.1)
    assert times != [when for when, _ in replay.arrivals(Change(rate=2.0, prompts=4000, seed=4))]
    slow = replay.run(Change(rate=0.01, prompts=4))  # each is alone
    alone = [replay.run(Change(prompts=1)), *(Replay(replace_requests(recorded, [i])).run(Change()) for i in (1, 2, 3))]
    assert len(alone) == 4 and min(slow.latencies) > 0 and slow.seconds > 100


def test_children_are_as_good_as_their_parents_and_a_recorded_step(recorded):
    scores, rows = Scores(recorded), recorded.rows
    kind = ("rbf", "brightness")
    ours = [n for n, spec in recorded.specs.items() if spec["method"] == "rbf"]
    own = rows[np.isin(rows["request"], ours) & np.isfinite(rows["reward"]) & (rows["number"] >= 0)]
    first = own["reward"][own["origin"] < 0]
    drawn = {scores.of(kind, 0, None, i) for i in range(200)}
    assert drawn == {float(value) for value in first}
    known = {(int(row["request"]), int(row["number"])): row["reward"] for row in own}
    level = int(own["level"][own["origin"] >= 0][0])
    steps = {
        float(row["reward"]) - float(known[int(row["request"]), int(row["origin"])])
        for row in own if row["origin"] >= 0 and row["level"] == level
    }  # fmt: skip
    assert {scores.of(kind, level, 5.0, i) for i in range(300)} == {5.0 + step for step in steps}
    assert scores.of(kind, level, 5.0, "a") == scores.of(kind, level, 5.0, "a")
    assert scores.of(("unknown", "unknown"), 99, None, 1) in {float(r) for r in rows["reward"] if np.isfinite(r)}


def test_how_many_gpus_a_load_takes(recorded, monkeypatch):
    for name, fewer in (("LEAST", 60), ("EACH", 20), ("AT_ONCE", 32)):
        monkeypatch.setattr(f"rollflow.whatif.capacity.{name}", fewer)
    replay = Replay(recorded)
    alone = replay.run(Change(prompts=1)).seconds
    fleets = [*capacity(replay, Change(rate=0.2), p95=4 * alone)]
    assert [fleet.gpus for fleet in fleets] == [*range(fleets[0].gpus, fleets[0].gpus + len(fleets))]
    assert fleets[-2].enough and fleets[-1].enough and not any(fleet.enough for fleet in fleets[:-2])
    assert all(fleet.load == pytest.approx(fleets[0].load * fleets[0].gpus / fleet.gpus) for fleet in fleets)
    assert fleets[-1].p95 <= fleets[-2].p95 <= 4 * alone
    with pytest.raises(RequestError, match=r"5 % take .* if nothing else runs.* no number of GPUs helps"):
        [*capacity(replay, Change(rate=1.0), p95=alone / 2)]
    with pytest.raises(RequestError, match="without a rate"):
        [*capacity(replay, Change(), p95=1.0)]
    with pytest.raises(RequestError, match="must be above 0"):
        [*capacity(replay, Change(rate=1.0), p95=0.0)]


def test_usual_scenarios(recorded):
    rows = scenarios(Replay(recorded))
    assert rows[0]["name"] == "as recorded" and rows[0]["speedup"] == pytest.approx(1.0)
    by_name = {row["name"]: row for row in rows}
    assert by_name["decode 0.5x"]["speedup"] > 1 and by_name["2 GPUs"]["speedup"] > 1
    assert by_name["8 prompts"]["seconds"] > rows[0]["seconds"]


def test_changes_that_are_none_are_refused(recorded):
    with pytest.raises(RequestError, match="nfe=0: it must be at least 1"):
        Change(nfe=0)
    with pytest.raises(RequestError, match="decode=-1"):
        Change(decode=-1)
    with pytest.raises(RequestError, match="rate=0"):
        Change(rate=0.0)
    replay = Replay(recorded)
    with pytest.raises(RequestError, match="method 'nonsense': choose one of"):
        replay.run(Change(method="nonsense"))
    with pytest.raises(RequestError, match="nfe=1"):
        replay.run(Change(nfe=1))


def test_what_cannot_be_replayed_is_said():
    def own(nfe, steps):
        from rollflow.draw import Draw

        children = yield [Draw(None, nfe)]
        return children[0][0]

    with engine() as made:
        with made.profile() as empty:
            pass
        with pytest.raises(RequestError, match="nothing ran in this recording"):
            Replay(empty.recording)
        with made.profile() as profile:
            made.generate([rbf(12), bon(4, method=own)])
        mixed = Replay(profile.recording)
        assert mixed.base.committed == 12 and any("1 requests are left out" in note for note in mixed.notes)
        own_alone = replace_requests(profile.recording, profile.recording.requests["method"] != "rbf")
        with pytest.raises(RequestError, match=r"no request .* can be replayed: its method own or an option"):
            Replay(own_alone)
        with pytest.raises(RequestError, match="no guided batch was recorded, such as the method dps takes"):
            mixed.run(Change(method="dps"))
        only = replace_requests(profile.recording, profile.recording.requests["method"] == "rbf")
        assert Replay(only).base.committed == 12


def test_requests_of_every_kind_are_replayed():
    def failing(images, prompts):
        raise ValueError("no")

    def darkness(images, prompts):
        return -brightness(images, prompts)

    darkness.differentiable = brightness.differentiable = True
    try:
        with engine(lanes=2, buckets=(1, 2, 4, 8)) as made:
            with made.profile() as profile:
                made.generate(
                    [
                        rbf(20, finish=3), rbf(20, method="dps", steps=3), bon(6, stop_at=-1.0),
                        bon(8, held_out=darkness, reward=darkness), rbf(20, reward=failing),
                    ],
                    return_exceptions=True,
                )  # fmt: skip
            replay = Replay(profile.recording)
    finally:
        del brightness.differentiable
    assert len(replay.base.latencies) == 4 and replay.base.seconds == pytest.approx(replay.recorded, rel=2e-3)
    assert any("1 requests are left out" in note for note in replay.notes)
    assert replay.run(Change(decode=3.0)).seconds > replay.base.seconds
    kept = profile.recording.requests["state"] == 2
    assert replay.base.committed >= profile.recording.requests["committed"][kept].sum()
    assert replay.base.busy["reward"] > 0 and replay.base.busy["forward"] > 0


def test_long_pauses_and_what_was_cancelled(recorded):
    requests = recorded.requests.copy()
    requests["submitted"][-1] += 3e5  # days: a clock that has run for so long tells microseconds apart, not less
    requests["started"][-1] += 3e5
    requests["ended"][-1] += 3e5
    replay = Replay(replace(recorded, requests=requests))
    assert replay.base.seconds == pytest.approx(replay.recorded, rel=1e-3)
    requests = recorded.requests.copy()
    requests["state"][1], requests["committed"][1] = 3, 11  # of 12
    replay = Replay(replace(recorded, requests=requests))
    assert replay.base.committed == 16 + 11 + 12 + 5 and "cancelled" in replay.notes[0]


def test_a_correction_does_not_change_when_requests_come(recorded):
    replay = Replay(recorded)
    replay.correction *= 3  # as if everything took three times as long
    found = replay.run(Change(rate=1e-3, prompts=4))
    arrivals = [when for when, _ in replay.arrivals(Change(rate=1e-3, prompts=4))]
    assert found.seconds == pytest.approx(arrivals[-1] + found.latencies[-1])
    assert found.seconds < arrivals[-1] + 3.5 * replay.recorded
