"""Recordings: what a `with` block holds, alone and beside another; folders and files of tables, and what is none."""

import csv
import json
import math
import sys
import threading

import numpy as np
import pytest
from sums import assert_adds_up
from tiny import PATIENCE, Gate, bon, brightness, engine, rbf

from rollflow import Request, RequestError, RollflowError, rewards
from rollflow.errors import LONGEST
from rollflow.profile import export
from rollflow.profile.recording import ABOUT, FILES, Recording
from rollflow.profile.records import KINDS, NAMES, STATES, TABLES

pytestmark = pytest.mark.usefixtures("one_thread")


def contrast(images, prompts):
    return images.std((1, 2, 3))


def record(made, *requests):
    with made.profile() as p:
        results = made.generate([*requests])
        made.stats()
    return p.recording, results


@pytest.fixture(scope="module")
def recording():
    combined = rewards.combine("a - 2*b", {"a": brightness, "b": contrast})
    odd = Request('two "cats",\n\t日本 🐈; a=b\'s', brightness, "rbf", 20, steps=4, options={"initial": 5})
    with engine(lanes=2) as made:
        made.generate(bon())
        found, _ = record(made, rbf(30, reward=combined, held_out=contrast, finish=2), odd)
    return found


# What is recorded.


def test_a_recording_holds_what_ran_within_it():
    with engine() as made:
        made.generate(bon())
        first, results = record(made, rbf(20, seed=1), bon(seed=2))
        made.generate(rbf(20, seed=3))
        second, _ = record(made, bon(seed=4))
        made.close()
    assert first.requests["request"].tolist() == [1, 2] and second.requests["request"].tolist() == [4]
    assert {*first.rows["request"]} == {1, 2} == first.specs.keys() and {*second.rows["request"]} == {4}
    assert first.begin < first.requests["submitted"].min() and first.requests["ended"].max() < first.end < second.begin
    assert first.batches["submitted"].min() > first.begin and first.calls["ended"].max() < first.end
    assert first.seconds == first.end - first.begin > 0
    assert first.about["forgotten"] == dict.fromkeys(TABLES, 0)
    assert_adds_up(first, results)


def test_what_it_was_recorded_on(recording):
    about = recording.about
    assert about["model"] == about["adapter"] == "Tiny" and about["device"] == "cpu" and about["dtype"] == "float32"
    assert (about["lanes"], about["buckets"], about["parallel"], about["preview"]) == (2, [8], True, False)
    assert about["cores"] >= 1 and about["machine"] and {"rollflow", "torch", "python"} <= about["versions"].keys()
    (size,) = about["sizes"]
    assert (size["geometry"]["height"], size["geometry"]["width"]) == (8, 8) and size["slots"] > 0
    combined, odd = recording.specs.values()
    assert combined["terms"] == ["brightness", "contrast"] and combined["held_out"] == ["contrast"]
    assert odd["terms"] == ["brightness"] and odd["held_out"] is None and odd["options"] == {"initial": 5}
    assert odd["prompt"].startswith('two "cats",') and odd["opaque"] == []


def test_there_is_no_recording_before_its_end():
    with engine() as made, made.profile() as p, pytest.raises(RollflowError, match="when its `with` block is over"):
        p.recording  # noqa: B018


def test_what_is_recorded_is_there_after_an_error(tmp_path):
    with engine() as made:
        p = made.profile(tmp_path / "out")
        with pytest.raises(KeyError), p:
            made.generate(bon())
            raise KeyError
    assert len(p.recording.requests) == 1 and not (tmp_path / "out" / ABOUT).exists()


def test_recordings_may_overlap():
    begun, over, found = threading.Barrier(2), threading.Barrier(2), {}

    def other(made):
        with made.profile() as p:
            begun.wait(PATIENCE)
            made.generate(rbf(20, seed=2))
            over.wait(PATIENCE)
        found["other"] = p.recording

    with engine(lanes=2) as made:
        thread = threading.Thread(target=other, args=(made,))
        with made.profile() as p:
            made.generate(rbf(20, seed=1))
            thread.start()
            begun.wait(PATIENCE)
        over.wait(PATIENCE)
        thread.join()
        made.close()
        whole = {name: made.ledger.table(name) for name in TABLES}
    first, second = p.recording, found["other"]
    assert first.begin < second.begin < first.end < second.end
    assert first.requests["request"][0] == 0 and second.requests["request"].tolist() == [1]
    for name in ("rows", "batches"):
        both = {*first.__dict__[name]["batch"].tolist(), *second.__dict__[name]["batch"].tolist()}
        assert both == {*whole[name]["batch"].tolist()}
    assert first.about["forgotten"] == second.about["forgotten"] == dict.fromkeys(TABLES, 0)


def test_what_is_on_its_way_at_the_ends():
    gate = Gate()
    with engine() as made:
        job = made.submit(rbf(20, reward=gate))
        assert gate.called.wait(PATIENCE)
        with made.profile() as p:
            gate.open.set()
            job.result(PATIENCE)
        late = Gate()
        with made.profile() as q:
            other = made.submit(bon(reward=late))
            assert late.called.wait(PATIENCE)
        late.open.set()
        other.result(PATIENCE)
    assert not len(p.recording.requests) and len(p.recording.rows) and p.recording.specs.keys() == {0}
    assert {*p.recording.rows["batch"]} <= {*p.recording.batches["batch"]}, "a batch is there with its rows"
    assert set(p.recording.costs) == {0}
    (entry,), own = q.recording.requests, q.recording.rows
    assert math.isnan(entry["ended"]) and (own["state"][own["number"] >= 0] == STATES.index("open")).all()
    assert q.recording.costs[1].nfe["committed"] == 0, "nobody knows yet what they were for"
    assert sum(q.recording.lanes[0].stages.values()) >= 0


# Folders.


def same(one, other):
    assert one.dtype == other.dtype
    for name in one.dtype.names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)  # NaN in the same places


@pytest.fixture
def folder(recording, tmp_path):
    pytest.importorskip("pyarrow", reason="the extra `profile` is not installed")
    return recording.save(tmp_path / "a" / "b")


def test_a_folder_gives_the_recording_back(recording, folder):
    again = Recording.load(str(folder))
    for name in TABLES:
        same(getattr(recording, name), getattr(again, name))
    assert np.isnan(again.batches["backward_started"]).all() and np.isnan(again.rows["reward"]).any()
    assert again.about == json.loads(json.dumps(recording.about)) and again.costs == recording.costs
    assert again.lanes == recording.lanes and sorted(path.name for path in folder.iterdir()) == sorted(
        [*FILES.values(), ABOUT]
    )
    assert again.save(folder) == folder  # over what is there
    same(Recording.load(folder).rows, recording.rows)


@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize("name", TABLES)
def test_any_table_comes_back_from_parquet(name, count, tmp_path):
    pytest.importorskip("pyarrow", reason="the extra `profile` is not installed")
    kind, rng, letters = TABLES[name], np.random.default_rng(count), np.array([*"aZ é日🐈'\",\n;"])
    found = np.zeros(count, kind)
    for field in kind.names:  # all that the bits of a number can say: infinities and every NaN, too
        if words := NAMES[name].get(field):
            found[field] = rng.integers(len(words), size=count)
        elif kind[field].kind == "U":
            found[field] = ["".join(rng.choice(letters, rng.integers(90))) for _ in range(count)]
        elif kind[field].kind == "b":
            found[field] = rng.integers(2, size=count)
        else:
            found[field] = np.frombuffer(rng.bytes(count * kind[field].itemsize), kind[field])
    path = export.save(found, tmp_path / "table.parquet")
    same(export.load(path, name), found)


def refused(folder, message):
    with pytest.raises(RequestError, match=message) as caught:
        Recording.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("content", [None, "", "{", "\xff\xfe", "[" * 10_000])
def test_a_folder_without_a_recording(content, tmp_path):
    if content is not None:
        (tmp_path / ABOUT).write_text(content, encoding="latin-1")
    refused(tmp_path / "nowhere" if content is None else tmp_path, "holds no recording.*: give a folder")


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"format": 2}', '{"format": "1"}'])
def test_a_recording_of_another_format(content, tmp_path):
    (tmp_path / ABOUT).write_text(content)
    refused(tmp_path, "is of another format than 1: record it again")


def test_a_table_that_is_missing_or_broken(folder):
    import pyarrow
    from pyarrow import parquet

    batches = folder / FILES["batches"]
    good = parquet.read_table(batches)
    batches.unlink()
    refused(folder, "batches.parquet' cannot be read as a table of batches .*: record it again")
    batches.write_text("no parquet")
    refused(folder, "cannot be read as a table of batches")
    parquet.write_table(good.drop_columns(["host"]), batches)
    refused(folder, "is no table of batches: it has no column host; record it again")
    for name, other in (("lane", "a"), ("work", "sleep"), ("work", None), ("rows", 2**40), ("host", None)):
        column = [other] * len(good)
        place = good.column_names.index(name)
        parquet.write_table(good.set_column(place, name, pyarrow.array(column)), batches)
        refused(folder, f"is no table of batches: its column {name} holds .*; record it again")
    parquet.write_table(good, batches)
    assert len(Recording.load(folder).batches) == len(good)


# Files of tables.


def test_tables_as_json_and_csv(recording, tmp_path):
    rows, batches = recording.rows, recording.batches
    found = json.loads(export.save(rows, tmp_path / "rows.json").read_text())
    assert len(found) == len(rows) and {row["state"] for row in found} <= {*STATES}
    assert [row["number"] for row in found] == rows["number"].tolist()
    assert sum(row["kind"] == "padding" for row in found) == (rows["kind"] == KINDS.index("padding")).sum()
    assert all((row["reward"] is None) == math.isnan(known) for row, known in zip(found, rows["reward"], strict=True))
    with export.save(batches, tmp_path / "batches.csv").open(newline="") as file:
        again = [*csv.DictReader(file)]
    assert [float(row["forward_seconds"]) for row in again] == batches["forward_seconds"].tolist()
    assert {row["work"] for row in again} == {"encode", "rows", "images"} and again[0]["backward_started"] == ""
    with export.save(recording.requests, tmp_path / "requests.csv").open(newline="", encoding="utf-8") as file:
        assert [row["prompt"] for row in csv.DictReader(file)] == recording.requests["prompt"].tolist()


def test_tables_for_pandas_and_parquet(recording, tmp_path):
    pandas = pytest.importorskip("pandas", reason="the extra `profile` is not installed")
    pytest.importorskip("pyarrow", reason="the extra `profile` is not installed")
    frame = export.to_pandas(recording.rows)
    again = pandas.read_parquet(export.save(recording.rows, tmp_path / "rows.parquet"))
    assert frame.groupby("kind").size().to_dict() == again.groupby("kind").size().to_dict()
    assert len(again) == len(frame) and again.reward.notna().sum() == frame.reward.notna().sum() > 0


def test_what_cannot_be_written(recording, tmp_path, monkeypatch):
    with pytest.raises(RequestError, match=r"written as one of \.parquet, \.csv, \.json"):
        export.save(recording.rows, tmp_path / "rows.xml")
    with pytest.raises(RequestError, match=r"give one of the ledger's \(rows, batches, calls, requests\)"):
        export.save(recording.rows[["batch", "nfe"]], tmp_path / "rows.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RequestError, match="takes pyarrow: pip install"):
        export.save(recording.rows, tmp_path / "rows.parquet")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RequestError, match="takes pandas: pip install"):
        export.to_pandas(recording.rows)
