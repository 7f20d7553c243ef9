"""`rollflow bench fleet`: policies of a dispatcher, and fleets of simulated GPUs on a small recording."""

import json
import random
from collections import Counter
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import pytest
from tiny import engine, rbf

from rollflow import RequestError
from rollflow.bench import fleet, fleet_flux
from rollflow.bench.fleet import Fleet, came, shared, together
from rollflow.profile.ledger import Ledger
from rollflow.whatif.changes import Change, Predicted
from rollflow.whatif.dispatching import LEAST, POLICIES
from rollflow.whatif.measured import Curve
from rollflow.whatif.replay import Replay

RESULTS = Path(fleet.__file__).parent / "results" / "gpu"


@pytest.fixture(scope="module")
def recording():
    """Requests with budgets that differ, on a small engine."""
    with engine() as small, small.profile() as profile:
        budgets = [8] * 6 + [16] * 4 + [48]
        random.Random(0).shuffle(budgets)
        small.generate([rbf(nfe, seed=i) for i, nfe in enumerate(budgets)])
    return profile.recording


def gpu_rows():
    """A GPU on which a batch takes a second whatever its size up to 4, and the rest nothing that counts."""
    sizes = {"bare transformer": ("graph", 1.0), "bare decode": ("eager", 1e-4), "bare reward": ("eager", 1e-4)}
    return [
        {"contender": name, "mode": mode, "bucket": bucket, "seconds": seconds}
        for name, (mode, seconds) in sizes.items()
        for bucket in (4, 1, 2)
    ]


@pytest.fixture(scope="module")
def recorded(recording):
    return Replay(recording)


@pytest.fixture(scope="module")
def replay(recorded):
    return fleet_flux.on_gpu(recorded, gpu_rows(), lanes=1)


def test_policies():
    outstanding = [30, 10, 20, 10]
    assert POLICIES[LEAST](0)(7, outstanding) == 1
    turns = POLICIES["round robin"](0)
    assert [turns(number, outstanding) for number in range(6)] == [0, 1, 2, 3, 0, 1]
    first, second, other = (POLICIES["random"](seed) for seed in (1, 1, 2))
    chosen = [first(number, outstanding) for number in range(4000)]
    assert chosen == [second(number, outstanding) for number in range(4000)]
    assert chosen != [other(number, outstanding) for number in range(4000)]
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in Counter(chosen).values())
    with pytest.raises(RequestError, match="dispatch 'best': choose one of least outstanding NFE, round robin, random"):
        Change(dispatch="best")
    assert "dispatched random" in str(Change(dispatch="random")) and "dispatched" not in str(Change())


def test_one_engine_is_the_same_under_every_policy(replay):
    coming = replay.arrivals(Change(prompts=30, rate=0.2))
    found = [replay.run(Change(dispatch=policy), coming) for policy in POLICIES]
    assert found[0] == found[1] == found[2]
    assert found[0] == replay.run(Change(prompts=30, rate=0.2))


def test_every_request_is_answered_once_and_charged_in_full(replay):
    coming = replay.arrivals(Change(prompts=60, rate=0.5))
    budgets = sum(spec["nfe"] for _, spec in coming)
    for policy in POLICIES:
        found = replay.run(Change(gpus=5, dispatch=policy), coming)
        assert len(found.latencies) == 60 and min(found.latencies) >= 1.0
        assert 0 < found.committed <= budgets <= found.committed + 60 * 2  # what a method leaves of a budget


def test_a_fleet_takes_one_ledger(replay, monkeypatch):
    """Its tables take 36 MiB, which hundreds of engines have no use for."""
    made = []

    class Counted(Ledger):
        def __init__(self):
            made.append(self)
            super().__init__()

    monkeypatch.setattr("rollflow.whatif.replay.Ledger", Counted)
    replay.run(Change(gpus=8, prompts=8))
    assert len(made) == 1 and made[0].table("rows").size == 0


def test_the_least_loaded_engine_is_the_one_with_the_least_left(replay):
    """Two engines: one has a large budget, most of it spent; the other a smaller one that has only begun."""
    by_budget = {spec["nfe"]: spec for _, spec in replay.arrivals(Change())}
    long, short = by_budget[48], by_budget[16]
    alone = replay.run(Change(), [(0.0, long)]).seconds
    late = 0.9 * alone
    seen = []

    def watched(seed):
        def choose(number, outstanding):
            seen.append(list(outstanding))
            return POLICIES[LEAST](seed)(number, outstanding)

        return choose

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "watched", watched)
        replay.run(Change(gpus=2, dispatch="watched"), [(0.0, long), (late, short), (late + 0.1, short)])
    assert seen[0] == [0, 0] and 0 < seen[1][0] < 16 and seen[1][1] == 0
    assert seen[2][0] <= seen[1][0] and seen[2][1] == 16


def test_looking_at_the_engines_helps(replay):
    """At the same arrivals the least outstanding NFE is faster than chance; of one engine nothing is to be chosen."""
    command = Fleet(gpus=(1, 4), seed=3, load=0.7)
    rows = command.measure(replay, requests=80, each=10, at_once=16)
    assert len(rows) == 2 * 3 * 2
    by = {(row["gpus"], row["policy"]): row for row in rows if row["load"] is not None}
    assert by[4, LEAST]["seconds_p95"] < by[4, "random"]["seconds_p95"]
    assert by[4, LEAST]["seconds_mean"] < by[4, "random"]["seconds_mean"]
    assert by[1, LEAST]["seconds_mean"] == by[1, "random"]["seconds_mean"] == by[1, "round robin"]["seconds_mean"]
    for row in rows:
        if row["load"] is None:
            assert 0 < row["efficiency"] <= 1.1 and row["requests"] == 8 * row["gpus"]
    assert Fleet(gpus=(1,), seed=3, load=0.7).measure(replay, requests=80, each=10, at_once=16) == rows[:6]


def test_a_part_of_a_fleet_gets_its_share():
    coming = [(float(i), {"nfe": i}) for i in range(64)]
    assert shared(coming, 8, 8, "round robin", 0) == coming
    part = shared(coming, 16, 8, "round robin", 0)
    assert [int(when) for when, _ in part] == [i for i in range(64) if i % 16 < 8]
    many = [(float(i), {}) for i in range(8000)]
    found = shared(many, 64, 8, "random", 0)
    assert abs(len(found) - 1000) < 5 * (8000 / 8 * 7 / 8) ** 0.5 and found == shared(many, 64, 8, "random", 0)


def test_rows_of_known_latencies():
    coming = [(float(i), {"nfe": 10}) for i in range(200)]
    usual = Predicted(200.0, tuple(float(i % 100 + 1) for i in range(200)), 2000, 2000, 500, 1.0, {})
    row = came(usual, coming, 4.0)  # 30 at each end are left out
    assert row["requests"] == 140 and row["nfe_per_second"] == pytest.approx(4 * 10.0)
    assert row["seconds_p50"] == 50 and row["seconds_p95"] in (93, 94)
    assert together(usual, 20.0) == {"requests": 200, "nfe_per_second": 10.0, "efficiency": 0.5}


def test_seconds_are_those_of_the_gpu(recorded, replay):
    (size,) = replay.measured.sizes.values()
    assert [*size.forward.known] == [*size.warmed] == [1, 2, 4] and size.forward(4) == 1.0
    assert replay.correction == 1.0 and isinstance(replay.measured.rewards["brightness"], Curve)
    alone = replay.run(Change(), [(0.0, replay.arrivals(Change())[0][1])])
    assert alone.seconds == pytest.approx(alone.batches, rel=0.1)  # each takes a second, one after another
    twice = [{**row, "seconds": 2 * row["seconds"]} for row in gpu_rows()]
    slower = fleet_flux.on_gpu(recorded, twice, lanes=1).run(Change(), [(0.0, replay.arrivals(Change())[0][1])])
    assert slower.seconds == pytest.approx(2 * alone.seconds, rel=0.05)


def test_the_command_on_the_committed_gpu_results(recording, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Fleet, "_recorded", lambda self: recording)
    monkeypatch.setattr(Fleet, "measure", partialmethod(Fleet.measure, requests=20, each=5, at_once=8))
    file, plot = tmp_path / "fleet.json", tmp_path / "fleet.png"
    Fleet(gpus=(1, 2), policies=(LEAST, "random"), json=file, plot=plot)()
    report = json.loads(file.read_text())
    assert "no GPU ran" in report["stated"] and report["expected"] and plot.stat().st_size > 5_000
    assert {row["contender"] for row in report["check"]} == {"engine, 1 lane", "engine, 2 lanes"}
    assert all(row["replayed_seconds"] > 0 for row in report["check"])
    assert [(row["gpus"], row["policy"]) for row in report["rows"][::2]] == [
        (gpus, policy) for gpus in (1, 2) for policy in (LEAST, "random")
    ]
    assert "Simulated GPUs" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"gpus": (0,)}, {"gpus": ()}, {"load": 1.0}, {"load": 0.0}])
def test_options_are_checked_before_anything_runs(options, monkeypatch):
    monkeypatch.setattr(Fleet, "_recorded", lambda self: pytest.fail("the work began"))
    with pytest.raises(RequestError, match="at least 1 GPU, and a load between 0 and 1"):
        replace(Fleet(), **options)()


def test_folders_without_results_are_named(tmp_path):
    with pytest.raises(RequestError, match="is no result of rollflow bench gpu"):
        fleet_flux.rows_of(tmp_path / "buckets.json")
    with pytest.raises(RequestError, match="has nothing of moon"):
        fleet_flux.rows_of(RESULTS / "buckets.json", "moon")
