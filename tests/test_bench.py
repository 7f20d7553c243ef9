"""The measuring commands, on a few prompts: what they print and write, not how fast anything is."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rollflow.bench import prompt_sets, study
from rollflow.bench.study import Study
from rollflow.bench.throughput import Throughput
from rollflow.errors import RequestError
from rollflow.shapes import target_counts


def test_study(tmp_path, capsys):
    file = tmp_path / "study.json"
    made = Study(quick=True, prompts=2, nfe=20, sets=("easy",), json=file, markdown=tmp_path / "study.md")
    made.run()
    shown, report = capsys.readouterr().out, json.loads(file.read_text())
    assert [(r["method"], r["path"]) for r in report["rows"]] == list(made.rows())
    for method in ("base", "BoN", "SVDD", "RBF"):
        assert method in shown
    assert {"date", "commit", "torch", "device"} <= report["environment"].keys()
    for row in report["rows"]:
        low, high = row["accuracy_95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert row["committed_nfe"] == {"base": 10, "base, 1 step": 1, "BoN, 3 steps": 18}.get(row["method"], 20)
    assert report["rows"][0]["gain"] == 0
    assert (tmp_path / "study.md").read_text().splitlines()[2].startswith("| base | linear-ODE | ")


def test_throughput(tmp_path, capsys):
    file = tmp_path / "throughput.json"
    Throughput(prompts=2, nfe=13, repetitions=1, json=file).run()
    packed, single = json.loads(file.read_text())["rows"]
    assert (packed["contender"], single["contender"]) == ("packed", "one by one")
    assert packed["committed_nfe"] == single["committed_nfe"] == 26
    assert packed["nfe_per_second"] == pytest.approx(26 / packed["seconds"][0])
    assert sum(packed["span_seconds_of_last"].values()) == pytest.approx(packed["seconds"][0])
    assert "packed costs" in capsys.readouterr().out


def test_the_readme_shows_the_committed_results():
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text()
    results = root / "bench" / "results"
    assert study.markdown(json.loads((results / "study-quick.json").read_text())["rows"]) in readme
    ratio = json.loads((results / "throughput.json").read_text())["packed_over_one_by_one"]
    assert f"cost {ratio:.2f} of the wall time" in readme


def test_unknown_sets_are_refused():
    with pytest.raises(RequestError, match="easy, medium, hard"):
        Study(sets=("simple",)).run()


def test_the_prompt_sets_are_100_different_readable_prompts():
    everything = [prompt for name in prompt_sets.SETS for prompt in prompt_sets.load(name)]
    assert len(everything) == len(set(everything)) == 300
    for name, (least, most) in prompt_sets.SETS.items():
        assert all(least <= target_counts(prompt).sum() <= most for prompt in prompt_sets.load(name))


def test_intervals():
    low, high = study._wilson(np.array([1.0] * 50 + [0.0] * 50))
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    low, high = study._paired(np.random.default_rng(0).choice([0.0, 1.0], 1000))
    half = 1.96 * 0.5 / math.sqrt(1000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
