"""The measuring commands, on a few prompts: what they print and write, not how fast anything is."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rollflow import methods
from rollflow.bench import contenders, figures, intervals, ledger_cost, probes, prompt_sets, tables, throughput
from rollflow.bench.compare import Compare
from rollflow.bench.contenders import Contender
from rollflow.bench.overhead import Overhead
from rollflow.bench.preview_quality import Preview
from rollflow.bench.rows import KEY, Rows
from rollflow.bench.scaling import Scaling
from rollflow.bench.stand_ins import reward_named
from rollflow.bench.study import Study
from rollflow.bench.throughput import Throughput
from rollflow.errors import RequestError
from rollflow.models.world import target_counts
from rollflow.profile.accounts import overlap

pytestmark = pytest.mark.usefixtures("little_garbage")


@pytest.fixture
def one_core():
    """There is then no choice of lanes that would be timed, and no thread that waits for another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def study(out, **options):
    return Study(**{"budgets": (14,), "sets": ("easy",), "prompts": 2, "out": out, **options})


def test_study(tmp_path, capsys):
    chosen = ("base, 10 steps", "BoN, 3 steps", "rbf", "psp")
    study(tmp_path, methods=chosen, seeds=2)()
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "methods.json").read_text())
    assert {"date", "commit", "torch", "device"} <= report["environment"].keys()
    expected = {
        (c.label, p) for c in contenders.CONTENDERS if {c.label, c.method} & {*chosen} and not c.guided for p in c.paths
    }
    assert {(r["label"], r["path"]) for r in report["rows"]} == expected
    for row in report["rows"]:
        low, high = row["score_95"]
        assert 0 <= low <= row["score"] <= high <= 1 and row["seeds"] == row["prompts"] == 2
        assert row["committed_nfe"] == (10 if row["label"].startswith("base") else 14)
        assert row["label"].split(",")[0] in shown
    with (tmp_path / "methods.csv").open() as file:
        assert [r["label"] for r in csv.DictReader(file)] == [r["label"] for r in report["rows"]]
    table = (tmp_path / "methods.md").read_text().splitlines()
    assert table[2] == "| contender | path | easy, 14 |" and len(table) == 4 + len(report["rows"])
    assert all((tmp_path / f"rollover-shapes-count.{kind}").stat().st_size > 5000 for kind in ("png", "svg"))

    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(report["rows"])
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    study(tmp_path, methods=chosen, seeds=2)()  # what is there is not computed again, what is missing is
    again = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert again[:-1] == lines[:-1]
    known, computed = json.loads(lines[-1]), json.loads(again[-1])
    assert all(known[key] == computed[key] for key in known if key != "seconds")


def test_study_in_several_processes(tmp_path):
    options = {"methods": ("BoN, 3 steps", "PSP, 3 steps"), "budgets": (9, 12)}
    study(tmp_path / "one", **options)()
    study(tmp_path / "two", jobs=2, **options)()
    one, two = (
        {tuple(r[k] for k in KEY): r["rewards"] for r in Rows(tmp_path / n).rows.values()} for n in ("one", "two")
    )
    assert one == two and len(one) == 4
    assert (tmp_path / "one" / "methods-budgets-shapes-count.png").is_file()


def test_rows_of_other_prompts_or_options_are_computed_again(tmp_path, monkeypatch):
    for text in ("two red circles", "one blue square"):
        (tmp_path / "easy.txt").write_text(text)
        study(tmp_path, prompt_file=tmp_path / "easy.txt", methods=("PSP, 3 steps",))()
    monkeypatch.setattr(contenders, "CONTENDERS", (Contender("PSP, 3 steps", "psp", (contenders.ODE,), {"steps": 2}),))
    study(tmp_path, prompt_file=tmp_path / "easy.txt", methods=("PSP, 3 steps",))()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"part": "meth')  # a study that was stopped while it wrote
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(lines) == 4 and len({json.loads(line)["digest"] for line in lines[:3]}) == 2
    (row,) = Rows(tmp_path).rows.values()
    assert row["fields"]["steps"] == 2


def test_a_seed_counts_once_with_its_most_prompts():
    rows = [{"seed": 0, "prompts": n} for n in (20, 100, 50)] + [{"seed": 1, "prompts": 20}]
    assert tables.by_seed(rows) == {0: rows[1], 1: rows[3]}


def test_study_of_ones_own_prompts_and_reward(tmp_path):
    (tmp_path / "mine.txt").write_text("two red circles\n\none blue square\n")
    study(tmp_path, prompt_file=tmp_path / "mine.txt", methods=("PSP, 3 steps",), reward="soft_count")()
    (row,) = json.loads((tmp_path / "methods.json").read_text())["rows"]
    assert row["set"] == "mine" and row["reward"] == "soft_count" and row["score"] < 0


@pytest.mark.parametrize("part", ["fidelity", "diversity"])
def test_probes(part, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 4)
    study(tmp_path, part=part, prompts=4, sets=("medium",), paths=("linear-ODE", "VP-SDE"))()
    rows = json.loads((tmp_path / f"{part}-shapes.json").read_text())["rows"]
    assert (tmp_path / f"{part}-shapes.png").is_file() and (tmp_path / f"{part}-shapes.svg").is_file()
    if part == "fidelity":
        assert 0 <= probes.trusted_from(rows) <= 1
        assert all(-1 <= row["pearson"] <= 1 and row["prompts"] <= 4 for row in rows)
        last = [row["pearson"] for row in rows if row["path"] == "linear-ODE"][-1]
        assert last > 0.5  # under the ODE the last step but one is nearly the image
    else:
        far = {(row["path"], row["point"]): row["rms"] for row in rows}
        assert far["linear-ODE", "last"] == 0 < far["VP-SDE", "first"] < far["VP-SDE", "last"]


def test_rewards_are_trusted_from_where_they_correlate_to_the_end():
    rows = [
        {"path": contenders.ODE, "level": i, "linear_time": 1 - i / 5, "pearson": value}
        for i, value in enumerate([0.2, 0.6, 0.4, 0.7, 0.9])
    ]
    assert probes.trusted_from(rows) == pytest.approx(0.4) and probes.trusted_from(rows, 0.95) == 0
    assert probes.trusted_from(rows, 0.1) == 1


def test_variants(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "SOLVERS", contenders.SOLVERS[:2])
    monkeypatch.setattr(contenders, "NOISES", contenders.NOISES[:1])
    for part, count in (("solvers", 2), ("noise", 1)):
        study(tmp_path, part=part, paths=("VP-SDE",))()
        assert len(json.loads((tmp_path / f"{part}.json").read_text())["rows"]) == count
        assert (tmp_path / f"{part}.png").is_file()


def test_path_figures(tmp_path):
    study(tmp_path, part="paths")()
    assert all(
        (tmp_path / f"{name}.{kind}").is_file() for name in ("log-snr", "trajectories") for kind in ("png", "svg")
    )


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_trajectories_end_on_the_mixture(name):
    ends, tracks = figures.trajectories(name, 0.0)
    means = np.array([part[:2] for part in figures.MIXTURE])
    distance = np.linalg.norm(ends[:, None] - means, axis=2).min(1)
    assert np.mean(distance < 4 * 0.25) > 0.99 and tracks.shape == (figures.TRAJECTORIES, figures.FINE + 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": ("simple",)}, "easy, medium, hard"),
        ({"methods": ("RBFF",)}, "no contender 'RBFF': choose labels"),
        ({"paths": ("VP",)}, "no path 'VP': choose from linear-ODE"),
        ({"budgets": ()}, "at least 1 each"),
        ({"jobs": 0}, "at least 1 each"),
        ({"out": Path("/proc/nowhere")}, "cannot be written to"),
        ({"prompt_file": Path("nowhere.txt")}, "cannot be read"),
    ],
)
def test_studies_that_cannot_be_done(options, message, tmp_path):
    with pytest.raises(RequestError, match=message):
        study(**{"out": tmp_path, **options})()


def test_contenders_exist_and_differ():
    assert len(contenders.by_label()) == len(contenders.CONTENDERS)
    assert {c.method for c in contenders.CONTENDERS} <= set(methods.names())
    assert {contenders.OURS, *contenders.QUICK} <= contenders.by_label().keys()
    for _, *sides in contenders.CLAIMS:
        assert all(path in contenders.by_label()[label].paths for label, path in sides)
    for contender in contenders.CONTENDERS:
        assert not (methods.branches(contender.method) and contenders.ODE in contender.paths)
    twice = Contender("a", "bon", (contenders.ODE,), {"steps": 3}).fields(contenders.ODE, 9)
    assert twice == {**contenders.PATHS[contenders.ODE], "method": "bon", "nfe": 9, "options": {}, "steps": 3}


def test_gains_are_paired_by_prompt_and_seed(tmp_path):
    rows = Rows(tmp_path)
    made = {"part": "methods", "model": "m", "reward": "count", "path": "p", "set": "s", "nfe": 9, "prompts": 4}
    for label, seed, given in ((contenders.OURS, 0, [0, 0, 0, -1]), ("x", 0, [0, -1, -2, -1]), ("x", 1, [0, 0, 0, 0])):
        row = {**made, "label": label, "seed": seed, "rewards": given, "held_out": given}
        rows.rows[label, seed] = row
    (entry,) = tables.gains(rows, contenders.OURS)
    assert entry["of"] == "x" and entry["gain"] == entry["held_out_gain"] == 0.5 and entry["seeds"] == 1
    low, high = entry["gain_95"]
    assert 0 <= low < 0.5 < high <= 1


def test_claims_are_compared_where_both_sides_are_there(tmp_path):
    rows = Rows(tmp_path)
    made = {"part": "methods", "model": "m", "reward": "count", "set": "easy", "nfe": 9, "prompts": 4, "seed": 0}
    for label, path, given in (
        ("RBF", "VP-SDE", [0, 0, 0, 0]),
        ("RBF", "linear-SDE", [-1, 0, -4, 0]),
        ("SVDD", "VP-SDE", [0] * 4),
    ):
        rows.rows[label, path] = {**made, "label": label, "path": path, "rewards": given, "held_out": given}
    found = tables.claims(rows)
    assert [(e["claim"], e["of"], e["gain"]) for e in found] == [
        ("VP beats linear", "RBF, linear-SDE", 0.5), ("RBF beats the rest", "SVDD, VP-SDE", 0.0)
    ]  # fmt: skip
    lines = tables.differences(found).splitlines()
    assert lines[2] == "| VP beats linear | RBF, VP-SDE less RBF, linear-SDE | +50 [+0, +100] |"
    assert lines[3].endswith("| +0 [+0, +0] |")


@pytest.mark.usefixtures("one_core")
def test_throughput(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rollflow.bench.measure.LEAST_SECONDS", 0.01)
    monkeypatch.setattr(throughput, "SIZES", (1, 4))
    file, plot = tmp_path / "throughput.json", tmp_path / "throughput.png"
    Throughput(prompts=(2,), nfe=13, steps=2, repetitions=1, baseline_threads=1, json=file, plot=plot)()
    report = json.loads(file.read_text())
    searches = {row["contender"]: row for row in report["rows"] if "prompts" in row}
    engines = ["engine", "engine, bon", "engine, preview", "engine, preview, bon"]
    assert list(searches) == ["sequential", "diffusers", *engines]
    for name, row in searches.items():
        assert row["committed_nfe"] == (24 if name == "diffusers" else 26) and row["prompts"] == 2
        assert row["nfe_per_second"] == pytest.approx(row["committed_nfe"] / row["seconds"][0])
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"][0])
        assert 0 < row["efficiency"] < row["of_parts"] and row["executed_over_committed"] >= 1
        assert row["peak_memory_bytes"] > 2**20 and row["machine"] and row["versions"]["torch"] and row["date"]
    assert searches["engine"]["decoded"]["full"] >= 26 + 2 and searches["diffusers"]["decoded"] == {"full": 12}
    assert searches["engine, preview"]["decoded"]["preview"] >= 26 and searches["sequential"]["decoded"] == {"full": 28}
    bare = [row for row in report["rows"] if "bucket" in row]
    assert {row["contender"] for row in bare} == {f"bare {p}" for p in ("transformer", "decode", "reward", "preview")}
    best = 1 / max(row["nfe_per_second"] for row in bare if row["contender"] == "bare transformer")
    row = searches["engine"]
    assert row["efficiency"] == pytest.approx(26 * best / row["seconds"][0], rel=1e-6)
    assert all(0 <= searches[name]["reward_overlap"] <= 1 for name in engines)
    assert plot.stat().st_size > 10_000 and "sequential" in capsys.readouterr().out
    Compare(file, file)()  # every row is known by its keys, and nothing got worse


def test_overlap_is_the_share_of_the_time_of_some_spans_in_which_others_ran():
    reward, forward = np.array([[0, 4], [6, 8], [9, np.nan]]), np.array([[1, 2], [1.5, 3], [7, 20], [np.nan, np.nan]])
    assert overlap(reward, forward) == pytest.approx((2 + 1) / (4 + 2))
    assert overlap(np.array([[0.0, 1]]), np.zeros((0, 2))) == 0
    assert overlap(np.zeros((0, 2)), np.array([[0.0, 1]])) is None


def test_a_reward_of_the_cost_of_clip_in_several_processes():
    one = reward_named("clip-sized", "cpu", torch.float32, 24)
    images = torch.rand(2, 3, 40, 40)
    assert one is reward_named("clip-sized", "cpu", torch.float32, 24)
    assert one(images, ["a"] * 2).shape == (2,) and one(images, ["a"] * 2).std() > 0


def test_preview_quality(tmp_path, capsys):
    file = tmp_path / "preview.json"
    Preview(sets=("medium",), methods=("bon",), prompts=3, nfe=10, json=file)()
    (row,) = json.loads(file.read_text())["rows"]
    assert row["difference"][0] == pytest.approx(row["preview"] - row["full"])
    assert row["difference"][1] <= row["difference"][0] <= row["difference"][2]
    assert "bon" in capsys.readouterr().out


@pytest.mark.usefixtures("one_core")
def test_scaling_and_overhead(tmp_path, capsys):
    file = tmp_path / "scaling.json"
    Scaling(prompts=(1, 3), nfe=12, repetitions=1, json=file)()
    one, three = json.loads(file.read_text())["rows"]
    assert (one["prompts"], three["prompts"]) == (1, 3)
    assert three["milliseconds_per_nfe"] == pytest.approx(1000 * three["seconds"][0] / 36)
    Overhead(live=(2, 5), nfe=12, requests=150, pairs=2, prompts=1, json=file)()
    report = json.loads(file.read_text())
    assert [row["prompts"] for row in report["rows"]] == [2, 5]
    assert all(row["executed"] >= 12 * row["prompts"] for row in report["rows"])
    assert [point["requests"] for point in report["memory"]] == [100, 150]
    told, cost = capsys.readouterr().out, report["ledger"]
    assert "us/row" in told and "the ledger's tables cost" in " ".join(told.split())
    assert cost["predicted"].keys() == {"microseconds_per_row", "share_of_wall_time", "microseconds_per_range"}
    assert cost["free model"]["microseconds_per_row"]["count"] == cost["shapes"]["share"]["count"] == 2
    assert cost["shapes"]["milliseconds_per_row"] > 0 < cost["nvtx"]["share"] and cost["nvtx"]["ranges_per_row"] > 0


def test_what_the_ledger_costs_is_measured_in_pairs_of_changing_order():
    asked = []

    def run(on):
        asked.append(on)
        return (3.0 if on else 2.0) + len(asked) / 1000

    pairs = ledger_cost.in_pairs(run, 3)
    assert asked == [True, False, False, True, True, False]
    assert pairs == [(3.001, 2.002), (3.004, 2.003), (3.005, 2.006)]
    assert ledger_cost.in_microseconds(pairs)["microseconds_per_row"]["median"] == pytest.approx(999_000)
    share = ledger_cost.in_shares([(2.02, 2.0)] * 5 + [(2.2, 2.0)] * 4)
    assert share["milliseconds_per_row"] == 2000 and share["share"]["median"] == pytest.approx(0.01)
    assert share["share"]["low"] == pytest.approx(0.01) and share["share"]["high"] == pytest.approx(0.1)
    cost = {"microseconds_per_row": {"median": 10.0, "low": None, "high": 20.0, "count": 9}}
    most = ledger_cost.at_most(cost, 5.0)["share_at_most"]
    assert most == {"median": pytest.approx(0.002), "low": None, "high": pytest.approx(0.004), "count": 9}


def test_the_prompt_sets_are_100_different_readable_prompts():
    everything = [prompt for name in prompt_sets.SETS for prompt in prompt_sets.load(name)]
    assert len(everything) == len(set(everything)) == 300
    for name, (least, most) in prompt_sets.SETS.items():
        assert all(least <= target_counts(prompt).sum() <= most for prompt in prompt_sets.load(name))


def test_the_readme_shows_the_committed_results():
    root = Path(__file__).parents[1]
    readme, results = (root / "README.md").read_text(), root / "bench" / "results"
    study = {
        name: json.loads((results / "study" / f"{name}.json").read_text())["rows"] for name in ("methods", "claims")
    }
    shown = [e for e in study["methods"] if e["model"] == "shapes" and e["reward"] == "count"]
    assert tables.grid([e for e in shown if e["nfe"] == 100 or e["label"] in contenders.FIXED]) in readme
    claims = [e for e in study["claims"] if e["model"] == "shapes" and e["nfe"] == 100 and e["reward"] == "count"]
    assert tables.differences(claims) in readme
    rows = json.loads((results / "throughput.json").read_text())["rows"]
    assert throughput.markdown(rows) in readme


def test_intervals():
    low, high = intervals.wilson(np.array([1.0] * 50 + [0.0] * 50))
    assert (low, high) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))
    low, high = intervals.bootstrap(np.random.default_rng(0).choice([0.0, 1.0], 1000))
    half = 1.96 * 0.5 / math.sqrt(1000)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert intervals.bootstrap([0.25, 0.25]) == (0.25, 0.25)
    assert intervals.sign_test([0.5, 1, 1, 1, 0, 0]) == pytest.approx(0.125) and intervals.sign_test([0, 0]) == 1
