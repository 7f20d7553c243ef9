"""The GPU run in small, on a CPU: every part that is not CUDA's own, its files, and what it does when parts fail."""

import json
import math

import numpy as np
import pytest
import torch

from rollflow import kernels
from rollflow.bench import compare, gpu, gpu_correctness, gpu_parts, gpu_searches
from rollflow.bench.environment import environment
from rollflow.bench.gpu import Gpu
from rollflow.bench.gpu_parts import Deadline, Measure, Subject
from rollflow.bench.gpu_report import FILES, Report
from rollflow.bench.gpu_searches import LANES_1, LANES_2, LIGHT, OPTIONS, SEARCHES, Budget
from rollflow.bench.gpu_time import SHARES, shares
from rollflow.errors import RequestError
from rollflow.models import acceleration
from rollflow.profile.records import BATCH

CPU = torch.device("cpu")
FAST = Measure(CPU, 1, 0.0)


pytestmark = pytest.mark.usefixtures("one_thread", "little_garbage")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Compilation takes longer than all else; what is compiled is not the question here."""
    asked = []
    monkeypatch.setattr(acceleration, "compile_blocks", lambda transformer, how: asked.append((transformer, how)))
    return asked


@pytest.fixture(scope="module")
def subject():
    return Subject("sd3", CPU, torch.float32, 24, True)


def command(out, **options):
    return Gpu(**{"out": out, "device": "cpu", "shrink": 16, "quick": True, "repetitions": 1, **options})


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_everything_in_small(tmp_path, capsys, no_compiler):
    command(tmp_path)()
    shown = capsys.readouterr().out.splitlines()
    assert shown == (tmp_path / "summary.txt").read_text().splitlines()
    assert len(shown) <= 40 and max(map(len, shown)) <= 80
    assert {path.name for path in tmp_path.iterdir()} == {"summary.txt", *(f"{name}.json" for name in FILES)}
    for name in FILES:
        content = read(tmp_path, name)
        assert {"machine", "versions", "commit", "date", "environment"} <= content.keys() and content["rows"]
        assert content["environment"]["measured_on"] == "cpu"
    for name in ("kernels", "buckets", "searches"):  # identities are unique, figures are numbers
        assert len(compare.load(tmp_path / f"{name}.json").rows) == len(read(tmp_path, name)["rows"])
    assert all(part["error"] is None and part["rows_measured"] for part in read(tmp_path, "parts")["rows"])
    checks = read(tmp_path, "correctness")["rows"]
    assert all(row["passed"] and 0 <= row["error"] <= row["allowed"] for row in checks) and len(checks) > 25
    assert {"propose", "finish", "finish_flat", "noise", "a"} == {row["name"].split()[0] for row in checks}
    buckets = read(tmp_path, "buckets")["rows"]
    modes = {(row["geometry"], row["mode"]) for row in buckets if row["contender"] == "bare transformer"}
    kinds = ("eager", "graph", "compiled", "compiled + graph")
    assert modes == {(name, mode) for name in ("shapes", "sd3/16", "flux/16") for mode in kinds}
    assert all(row["mfu"] > 0 for row in buckets if row["contender"] == "bare transformer")
    assert [how for _, how in no_compiler] == ["regional"] * 3
    assert {row["mode"] for row in buckets if row["contender"] == "bare preview"} == {"eager"}
    searches = read(tmp_path, "searches")["rows"]
    for name, budget in SEARCHES.items():
        found = [row["contender"] for row in searches if row["geometry"].partition("/")[0] == name]
        assert found == [*budget.engines, "engine, bon", "sequential"]
    for row in searches:
        assert row["committed_nfe"] > 0 and row["peak_memory_bytes"] >= 0 and len(row["seconds"]) == 1
        assert 0 < row["efficiency"] < row["of_parts"] and row["executed_over_committed"] >= 1
        assert (row["over_sequential"] == 1) == (row["contender"] == "sequential")
        if row["contender"] != "sequential":
            assert row["graph_bytes"] == 0
            assert sum(row[f"share_{part}"] for part in SHARES) == pytest.approx(1) and row["share_forward"] > 0


def test_an_error_ends_its_part_alone_and_is_recorded(tmp_path, capsys, monkeypatch):
    def broken(device, quick, deadline):
        yield {"name": "one", "passed": False, "error": math.inf, "allowed": 0.0}
        raise ZeroDivisionError("no such luck")

    monkeypatch.setattr(gpu, "correctness", broken)
    with pytest.raises(SystemExit) as exit:
        command(tmp_path, geometries=("sd3",), parts=("correctness", "searches"))()
    assert exit.value.code == 1
    parts = {part["part"]: part for part in read(tmp_path, "parts")["rows"]}
    assert parts["correctness"]["error"][-1] == "ZeroDivisionError: no such luck"
    assert parts["correctness"]["rows_measured"] == 1 and len(read(tmp_path, "correctness")["rows"]) == 1
    assert all(part["error"] is None for name, part in parts.items() if name != "correctness")
    assert not {"kernels", "sd3: compiled"} & parts.keys() and parts["sd3: searches"]["rows_measured"]
    shown = capsys.readouterr().out
    assert (
        "FAILED correctness: ZeroDivisionError" in shown
        and "WRONG inf > 0.0e+00: one" in shown
        and "0 of 1 checks" in shown
    )


def test_a_geometry_that_cannot_be_built_leaves_the_rest(tmp_path, monkeypatch):
    def too_large(*args):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(gpu, "Subject", too_large)
    with pytest.raises(SystemExit):
        command(tmp_path, geometries=("sd3", "flux"))()
    names = [part["part"] for part in read(tmp_path, "parts")["rows"]]
    assert names == ["kernels", "correctness", "matmul", "sd3: build", "flux: build"]


def test_without_time_nothing_is_started(tmp_path):
    with pytest.raises(SystemExit):
        command(tmp_path, minutes=1e-9)()
    parts = read(tmp_path, "parts")["rows"]
    assert all("no time" in part["error"][-1] and not part["rows_measured"] for part in parts)
    assert "not measured" in (tmp_path / "summary.txt").read_text()


def test_rows_are_on_disk_before_the_part_is_over(tmp_path):
    report = Report(tmp_path, Deadline(60), {**environment(), "measured_on": "cpu"})

    def work(deadline):
        yield {"kernel": "copy", "gigabytes_per_second": 1.0}
        assert read(tmp_path, "kernels")["rows"] == report.rows["kernels"]
        raise KeyboardInterrupt  # as a run that is stopped: nothing catches it

    with pytest.raises(KeyboardInterrupt):
        report.run("kernels", "kernels", work)
    assert len(read(tmp_path, "kernels")["rows"]) == 1


def test_targets(tmp_path):
    report = Report(tmp_path, Deadline(60), {**environment(), "measured_on": "cpu"})
    assert [target.met for target in report.targets()] == [None] * 9
    full = {"kernel": "propose", "token": 4096, "rows": 32}
    report.rows["kernels"] = [
        {**full, "of_copy": 0.86},
        {**full, "rows": 64, "of_copy": 0.89},
        {**full, "rows": 8, "of_copy": 0.6},
        {**full, "token": 1024, "of_copy": 0.1},
        {**full, "kernel": "finish", "of_copy": 0.84},
        {**full, "kernel": "noise", "rows": 8, "of_copy": 0.1},
    ]
    search = {"geometry": "flux", "contender": LANES_2, "efficiency": 0.7, "of_parts": 0.9, "over_sequential": 3.0}
    report.rows["searches"] = [
        search,
        {**search, "contender": LANES_1, "efficiency": 0.81, "of_parts": 0.96},
        {**search, "contender": LIGHT, "efficiency": 0.91, "of_parts": 0.99},
        {**search, "contender": "engine, bon", "efficiency": 0.99, "of_parts": 1.2},
        {**search, "geometry": "sd3/16", "over_sequential": 6.0},
    ]
    found = [(target.measured, target.met) for target in report.targets()]
    assert found[:6] == [(0.6, True), (0.86, True), (0.89, False), (None, None), (0.84, False), (None, None)]
    assert found[6:] == [(0.91, True), (0.96, True), (6.0, True)]


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"},
        {"device": "mps"},
        {"geometries": ("sdxl",)},
        {"shrink": 0},
        {"repetitions": 0},
        {"minutes": 0},
        {"parts": ()},
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, options):
    with pytest.raises(RequestError):
        command(tmp_path / "out", **options)()
    assert not (tmp_path / "out").exists()


def test_deadlines():
    now = [100.0]
    one = Deadline(60, clock=lambda: now[0])
    assert one.left == 60 and one.allows(59) and not one.allows(60)
    now[0] += 45
    assert one.left == 15 and Deadline(60, one).left == 15 and Deadline(10, one).left == 10
    now[0] += 45
    assert one.left == 0 and not one.allows() and not Deadline(10, one).allows()


def test_buckets_ascend_until_a_row_no_longer_gets_cheaper():
    costs = {1: 1.0, 2: 1.5, 4: 2.95, 8: 5.0, 16: 10.0, 32: 20.0, 64: 1.0}

    class Told(Measure):
        def seconds(self, run):
            return run()

    def measured(sizes=tuple(costs), deadline=None, make=lambda bucket: lambda: costs[bucket]):
        told = Told(CPU, 1, 0.0)
        return list(gpu_parts.ascending(make, sizes, told, deadline or Deadline(1e6)))

    assert [bucket for bucket, _ in measured()] == [1, 2, 4, 8, 16, 32]  # 4 is slower once, 16 and 32 twice in a row
    assert [bucket for bucket, _ in measured(deadline=Deadline(20))] == [1, 2, 4, 8]

    def full(bucket):
        if bucket == 4:
            raise torch.OutOfMemoryError("full")
        return lambda: costs[bucket]

    assert measured(make=full) == [(1, 1.0), (2, 1.5), (4, None)]


def test_memory_that_runs_out_is_a_row(subject, monkeypatch):
    def full(model, bucket):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(gpu_parts, "bare_forward", full)
    (row,) = gpu_parts.transformer(subject, None, FAST, Deadline(60))
    assert row["error"] == "out of memory" and row["bucket"] == 1 and "nfe_per_second" not in row


def test_a_run_is_timed_without_its_first(monkeypatch):
    now, costs = [0.0], iter([50.0])

    def run():
        now[0] += next(costs, 2.0)

    monkeypatch.setattr(gpu_parts.time, "perf_counter", lambda: now[0])
    assert Measure(CPU, 3, 10.0).seconds(run) == 2.0


def test_searches_shrink_with_the_time_and_say_when_there_is_none(subject, monkeypatch):
    """On a clock that stands still, with rows that are said to cost 10 ms."""
    monkeypatch.setattr(gpu_searches, "seconds_a_row", lambda engine, subject: 0.01)
    budget = Budget((2,), 10_000, 3, 4, (LANES_1,))
    rows = list(gpu_searches.searches(subject, budget, 1, True, Deadline(0.7, clock=lambda: 0.0)))
    assert {row["nfe"] for row in rows} == {12}  # 70 % of 0.7 s, shared by two runs of two searches
    assert all(row["committed_nfe"] <= 24 for row in rows)
    with pytest.raises(RequestError, match="too few for 2 searches at 10 ms a row"):
        list(gpu_searches.searches(subject, budget, 1, True, Deadline(0.0, clock=lambda: 0.0)))


def batches(**columns):
    table = np.zeros(len(columns["started"]), BATCH)
    for name in table.dtype.names:
        table[name] = columns.get(name, np.nan if table.dtype[name].kind == "f" else 0)
    return table


def test_shares_of_the_wall_time_add_up_and_count_a_moment_once():
    """Two batches: a decode is half beside the next forward, a reward half beside the decode, and the end is idle."""
    nan = np.nan
    table = batches(
        chosen=[0.0, 3.0], submitted=[1.0, 3.5], started=[1.0, 3.5], ended=[6.0, 9.0],
        forward_started=[1.5, 4.0], forward_ended=[3.0, 7.0], decode_started=[3.0, 7.0], decode_ended=[5.0, 8.0],
        reward_started=[5.0, 7.5], reward_ended=[6.0, 8.5], decide_started=[6.0, 9.0], decide_ended=[6.5, 9.5],
    )  # fmt: skip
    found = shares(table, 0.0, 10.0)
    assert [*found] == [*SHARES]
    expected = {"forward": 0.45, "decode": 0.2, "reward": 0.05, "host": 0.25, "idle": 0.05}
    assert found == pytest.approx(expected)
    # The device was still at the first forward when its lane went on: the device's own times count.
    table["forward_device_started"], table["forward_device_seconds"] = [1.5, nan], [2.5, nan]
    assert shares(table, 0.0, 10.0) == pytest.approx({**expected, "forward": 0.55, "decode": 0.1})


def test_what_is_compiled_leaves_time_for_geometries_to_come(tmp_path):
    now = [0.0]
    report = Report(tmp_path, Deadline(100, clock=lambda: now[0]), {**environment(), "measured_on": "cpu"})
    allowed = []

    def work(deadline):
        allowed.append(deadline.left)
        yield from ()

    for now[0] in (0.0, 20.0, 40.0):
        report.run("flux: compiled", "buckets", work, 70.0)
    report.run("flux: compiled", "buckets", work)
    assert allowed == [30, 10, 0, 45]
    assert not any(entry["error"] for entry in report.rows["parts"])


def test_engines_get_the_batch_sizes_that_pay(subject, monkeypatch):
    monkeypatch.setattr(subject, "sizes", gpu_parts.BUCKETS)
    for eager, paying in (
        ({}, None),
        ({1: 1.0, 2: 1.99, 4: 3.99, 8: 7.98}, (1, 2)),  # one and two, or judging would know a single batch size
        ({1: 1.0, 2: 1.9, 4: 3.0, 8: 5.9}, (1, 2, 4)),
        ({1: 1.0, 2: 1.9, 4: 3.8, 8: 5.0}, (1, 2, 4, 8)),
    ):
        monkeypatch.setattr(subject, "eager", eager)
        assert subject.paying == paying
    assert {name for budget in SEARCHES.values() for name in budget.engines} == {*OPTIONS}


def test_a_wrong_kernel_is_found(monkeypatch):
    propose = kernels.propose

    def coarse(x_pool, *rest):
        return propose(x_pool, *rest[:-1], torch.bfloat16).to(rest[-1])

    def stray(x_pool, *rest):
        result = propose(x_pool, *rest)
        x_pool[0, 0, 0] += 1e-3  # nobody's child
        return result

    def failed():
        return {row["name"] for row in gpu_correctness.kernel_rows(CPU, 8, 16, 32) if not row["passed"]}

    assert failed() == set()
    monkeypatch.setattr(kernels, "propose", coarse)
    assert failed() == {"propose 8x16x32, float32", "propose 8x16x32, float16"}
    monkeypatch.setattr(kernels, "propose", stray)
    assert {name.split(",")[1] for name in failed()} == {
        f" states beside {d}" for d in ("float32", "bfloat16", "float16")
    }


def test_noise_that_is_no_number_fails(monkeypatch):
    monkeypatch.setattr(kernels, "noise", lambda seed, key, *shape: torch.full((len(seed), *shape), math.nan))
    assert not next(gpu_correctness.kernel_rows(CPU, 8, 16, 32))["passed"]
