"""The ledger: its rows and batches add up, for every method and however requests end."""

import csv
import json
import threading

import numpy as np
import pytest
from tiny import PATIENCE, Gate, assert_sound, bon, brightness, ended, engine, rbf

from rollflow import RequestError, methods
from rollflow.profile import export
from rollflow.profile.records import BATCH, KINDS, ROW, STAGES, STATES, WORK, Ring


def smooth(images, prompts):
    return images.square().mean((1, 2, 3))


smooth.differentiable = True


def assert_adds_up(made, results=()):
    """Rows, batches and counters tell the same."""
    ledger = made.ledger
    rows, batches = ledger.table("rows"), ledger.table("batches")
    assert ledger.forgotten == (0, 0) and not ledger._open
    dropped, padding = rows["state"] == STATES.index("dropped"), rows["kind"] == KINDS.index("padding")
    assert not (rows["state"] == STATES.index("open")).any()
    counted = {kind: int((~dropped & (rows["kind"] == i)).sum()) for i, kind in enumerate(KINDS)}
    counted["padding"], counted["speculative"] = int(padding.sum()), int((dropped & ~padding).sum())
    assert counted == {kind: ledger.executed[kind] for kind in counted}
    assert len(rows) == sum(ledger.executed.values())
    work = batches[batches["work"] != WORK.index("images")]
    assert work["bucket"].sum() == len(rows) and work["network_rows"].sum() == ledger.network_rows
    assert len(work) == ledger.ticks
    for batch in work:
        own = rows[rows["batch"] == batch["batch"]]
        assert len(own) == batch["bucket"] and (own["request"] >= 0).sum() == batch["rows"]
    assert (batches["submitted"] <= batches["started"]).all() and (batches["started"] <= batches["ended"]).all()
    for stage in STAGES:
        assert batches[f"{stage}_seconds"].sum() == pytest.approx(ledger.seconds.get(stage, 0.0), abs=1e-6)
        ran = ~np.isnan(batches[f"{stage}_started"])
        assert (batches[f"{stage}_started"] <= batches[f"{stage}_ended"])[ran].all()
        assert (batches[f"{stage}_seconds"][~ran] == 0).all()
    for lane in np.unique(batches["lane"]):  # one thing after another
        own = np.sort(batches[batches["lane"] == lane], order="started")
        assert (own["started"][1:] >= own["ended"][:-1] - 1e-9).all()
    for request, result in results:
        own = rows[(rows["request"] == request) & (rows["state"] == STATES.index("kept"))]
        assert own["nfe"].sum() == result.committed_nfe and len(own) == len(result.history)
        rewards = sorted(row.reward for row in result.history if row.reward is not None)
        assert sorted(own["reward"][~np.isnan(own["reward"])]) == pytest.approx(rewards, abs=1e-6)


@pytest.mark.parametrize("name", methods.names())
def test_rows_add_up_for_every_method(name):
    guided = methods.guided(name, {})
    with engine(lanes=2) as made:
        made.generate(bon())
        made.ledger.clear()
        results = made.generate(
            [rbf(30, method=name, seed=seed, reward=smooth if guided else brightness, finish=2) for seed in range(3)]
        )
        first = min(made.ledger.table("rows")["request"][made.ledger.table("rows")["request"] >= 0])
        assert_adds_up(made, [(first + i, result) for i, result in enumerate(results)])


def test_rows_add_up_where_requests_end_early():
    gate, calls = Gate(), threading.Semaphore(0)

    def failing(images, prompts):
        calls.release()
        raise ValueError("no")

    with engine(lanes=2) as made:
        made.generate(bon())
        made.ledger.clear()
        cancelled = made.submit(rbf(60, reward=gate, seed=1))
        assert gate.called.wait(PATIENCE)
        cancelled.cancel()
        bad = made.submit(rbf(60, reward=failing, seed=2))
        stopped = made.submit(rbf(60, stop_at=0.4, seed=3))
        assert stopped.result(PATIENCE).stopped == "stop_at"
        with pytest.raises(Exception, match="no"):
            bad.result(PATIENCE)
        gate.open.set()
        with pytest.raises(Exception, match="cancelled"):
            cancelled.result(PATIENCE)
        for job in (cancelled, bad, stopped):
            ended(job)
        assert_sound(made)
        assert_adds_up(made)


def test_a_ledger_that_is_off_counts_and_writes_nothing():
    with engine() as made:
        made.ledger.on = False
        made.generate(rbf(30))
        assert made.ledger.executed["committed"] == 30 and made.ledger.seconds["forward"] > 0
        assert len(made.ledger.table("rows")) == len(made.ledger.table("batches")) == 0


def test_a_ring_keeps_the_latest():
    ring = Ring(ROW, 5)
    for i in range(4):
        entries = np.full(3, ring.fresh)
        entries["number"] = [3 * i, 3 * i + 1, 3 * i + 2]
        assert ring.add(entries) == 3 * i
    assert ring.copy()["number"].tolist() == [7, 8, 9, 10, 11] and ring.dropped == 7
    assert ring[6] is None and ring[12] is None and ring[7]["number"] == 7
    many = np.full(12, ring.fresh)
    many["number"] = range(100, 112)
    ring.add(many)
    assert ring.copy()["number"].tolist() == [107, 108, 109, 110, 111]
    ring[ring.count - 1]["reward"] = 2.0
    assert ring.copy()["reward"][-1] == 2.0
    assert np.isnan(Ring(BATCH, 1).fresh["started"])


def test_tables_can_be_written_and_read_again(tmp_path):
    with engine() as made:
        made.generate(rbf(30))
        rows, batches = made.ledger.table("rows"), made.ledger.table("batches")
    found = json.loads(export.save(rows, tmp_path / "rows.json").read_text())
    assert len(found) == len(rows) and {row["state"] for row in found} <= {*STATES}
    assert [row["number"] for row in found] == rows["number"].tolist()
    assert sum(row["kind"] == "padding" for row in found) == (rows["kind"] == KINDS.index("padding")).sum()
    assert all(row["reward"] is None for row in found if row["kind"] == "padding")
    with export.save(batches, tmp_path / "batches.csv").open() as file:
        again = [*csv.DictReader(file)]
    assert [float(row["forward_seconds"]) for row in again] == batches["forward_seconds"].tolist()
    assert {row["work"] for row in again} == {"rows", "images"} and again[0]["backward_started"] == ""
    with pytest.raises(RequestError, match=r"written as one of \.parquet, \.csv, \.json"):
        export.save(rows, tmp_path / "rows.xml")


def test_tables_for_pandas_and_parquet(tmp_path):
    pandas = pytest.importorskip("pandas", reason="the extra `profile` is not installed")
    pytest.importorskip("pyarrow", reason="the extra `profile` is not installed")
    with engine() as made:
        made.generate(rbf(30))
        frame = export.to_pandas(made.ledger.table("rows"))
        again = pandas.read_parquet(export.save(made.ledger.table("rows"), tmp_path / "rows.parquet"))
    assert frame.groupby("kind").size().to_dict() == again.groupby("kind").size().to_dict()
    assert len(again) == len(frame) and again.reward.notna().sum() == frame.reward.notna().sum()
