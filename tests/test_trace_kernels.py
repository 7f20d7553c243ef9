"""Torch's own events in a trace: in line with the batches that ran them, and only for a while."""

import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import PATIENCE, Tiny, bon, engine, rbf
from traces import assert_valid, made_up, of, track

from rollflow import RequestError, RollflowError
from rollflow.profile.trace.format import PROCESSES
from rollflow.profile.trace.kernels import GRACE, Kernels, load
from rollflow.profile.trace.writing import trace


class Linear(Tiny):
    """A model whose forwards are one linear layer and otherwise wait, so that they are far from one another."""

    weight, apart = torch.eye(12), threading.Event()

    def velocity(self, x, tau, conditioning, guidance, geometry):
        self.apart.wait(0.02)
        u = torch.nn.functional.linear(x, self.weight)
        self.apart.wait(0.02)
        return u * tau[:, None, None]


@pytest.fixture(scope="module")
def watched():
    """A recording of such a model, and what torch saw."""
    with engine(Linear(), lanes=2) as made:
        made.generate(bon())
        with Kernels(seconds=PATIENCE) as kernels, made.profile() as p:
            made.generate([rbf(8, seed=seed) for seed in range(2)])
    return p.recording, kernels.trace


def test_operators_of_other_threads_lie_in_the_forward_that_ran_them(watched):
    recording, seen = watched
    found = trace(recording, seen)
    assert_valid(found)
    forwards = sorted((e["ts"], e["ts"] + e["dur"]) for e in of(found, "X", name="forward", cat="stage"))
    operators = of(found, "X", name="aten::linear")
    assert len(forwards) == len(operators) > 3
    of_process = {e["pid"]: e["args"]["name"] for e in of(found, "M", name="process_name")}
    slack = 5_000.0  # microseconds; the forwards of one lane are 40,000 from one another
    unmatched = [*forwards]
    for operator in operators:
        start, end = operator["ts"], operator["ts"] + operator["dur"]
        around = [(a, b) for a, b in unmatched if a + 20_000 - slack <= start and end <= b - 20_000 + slack]
        assert around, (operator, forwards)
        unmatched.remove(around[0])
        assert of_process[operator["pid"]].startswith("torch: ") and operator["pid"] > len(PROCESSES)


def test_times_of_older_versions_count_from_the_epoch(watched):
    recording, seen = watched
    base = int(seen["baseTimeNanoseconds"])
    assert base > 0
    events = [{**e, "ts": e["ts"] + base / 1000} if "ts" in e else e for e in seen["traceEvents"]]
    older = {**{k: v for k, v in seen.items() if k != "baseTimeNanoseconds"}, "traceEvents": events}
    times = [sorted(e["ts"] for e in of(trace(recording, one), "X", name="aten::linear")) for one in (seen, older)]
    assert times[0] == pytest.approx(times[1], abs=1.0)


def test_only_what_ran_while_it_was_recorded_is_in_the_trace():
    events = [
        {
            "ph": "X",
            "cat": "cpu_op",
            "name": name,
            "pid": 9,
            "tid": 9,
            "ts": 1e6 * at,
            "dur": 2e5,
            "args": {"Ev Idx": 1},
        }
        for name, at in (
            ("before", 99.7),
            ("begins before", 99.9),
            ("in", 100.5),
            ("ends after", 100.9),
            ("after", 101.1),
        )
    ]
    seen = {"traceEvents": events, "baseTimeNanoseconds": (1_800_000_000 - 100) * 10**9}
    found = trace(made_up(), seen)
    assert_valid(found)
    assert [(e["name"], e["ts"] / 1e6, e["dur"] / 1e6, e["args"]) for e in of(found, "X")] == [
        ("begins before", 0.0, 0.1, {}), ("in", 0.5, 0.2, {}), ("ends after", 0.9, 0.2, {})
    ]  # fmt: skip


def test_kernels_of_a_device_and_what_launched_them():
    common = {"ph": "X", "args": {"correlation": 3, "achieved": float("nan")}}
    seen = {
        "baseTimeNanoseconds": 1_800_000_000 * 10**9,
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "python"}},
            {"ph": "M", "name": "process_labels", "pid": 0, "tid": 0, "args": {"labels": "GPU 0"}},
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "args": {"name": "stream 7"}},
            {**common, "cat": "cuda_runtime", "name": "launch", "pid": 5, "tid": 5, "ts": 10.0, "dur": 4.0},
            {**common, "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 20.0, "dur": 10.0},
            {**common, "cat": "kernel", "name": "beside", "pid": 0, "tid": 7, "ts": 25.0, "dur": 10.0},
            {
                **common,
                "cat": "Trace",
                "name": "PyTorch Profiler (0)",
                "pid": "Spans",
                "tid": "x",
                "ts": 0.0,
                "dur": 99.0,
            },
            {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 3, "pid": 5, "tid": 5, "ts": 10.0},
            {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 3, "pid": 0, "tid": 7, "ts": 20.0, "bp": "e"},
            {"ph": "s", "cat": "ac2g", "name": "ac2g", "id": 4, "pid": 5, "tid": 5, "ts": 10.0},
        ],
    }
    found = trace(made_up(), seen)
    assert_valid(found)
    assert [e["name"] for e in track(found, "torch: python 0 GPU 0", "stream 7")] == ["gemm"]
    assert [e["name"] for e in track(found, "torch: python 0 GPU 0", "stream 7 (2)")] == ["beside"]
    assert [e["name"] for e in track(found, "torch: 5", "5")] == ["launch"]
    (start,), (end,) = of(found, "s"), of(found, "f")
    assert (start["ts"], end["ts"]) == (10.0, 20.0) and len(of(found, "X")) == 3
    assert of(found, "X", name="gemm")[0]["args"] == {"correlation": 3, "achieved": None}


def test_it_stops_by_itself_when_its_seconds_are_over():
    with Kernels(seconds=0.05) as kernels:
        torch.ones(3).cumsum(0)
        assert kernels.over.wait(PATIENCE)
        torch.ones(3).cumprod(0)
        with pytest.raises(RollflowError, match="when their `with` block is over"):
            _ = kernels.trace
    names = {e["name"] for e in kernels.trace["traceEvents"]}
    assert "aten::cumprod" not in names


def test_it_collects_when_other_threads_have_stopped_writing(monkeypatch):
    told = []

    class Told:
        def __init__(self, **options):
            assert options["experimental_config"] is not None

        def start(self):
            told.append(("start", time.monotonic()))

        def toggle_collection_dynamic(self, enable, activities):
            assert not enable and torch.profiler.ProfilerActivity.CPU in activities
            told.append(("look away", time.monotonic()))

        def stop(self):
            told.append(("stop", time.monotonic()))

        def export_chrome_trace(self, path):
            Path(path).write_text('{"traceEvents": []}')

    monkeypatch.setattr(torch.profiler, "profile", Told)
    with Kernels(seconds=PATIENCE):
        pass
    assert [what for what, _ in told] == ["start", "look away", "stop"]
    assert told[2][1] - told[1][1] >= 0.9 * GRACE > 0


def test_what_cannot_be_recorded_is_refused(tmp_path):
    with pytest.raises(RequestError, match="seconds=0: give how long"):
        Kernels(seconds=0)
    with Kernels(), pytest.raises(RequestError, match=r"a torch\.profiler runs already"), Kernels():
        pass
    for content, message in (("{", "cannot be read as a trace"), ("[]", "no list `traceEvents`")):
        (tmp_path / "kernels.json").write_text(content)
        with pytest.raises(RequestError, match=message):
            load(tmp_path / "kernels.json")
