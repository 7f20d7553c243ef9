"""Two versions in turns: here one version, held against itself."""

import json
import re
import sys

import pytest

from rollflow.bench import versus
from rollflow.bench.__main__ import main
from rollflow.bench.versus import _row


def test_a_version_against_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of both processes, for which a second thread mostly waits
    file = tmp_path / "versus.json"
    side = tmp_path / "side.py"  # it measures the host's work over thousands of rows
    less = re.sub(r"LEAST_ROWS = \d+", "LEAST_ROWS = 100", versus.SIDE.read_text())
    side.write_text(re.sub(r"BUCKETS = \(.*?\)", "BUCKETS = (4,)", less).replace("range(1, 33)", "(4,)"))
    monkeypatch.setattr(versus, "SIDE", side)
    small = ["--live", "2", "--prompts", "1", "--methods", "bon", "--nfe", "20", "--repetitions", "1", "--lanes", "1"]
    code = main(["versus", sys.executable, *small, "--threshold", "9", "--json", str(file)])
    assert code == 0, capsys.readouterr()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["command"], row["prompts"], row["preview"]) for row in rows] == [
        ("overhead", 2, False), ("throughput", 1, False), ("throughput", 1, True),
    ]  # fmt: skip
    for row in rows:
        assert row["before"] > 0 and 0 < row["least"] <= row["ratio"] <= row["greatest"]


def test_the_ratio_is_the_median_of_neighbours():
    asked = {"command": "overhead", "method": "bon", "prompts": 1, "nfe": 9, "preview": False}
    row = _row(asked, [[1.0, 2.0], [10.0, 10.0], [4.0, 2.0]])
    assert (row["before"], row["after"], row["ratio"], row["least"], row["greatest"]) == (4.0, 2.0, 1.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("python", "message"), [("/nowhere/python", "cannot be started"), ("/bin/true", "cannot be measured: it ended")]
)
def test_what_cannot_be_compared(python, message, capsys):
    assert main(["versus", python]) == 2
    assert message in capsys.readouterr().err
