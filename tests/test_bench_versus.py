"""Two versions in turns: here one version, held against itself."""

import json
import sys

import pytest

from rollflow.bench import side, versus
from rollflow.bench.__main__ import main
from rollflow.bench.versus import _row

STUB = """
import json, sys
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    print(json.dumps({"overhead": 4.0, "throughput": 2.0}[json.loads(line)["command"]]), flush=True)
"""
SMALL = {"prompts": 1, "method": "bon", "nfe": 20, "lanes": 1, "model": "shapes", "preview": True}


def test_two_versions_in_turns(tmp_path, capsys, monkeypatch):
    file, stub = tmp_path / "versus.json", tmp_path / "side.py"
    stub.write_text(STUB)
    monkeypatch.setattr(versus, "SIDE", stub)
    small = ["--live", "2", "--prompts", "1", "--methods", "bon", "--nfe", "20", "--repetitions", "1", "--lanes", "1"]
    code = main(["versus", sys.executable, *small, "--json", str(file)])
    assert code == 0, capsys.readouterr()
    rows = json.loads(file.read_text())["rows"]
    assert [(row["command"], row["prompts"], row["preview"]) for row in rows] == [
        ("overhead", 2, False), ("throughput", 1, False), ("throughput", 1, True),
    ]  # fmt: skip
    for row in rows:
        assert row["before"] == {"overhead": 4.0, "throughput": 2.0}[row["command"]]
        assert row["least"] == row["ratio"] == row["greatest"] == 1


def test_what_a_side_measures(monkeypatch):
    monkeypatch.setattr(side, "BUCKETS", (4,))
    monkeypatch.setattr(side, "LEAST_ROWS", 100)
    made = side.Side()
    assert made.overhead({**SMALL, "prompts": 2}) > 0 and made.throughput(SMALL) > 0
    assert len(made._engines) == 2
    for engine in made._engines.values():
        engine.close()


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
