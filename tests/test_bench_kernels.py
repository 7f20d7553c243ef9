"""`python -m rollflow.bench kernels`: what it counts, what it compares with and what it writes, not how fast it is."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from rollflow import kernels
from rollflow.bench import kernel_bandwidth as bandwidth
from rollflow.bench.kernel_bandwidth import Kernels, Size
from rollflow.errors import RequestError

SMALL = Size(3, 16, 8)
CPU = torch.device("cpu")


def test_propose_bytes():
    parent, child = torch.tensor([0, 1, -1, 2]), torch.tensor([3, 4, 5, -1])
    coefficients = torch.tensor([[1.0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [math.nan] * 4])
    # 6 elements: x and u of one row, x of the second, neither of a prior nor of a padding row; three children of 24
    # bytes; four rows of the model's input. In half precision u and input take 12 bytes a row.
    expected = (24 + 12) + 24 + 3 * 24 + 4 * 12
    assert bandwidth.propose_bytes(parent, child, coefficients, 6, torch.bfloat16) == expected == 180
    assert bandwidth.propose_bytes(parent, child, coefficients, 6, torch.float32) == 180 + 5 * 12


def test_finish_and_noise_bytes():
    slot = torch.tensor([4, -1, 0])
    # 8 elements, two rows: u and the pool's u in half precision, x in single; three rows of latents, padding too.
    expected = 2 * (16 + 32 + 16) + 3 * 16
    assert bandwidth.finish_bytes(slot, 8, torch.float16) == expected == 176
    assert bandwidth.finish_bytes(slot, 8, torch.float32) == 176 + 7 * 16
    assert bandwidth.noise_bytes(3, 8) == 96


def test_bytes_of_the_sizes_measured():
    assert bandwidth.proposing(Size(4, 1024, 64), torch.float32, CPU, 1).bytes == 4 * 4 * 4 * 65536
    assert bandwidth.finishing(Size(4, 1024, 64), torch.bfloat16, CPU, 1).bytes == 4 * (2 + 4 + 2 + 2) * 65536
    noise = bandwidth.drawing(Size(4, 1024, 64), torch.bfloat16, CPU, 1)
    assert noise.bytes == 4 * 4 * 65536 and noise.dtype == torch.float32
    assert bandwidth.copying(CPU).bytes == 2 * 2**26
    assert len(bandwidth.SIZES) == 10 and [size.rows for size in bandwidth.QUICK] == [16, 4, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0.0, 0.7])
def test_unfused_propose_is_propose(dtype, k):
    rows, token, channel = SMALL
    pools = torch.randn(2, 2 * rows, token, channel, generator=torch.Generator().manual_seed(0))
    parent, child = torch.tensor([2, 0, 1]), torch.tensor([3, 5, 4])
    coefficients = torch.tensor([[0.9, -0.1, k, 1.1], [1, 0.2, k, 1], [0.5, -0.3, k, 2]])
    seed, key = torch.tensor([5, 5, -6]), torch.tensor([1, 2, 3])
    (x, u), (x_fused, u_fused) = ((x.clone(), u.to(dtype, copy=True)) for x, u in (pools, pools))
    expected = kernels.propose(x_fused, u_fused, parent, child, coefficients, seed, key, dtype)
    actual = bandwidth.unfused_propose(
        x, u, parent, child, coefficients, dtype, lambda like: kernels.noise(seed, key, *like.shape[1:])
    )
    assert actual.dtype == dtype and not torch.equal(x, pools[0])
    torch.testing.assert_close(x, x_fused, rtol=2e-6, atol=2e-6)
    half = 2.0**-8
    torch.testing.assert_close(actual, expected, rtol=half if dtype == torch.bfloat16 else 2e-6, atol=2e-6)
    torch.testing.assert_close(u, u_fused, rtol=0, atol=0)


def test_unfused_propose_draws_normals():
    x, u = torch.zeros(2, 64, 64), torch.zeros(2, 64, 64)
    bandwidth.unfused_propose(
        x, u, torch.tensor([0]), torch.tensor([1]), torch.tensor([[1.0, 1.0, 3.0, 1.0]]), torch.float32
    )
    assert x[1].std().item() == pytest.approx(3, rel=0.1) and abs(x[1].mean().item()) < 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfused_finish_is_finish(dtype):
    x_pool = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    u = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    slot, coefficients = torch.tensor([4, 0, 2]), torch.tensor([[1.0, -0.4], [0.8, 0.1], [1.2, -1.0]])
    kept, kept_fused = torch.zeros(2, 5, 6, 8, dtype=dtype).unbind(0)
    affine = torch.tensor([2.7693, -0.5]), torch.tensor([0.1159, 3.0])
    rest = (slot, coefficients, 4, 6, 2, 2, *affine, dtype)  # higher than wide or the reverse: both count
    expected = kernels.finish(u, x_pool, kept_fused, *rest)
    actual = bandwidth.unfused_finish(u, x_pool, kept, *rest)
    assert actual.dtype == dtype and actual.shape == (3, 2, 4, 6)
    torch.testing.assert_close(actual, expected, rtol=2.0**-8 if dtype == torch.bfloat16 else 4e-6, atol=4e-6)
    torch.testing.assert_close(kept, kept_fused, rtol=0, atol=0)


@pytest.mark.parametrize("build", [bandwidth.proposing, bandwidth.finishing, bandwidth.drawing])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_of_a_workload_make_the_same_things_in_every_set(build, dtype):
    work = build(SMALL, dtype, CPU, 5 * build(SMALL, dtype, CPU, 1).bytes - 1)
    assert work.sets == 5 and work.size == SMALL
    for i in range(work.sets):
        fused, unfused = work.fused(i), work.unfused(i)
        assert fused.shape == unfused.shape and fused.dtype == unfused.dtype == work.dtype
        if work.kernel == "finish":
            torch.testing.assert_close(fused, unfused, rtol=2.0**-7, atol=1e-5)


def test_working_sets_do_not_overlap(monkeypatch):
    touched = {"propose": [], "finish": []}

    def propose(x_pool, u_pool, parent, child, *rest):
        touched["propose"] += [*parent.tolist(), *child.tolist()]
        assert len(x_pool) == len(u_pool) == 4 * 2 * SMALL.rows
        return x_pool[child]

    def finish(u, x_pool, u_pool, slot, *rest):
        touched["finish"] += slot.tolist()
        assert torch.equal(u, u_pool[slot]) and len(x_pool) == 4 * SMALL.rows
        return u

    monkeypatch.setattr(kernels, "propose", propose)
    monkeypatch.setattr(kernels, "finish", finish)
    for build in (bandwidth.proposing, bandwidth.finishing):
        work = build(SMALL, torch.float32, CPU, 4 * build(SMALL, torch.float32, CPU, 1).bytes)
        touched[work.kernel].clear()
        for i in range(work.sets):
            work.fused(i)
    assert sorted(touched["propose"]) == list(range(4 * 2 * SMALL.rows))
    assert sorted(touched["finish"]) == list(range(4 * SMALL.rows))


def test_seconds_are_medians_in_turns(monkeypatch):
    order, calls = [], [lambda i: torch.zeros(1), lambda i: torch.ones(1)]
    taken = {calls[0]: iter([3.0, 1.0, 2.0]), calls[1]: iter([6.0, 6.0, 90.0])}

    def looped(call, sets, warm_up):
        def burst():
            order.append(call)
            return next(taken[call])

        return burst

    monkeypatch.setattr(bandwidth, "_looped", looped)
    assert bandwidth.seconds_a_call(calls, 1, CPU, 3, 1) == [2.0, 6.0]
    assert order == calls * 3


def test_the_host_clock_is_divided_by_calls(monkeypatch):
    now, seen = [0.0], []

    def call(i):
        seen.append(i)
        now[0] += 0.004
        return torch.zeros(1)

    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: now[0])
    burst = bandwidth._looped(call, 2, 3)
    del seen[:]
    assert burst() == pytest.approx(0.004) and seen == [0, 1, 0]  # the fewest calls that take LEAST_SECONDS


class Device:
    """A CUDA device that only keeps time: a captured call takes a millisecond a replay."""

    def __init__(self):
        self.clock, self.capturing, self.captured, self.warmed = 0.0, False, [], []

    def call(self, i):
        (self.captured if self.capturing else self.warmed).append(i)
        return torch.zeros(1)

    def graph(self, _):
        device = self

        class Capture:
            def __enter__(self):
                device.capturing = True

            def __exit__(self, *_):
                device.capturing = False

        return Capture()

    def replay(self):
        self.clock += len(self.captured)

    def event(self, enable_timing):
        device = self

        class Event:
            def record(self):
                self.at = device.clock

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        return Event()


@pytest.mark.parametrize(("sets", "launches"), [(1, 16), (5, 20), (40, 40)])
def test_graphs_hold_every_working_set_equally_often(sets, launches, monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: device)
    monkeypatch.setattr(torch.cuda, "graph", device.graph)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    burst = bandwidth._captured(device.call, sets, 3)
    assert {*device.warmed} == {*range(sets)} and len(device.warmed) == max(3, sets)
    assert device.captured == [i % sets for i in range(launches)]
    assert burst() == pytest.approx(0.001)


def test_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bandwidth, "QUICK", (Size(2, 4, 4),))
    monkeypatch.setattr(bandwidth, "COPIED", {"cpu": 1000})
    file = tmp_path / "kernels.json"
    Kernels(device="cpu", dtype="bfloat16", quick=True, repetitions=1, warm_up=1, json=file)()
    report = json.loads(file.read_text())
    assert report.keys() == {"environment", "copy_gigabytes_per_second", "rows"}
    assert {"date", "commit", "torch", "device"} <= report["environment"].keys()
    assert report["environment"]["measured_on"] == "cpu"
    assert [(row["kernel"], row["dtype"]) for row in report["rows"]] == [
        ("propose", "bfloat16"), ("finish", "bfloat16"), ("noise", "float32")
    ]  # fmt: skip
    assert [row["bytes"] for row in report["rows"]] == [2 * 16 * 12, 2 * 16 * 10, 2 * 16 * 4]
    for row in report["rows"]:
        assert row.keys() == {
            "kernel", "rows", "token", "channel", "dtype", "seconds", "bytes", "gigabytes_per_second", "of_copy",
            "over_torch",
        }  # fmt: skip
        assert (row["rows"], row["token"], row["channel"]) == (2, 4, 4) and row["over_torch"] > 0
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["of_copy"] == pytest.approx(row["gigabytes_per_second"] / report["copy_gigabytes_per_second"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "a copy moves" in shown and "these figures say nothing about the kernels" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "no device 'tpu': choose cpu, cuda or cuda:N"),
        ({"device": "meta"}, "no kernels for device 'meta'"),
        ({"device": "cuda:99"}, "torch sees \\d+ CUDA devices"),
        ({"device": "cpu", "repetitions": 0}, "at least 1 each"),
        ({"device": "cpu", "warm_up": 0}, "at least 1 each"),
    ],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(RequestError, match=message):
        Kernels(**options)()


def test_static_predictions(tmp_path):
    """Where kernels are compiled: in a process without the interpreter."""
    pytest.importorskip("triton.backends.nvidia.compiler")
    file = tmp_path / "static.json"
    command = [sys.executable, "-m", "rollflow.bench", "kernels", "--static", "--quick", "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "sm_100" in run.stdout and "1 x 4096 x 64" in run.stdout
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3 * 3 * 3
    for row in rows:
        assert row["shared"] == row["spills"] == row["barriers"] == 0 < row["instructions"]
        assert row["seconds"] > max(row["memory_seconds"], row["issue_seconds"]) > 0 and row["of_copy"] > 0
    moved = {row["kernel"]: row["bytes"] for row in rows if row["token"] == 4096 and row["target"] == "sm_90"}
    assert moved == {"propose": 4096 * 64 * 12, "finish": 4096 * 64 * 10, "noise": 4096 * 64 * 4}


@pytest.mark.gpu
def test_kernels_on_a_gpu(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    Kernels(device="cuda", quick=True, repetitions=2, json=file)()
    report = json.loads(file.read_text())
    assert report["environment"]["measured_on"] == "cuda" and len(report["rows"]) == 9
    assert report["copy_gigabytes_per_second"] > 10
    for row in report["rows"]:
        # Far more than the memory gives would mean that a cache was measured, or that nothing ran.
        assert 0 < row["of_copy"] < 1.5 and row["dtype"] == ("float32" if row["kernel"] == "noise" else "bfloat16")
    assert "say nothing" not in capsys.readouterr().out
