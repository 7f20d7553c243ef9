"""`python -m rollflow.bench compare`: which rows it pairs, what it calls worse, and what it exits with."""

import json
import math

import pytest

from rollflow.bench import compare
from rollflow.bench.compare import Change, Compare, Results
from rollflow.errors import RequestError

KEY = (("contender", "packed"),)
PACKED = {"contender": "packed", "prompts": 16, "nfe_per_second": 400.0, "milliseconds_per_nfe": 2.5, "seconds": [1, 2]}
SINGLE = {**PACKED, "contender": "one by one", "nfe_per_second": 100.0, "milliseconds_per_nfe": 10.0}
WHERE = {"date": "2026-01-01", "commit": "a", "torch": "2.11", "device": "a GPU"}


def write(file, rows, environment=WHERE):
    file.write_text(json.dumps(rows if environment is None else {"environment": environment, "rows": rows}))
    return file


@pytest.fixture
def files(tmp_path):
    def make(before, after, **of_after):
        return write(tmp_path / "before.json", before), write(tmp_path / "after.json", after, **of_after)

    return make


@pytest.mark.parametrize(
    ("measurement", "before", "after", "verdict"),
    [
        ("nfe_per_second", 100, 94, "worse"),
        ("nfe_per_second", 100, 106, "better"),
        ("images_per_second", 2, 1, "worse"),
        ("efficiency", 0.5, 0.9, "better"),
        ("gigabytes_per_second", 3000, 2000, "worse"),
        ("executed_over_committed", 1.0, 1.2, "worse"),
        ("peak_memory_bytes", 2**30, 2**29, "better"),
        ("milliseconds_per_nfe", 2.0, 2.5, "worse"),
        ("seconds", 2, 1, "better"),
        ("host_microseconds_per_row", 10, 11, "worse"),
        ("host_microseconds_per_tick", 10, 9, "better"),
        ("nfe_per_second", 100, 95, ""),  # as much as the threshold is not more than it
        ("seconds", 100, 105, ""),
        ("host_microseconds_per_row", 0, 1, "worse"),
        ("host_microseconds_per_row", 0, 0, ""),
        ("peak_memory_bytes", 1, None, "only before"),
        ("peak_memory_bytes", None, 1, "only after"),
    ],
)
def test_the_direction_of_every_measurement(measurement, before, after, verdict):
    assert Change(KEY, measurement, before, after).verdict(0.05) == verdict
    assert len({*compare.HIGHER_IS_BETTER} & {*compare.LOWER_IS_BETTER}) == 0


def test_ratios():
    assert Change(KEY, "seconds", 4, 3).ratio == 0.75
    assert Change(KEY, "seconds", 0, 3).ratio == math.inf and Change(KEY, "seconds", 0, 0).ratio == 1
    assert Change(KEY, "seconds", 4, 0).ratio == 0
    assert Change(KEY, "seconds", None, 3).ratio is Change(KEY, "seconds", 3, None).ratio is None


def test_rows_are_paired_by_identity_in_whatever_order(files, capsys):
    quicker = {**SINGLE, "nfe_per_second": 150.0, "milliseconds_per_nfe": 6.667}
    before, after = map(compare.load, files([PACKED, SINGLE], [quicker, PACKED]))
    found = {(dict(c.key)["contender"], c.measurement): c.ratio for c in compare.changes(before, after)}
    assert found == {
        ("packed", "nfe_per_second"): 1, ("packed", "milliseconds_per_nfe"): 1,
        ("one by one", "nfe_per_second"): 1.5, ("one by one", "milliseconds_per_nfe"): pytest.approx(0.6667),
    }  # fmt: skip
    Compare(*files([PACKED, SINGLE], [quicker, PACKED]))()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "of all: prompts 16" and shown[1] == "contender packed"
    (line,) = [line.split() for line in shown if "150" in line]
    assert line == ["nfe_per_second", "100", "->", "150", "after/before", "1.500", "better"]
    assert shown[-1] == "0 of 4 measurements got worse by more than 5 %"


def test_what_got_worse_fails(files, capsys):
    worse = {**PACKED, "nfe_per_second": 350.0, "milliseconds_per_nfe": 2.857}
    both = files([PACKED, SINGLE], [worse, SINGLE])
    with pytest.raises(SystemExit) as stop:
        Compare(*both)()
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "2 of 4 measurements got worse by more than 5 %" in shown and shown.count("  worse\n") == 2
    Compare(*both, threshold=0.2)()
    assert "0 of 4 measurements got worse by more than 20 %" in capsys.readouterr().out
    Compare(*reversed(both))()  # the other way round it got better


def test_what_only_one_file_has_is_said(files, capsys):
    more = {**PACKED, "efficiency": 0.9, "peak_memory_bytes": None}
    Compare(*files([PACKED, SINGLE], [more, {**PACKED, "contender": "third"}]))()
    shown = capsys.readouterr().out
    assert "only before: contender one by one, prompts 16\n" in shown
    assert "only after: contender third, prompts 16\n" in shown
    assert [line.split()[-2:] for line in shown.splitlines() if "efficiency" in line] == [["only", "after"]]
    assert "peak_memory_bytes" not in shown and " seconds" not in shown  # null, and a list of repetitions


def test_other_machines_and_versions_are_warned_of(files, capsys):
    Compare(*files([PACKED], [PACKED], environment={**WHERE, "date": "2026-02-02", "commit": "b", "torch": "2.13"}))()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: torch was 2.11 before and is 2.13 after"]
    Compare(*files([PACKED], [PACKED], environment=None))()
    assert "warning: no environment in after: machines and versions may differ" in capsys.readouterr().out
    assert compare.disagreements(Results({}, {"threads": 1}), Results({}, {})) == [
        "threads was 1 before and is not given after"
    ]
    assert compare.disagreements(Results({}, WHERE), Results({}, {**WHERE, "commit": "c"})) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "after.json' are not JSON"),
        ("3", "no results in .*after.json'"),
        ("[]", "no results in"),
        ('{"rows": 1}', "no results in"),
        ('{"environment": {}}', "no results in"),
        ("[[1]]", "no results in"),
        (json.dumps([PACKED, PACKED]), r"two rows of .*after.json' are of the same \(contender packed, prompts 16\)"),
        (json.dumps([{**PACKED, "nfe_per_second": math.nan}]), "nfe_per_second is nan in .*a finite number"),
        (json.dumps([{**PACKED, "nfe_per_second": -1}]), "nfe_per_second is -1.0 in"),
        (json.dumps([{**PACKED, "contender": "other"}]), "no measurement is in both .* match by contender, prompts"),
        (json.dumps([{"contender": "packed", "prompts": 16}]), None),
    ],
)
def test_files_that_cannot_be_compared(content, message, tmp_path, capsys):
    before, after = write(tmp_path / "before.json", [PACKED]), tmp_path / "after.json"
    after.write_text(content)
    with pytest.raises(RequestError, match=message or "no measurement is in both") as error:
        Compare(before, after)()
    assert "\n" not in str(error.value) and not capsys.readouterr().out


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RequestError, match=r"nowhere.json' cannot be read: No such file"):
        Compare(tmp_path / "nowhere.json", tmp_path)()
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(RequestError, match="are not JSON"):
        compare.load(tmp_path / "latin.json")


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan])
def test_thresholds(threshold, files):
    with pytest.raises(RequestError, match="at least 0 and less than 1"):
        Compare(*files([PACKED], [PACKED]), threshold=threshold)()
