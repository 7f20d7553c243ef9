"""`rollflow study` on a pipeline and with a reward of one's own."""

import json

import pytest
from tiny_video import VIDEO

from rollflow.bench import probes, tables
from rollflow.bench.rows import Job, Rows, digest, engine_of
from rollflow.bench.study import Study
from rollflow.cli import commands as cli
from rollflow.errors import RequestError
from rollflow.models import Traits, traits
from rollflow.models.known import FILE

pytestmark = pytest.mark.usefixtures("one_thread")

SCORES = """
def redness(images, prompts):
    assert images.shape[1:] == (9, 3, 64, 96)
    return images[..., 0, :, :].flatten(1).mean(1) - images[..., 1:, :, :].flatten(1).mean(1)

def count(images, prompts):
    return 0 * redness(images, prompts)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline of clips, a reward in a file, and prompts."""
    folder = tmp_path_factory.mktemp("study")
    VIDEO["LTXPipeline"].build().save_pretrained(folder / "ltx")
    (folder / "scores.py").write_text(SCORES)
    (folder / "mine.txt").write_text("a red cat\na dog that runs\n")
    yield folder
    engine_of.cache_clear()


def given(place, out, name="redness"):
    return {
        "model": place / "ltx", "reward": f"{place / 'scores.py'}:{name}", "height": 64, "width": 96, "frames": 9,
        "prompt-file": place / "mine.txt", "paths": "linear-ODE", "out": out,
    }  # fmt: skip


def study(part, **options):
    flags = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    return cli.main(["study", part, *flags])


def test_fidelity_of_a_reward_of_a_file_on_clips_of_a_size(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(probes, "STEPS", 3)
    monkeypatch.setattr(probes, "PATHS_A_PROMPT", 4)
    file = place / "ltx" / FILE
    try:
        assert study("fidelity", **given(place, tmp_path), traits=file) == 0
        assert json.loads(file.read_text())["measured"] == {
            "model": "ltx", "reward": "redness", "prompts": 2, "points": 3,
        }  # fmt: skip
        assert traits(place / "ltx").steps == Traits().steps
    finally:
        file.unlink(missing_ok=True)
    rows = json.loads((tmp_path / "fidelity-ltx.json").read_text())["rows"]
    assert [(row["reward"], row["set"], row["level"]) for row in rows] == [("redness", "mine", i) for i in range(2)]
    assert "reward redness, path linear-ODE" in " ".join(capsys.readouterr().out.split())


def test_methods_with_a_reward_of_a_file(place, tmp_path, capsys):
    options = {**given(place, tmp_path), "budgets": 6, "methods": "BoN, 3 steps"}
    assert study("methods", **options) == 0
    (row,) = Rows(tmp_path).rows.values()
    assert (row["reward"], row["model"], row["fields"]["frames"]) == ("redness", "ltx", 9)
    (entry,) = tables.pooled(Rows(tmp_path), "methods")
    assert f"{entry['score']:.4g}" in capsys.readouterr().out


def test_two_rewards_of_one_name_are_two():
    key = {"reward": "redness"}
    one, two = (Job(key, "m", ["a"], {}, f"{file}.py:redness") for file in ("one", "two"))
    assert digest(one) != digest(two)


def test_a_reward_of_ones_own_that_is_called_as_a_built_in_is_no_share(place, tmp_path):
    own = Study(reward=given(place, tmp_path, "count")["reward"])
    assert own._judge == "own-count" not in tables.SHARES and Study()._judge == "count"


@pytest.mark.parametrize(("name", "value"), [("height", 0), ("frames", -1)])
def test_a_size_that_is_none_is_found_before_any_work(tmp_path, name, value):
    with pytest.raises(RequestError, match=f"{name}={value}"):
        Study("fidelity", out=tmp_path, **{name: value})()
    assert not [*tmp_path.iterdir()]


def test_means_of_rewards_are_told_apart():
    entry = {"reward": "redness", "score": 0.028071, "score_95": (0.02777, 0.02825), "held_out": float("nan")}
    assert tables.shown(entry) == "0.02807 [0.02777, 0.02825]"
    assert tables._difference({"reward": "redness", "gain": 0.00031, "gain_95": (-0.0002, 0.0011)}) == (
        "+0.00031 [-0.0002, +0.0011]"
    )
