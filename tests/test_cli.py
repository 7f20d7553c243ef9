"""The command line: what it writes, what it prints, and one line for everything that a user can get wrong."""

import io
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TextColumn

import rollflow
from rollflow import interpolant, methods, models, rewards, sde
from rollflow.bench import shapes_networks as networks
from rollflow.calls import Progress
from rollflow.cli import commands as cli
from rollflow.cli import options, output
from rollflow.cli.method_options import method_options

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "two red circles"
SMALL = ("--nfe", "12", "--steps", "3")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A pipeline of the built-in model's architecture with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "random"
    clip, t5 = networks.text_encoders()
    networks.pipeline(networks.autoencoder(), networks.transformer(), clip, t5).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, capsys):
    """Runs the command line on the random pipeline; returns its exit code, standard output and standard error."""

    def call(*arguments, model=model):
        code = cli.main([*map(str, arguments), *(("--model", model) if model else ())])
        return (code, *capsys.readouterr())

    return call


def test_generate_writes_an_image_and_its_record(run, tmp_path):
    out = tmp_path / "new" / "folder"
    code, printed, complaint = run(
        "generate", PROMPT, *SMALL, "--seed", "3", "--method", "rbf", "--initial", "2", "--out", out
    )
    assert (code, complaint) == (0, "")
    assert Image.open(out / "two-red-circles-seed3.png").size == (64, 64)
    record = json.loads((out / "two-red-circles-seed3.json").read_text())
    assert record["request"] == {
        **record["request"], "prompt": PROMPT, "method": "rbf", "interpolant": "vp", "nfe": 12, "seed": 3,
        "options": {"initial": 2},
    }  # fmt: skip
    assert record["committed_nfe"] == len(record["history"]) == 12 <= record["executed_nfe"]
    assert [row["parent"] for row in record["history"][:2]] == [None, None]
    assert set(record["versions"]) == {"rollflow", "torch", "diffusers"}
    for shown in ("two-red-circles-seed3.png", "12 NFE", output.number(record["reward"])):
        assert shown in printed


def test_generate_is_what_the_engine_does(run, model, tmp_path):
    options = {"method": "svdd", "nfe": 9, "steps": 3, "seed": 5, "interpolant": "linear", "finish": 1, "children": 2}
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert run("generate", PROMPT, *flags, "--out", tmp_path)[0] == 0
    expected = rollflow.Engine.from_pretrained(model, device="cpu").generate(PROMPT, **options)
    assert Image.open(tmp_path / "two-red-circles-seed5.png").tobytes() == expected.image.tobytes()


def test_several_prompts_and_names_that_would_collide(run, tmp_path):
    code, printed, _ = run("generate", PROMPT, "one red circle", "Two red circles,", *SMALL, "--out", tmp_path)
    assert code == 0
    stems = {path.stem for path in tmp_path.glob("*.png")}
    assert stems == {"two-red-circles-seed0", "one-red-circle-seed0", "two-red-circles-seed0-2"}
    assert stems == {path.stem for path in tmp_path.glob("*.json")}
    assert printed.count("reward") == 3


def test_demo(run, tmp_path):
    code, printed, complaint = run("demo", "--prompts", PROMPT, "six blue triangles", "--nfe", 12, "--out", tmp_path)
    assert (code, complaint) == (0, "")
    picture = Image.open(tmp_path / "demo.png")
    assert picture.width > 2 * output.IMAGE and picture.height > 2 * output.IMAGE
    assert str(tmp_path / "demo.png") in printed and "six blue triangles" in printed


def test_demo_prompts_fit_the_built_in_model():
    tokenizer = networks.tokenizer()
    for prompt in cli.DEMO_PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert len(ids) <= networks.TEXT_TOKENS and tokenizer.unk_token_id not in ids
        rewards.make("count").check(prompt)


WRONG = {
    "no command": ([], ["generate", "demo"]),
    "unknown command": (["paint"], ["paint", "generate", "demo"]),
    "no prompt": (["generate"], ["prompt"]),
    "empty prompt": (["generate", ""], ["prompt"]),
    "unknown flag": (["generate", PROMPT, "--hight", "64"], ["--hight", "--height"]),
    "no number": (["generate", PROMPT, "--nfe", "many"], ["--nfe", "many"]),
    "no value": (["generate", PROMPT, "--nfe"], ["--nfe"]),
    "method": (["generate", PROMPT, "--method", "x"], ["'x'", *methods.names()]),
    "reward": (["generate", PROMPT, "--reward", "x"], ["'x'", *rewards.names()]),
    "interpolant": (["generate", PROMPT, "--interpolant", "x"], ["'x'", "linear", "vp"]),
    "grid": (["generate", PROMPT, "--grid", "x"], ["'x'", *sde.GRIDS]),
    "solver": (["generate", PROMPT, "--solver", "x"], ["'x'", *sde.SOLVERS]),
    "budget of 0": (["generate", PROMPT, "--nfe", "0"], ["nfe=0"]),
    "budget too small": (["generate", PROMPT, "--nfe", "4"], ["nfe=4", "5"]),
    "demo's budget": (["demo", "--nfe", "4"], ["nfe=4", "5"]),
    "another method's option": (["generate", PROMPT, "--children", "2"], ["children", "explore"]),
    "no shapes": (["generate", "a red herring"], ["red herring", "circle"]),
    "dtype": (["generate", PROMPT, "--dtype", "int8"], ["int8", *options.DTYPES]),
    "device": (["generate", PROMPT, "--device", "abacus"], ["abacus", "cpu"]),
}


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_one_line(run, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    _one_line(run(*arguments, model=None), expected)


def test_what_the_model_cannot_do_is_one_line(run, tmp_path):
    base = ("generate", "--out", tmp_path)
    _one_line(run(*base, PROMPT, "--height", 65), ["65x64", "16"])
    _one_line(run(*base, "two red circles and one purple square"), ["does not know", "yellow"])
    (tmp_path / "empty").mkdir()
    _one_line(run(*base, PROMPT, model=str(tmp_path / "empty")), ["save_pretrained", *models.BUILT_IN])
    _one_line(run(*base, PROMPT, model=str(tmp_path / "nothing")), ["save_pretrained", *models.BUILT_IN])


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "folder", *(p for p in [Path("/proc")] if p.is_dir())):
        _one_line(run("generate", PROMPT, "--out", out), [str(out), "--out"])


def test_a_name_that_no_model_can_have_is_one_whole_line(run, tmp_path):
    for name in ("nonexist", "./nonexist", str(tmp_path / "nothing"), "a/b/c", "-/x"):
        for command in (["generate", PROMPT], ["demo"], ["probe"], ["plan"], ["study"]):
            outcome = run(*command, model=name)
            _one_line(outcome, [f"there is no model '{name}'", *models.BUILT_IN, "save_pretrained", "owner/name"])
            assert "..." not in outcome[2]
    _one_line(run("generate", PROMPT, model="shape"), ["did you mean 'shapes'?"])


def test_a_hub_id_that_cannot_be_had_is_one_whole_line(run, tmp_path):
    outcome = run("generate", PROMPT, "--out", tmp_path, model="no/such")
    _one_line(outcome, ["'no/such' cannot be loaded", "there is no such folder; from the hub: ", "save_pretrained"])
    assert "..." not in outcome[2]


@pytest.mark.parametrize("wrong", [["--nfe", "4"], ["--height", "65"], ["--reward", "x"]])
def test_a_search_that_fails_leaves_no_folder(run, tmp_path, wrong):
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new" / "folder", tmp_path / "there"):
        _one_line(run("generate", PROMPT, *wrong, "--out", out), [])
    assert [*tmp_path.iterdir()] == [tmp_path / "there"]


def test_an_interrupted_search_leaves_no_folder(run, tmp_path, monkeypatch):
    def interrupted(*_):
        assert (tmp_path / "new").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_search", interrupted)
    assert run("generate", PROMPT, *SMALL, "--out", tmp_path / "new")[0] == 130
    assert not (tmp_path / "new").exists()


def test_the_record_says_what_a_search_started_from(run, model, tmp_path):
    assert run("generate", PROMPT, *SMALL, "--out", tmp_path)[0] == 0
    image, mask = tmp_path / "two-red-circles-seed0.png", tmp_path / "mask.png"
    Image.new("L", (64, 64), 255).save(mask)
    start = ("--image", image, "--mask", mask, "--out", tmp_path / "second")
    assert run("generate", PROMPT, *SMALL, *start)[0] == 0
    request = json.loads((tmp_path / "second" / image.with_suffix(".json").name).read_text())["request"]
    assert (request["image"], request["mask"], request["strength"]) == (str(image), str(mask), 0.6)
    assert request["latents"] is None
    with rollflow.Engine.from_pretrained(model, device="cpu") as engine:
        result = engine.generate(PROMPT, nfe=3, steps=3, method="bon", latents=torch.randn(16, 32))
    assert output.record(result)["request"]["latents"] == {"shape": [16, 32]}


def _one_line(outcome, expected):
    code, printed, complaint = outcome
    assert (code, printed) == (2, "")
    assert complaint.startswith("rollflow: error: ") and complaint.count("\n") == 1 and complaint.endswith("\n")
    for part in expected:
        assert part in complaint


GROUPS = {
    "generate": [options.ModelOptions, options.SearchOptions, options.MethodOptions],
    "demo": [options.ModelOptions],
    "probe": [options.Place],
    "plan": [options.Place],
    "models": [],
    "rewards": [],
    "fetch": [],
    "profile": [options.ModelOptions, options.SearchOptions, options.MethodOptions],
    "profile-diff": [],
    "what-if": [],
    "study": [],
    "serve": [options.ModelOptions],
    "jobs": [],
    "bench": [],
}

POSITIONAL = {"profile-diff": ("before", "after", "a", "b"), "what-if": ("recording",)}


def test_every_command_has_a_help():
    assert cli.commands().keys() == GROUPS.keys()


def test_the_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"• {command} " in text for command in GROUPS)


@pytest.mark.parametrize("command", GROUPS)
def test_help_is_complete(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    groups = [cli.commands()[command], *GROUPS[command]]
    for option in (f for group in groups for f in fields(group)):
        nested = option.name in ("search", "runtime", "place", "part", "own", "arguments")
        positional = option.name in POSITIONAL.get(command, ("prompts", "names", "name"))
        if not nested and (not positional or command == "study"):
            name = option.name.replace("_", "-")
            assert f"--{name} " in text or f"--{name}, --no-{name} " in text
    named = [*models.BUILT_IN, *options.DTYPES] if GROUPS[command] else []
    if command == "bench":
        named += ["throughput", "latency", "compare"]
    if command == "generate":
        named += [*rewards.names(), *methods.names(), *interpolant._NAMED, *sde.GRIDS, "model", *sde.SOLVERS]
    for name in named:
        assert name in text


def test_every_option_of_every_method_can_be_given():
    own = {option for name in methods.names() for option in methods.options_of(name)}
    assert {field.name for field in fields(options.MethodOptions)} == own
    assert not own & {field.name for field in fields(rollflow.Request)}


def test_options_of_methods_say_whose_they_are_and_what_they_are_by_default():
    told = {field.name: get_args(field.type)[1] for field in fields(options.MethodOptions)}
    for option, meaning, default in (
        ("block", "code: levels a block.", "2"),
        (
            "elites",
            "ses: the candidates that the next generation is drawn around",
            "2 for evosearch and sprout, 3 for ses",
        ),
        ("resampling", 'das, fk, smc: "multinomial", "systematic"', "systematic"),
        ("initial", "threshold: samples of the prior", "the method's own choice"),
        ("first", "sprout: the first point of the grid that is judged", "what is known of the model"),
    ):
        assert meaning in told[option].help and told[option].help_behavior_hint == f"(default: {default})"


def test_a_new_method_needs_no_line_in_the_command_line(monkeypatch):
    def mine(nfe, steps, depth: int = 3, name: str | None = None):
        """Mine.

        Args:
            nfe: the budget.
            steps: the grid.
            depth: how deep it
                goes. It may go deeper.
            name: of it.
        """

    monkeypatch.setitem(methods._METHODS, "mine", mine)
    made = {field.name: field for field in fields(method_options())}
    kind, told = get_args(made["depth"].type)
    assert set(get_args(kind)) == {int, type(None)} and made["depth"].default is None
    assert told.help == "mine: how deep it goes." and told.help_behavior_hint == "(default: 3)"
    assert set(get_args(get_args(made["name"].type)[0])) == {str, type(None)}


def test_seconds_are_a_budget(run, tmp_path):
    request = options.SearchOptions(seconds=2.0, finish=2).request(PROMPT)
    assert (request.seconds, request.nfe) == (2.0, None)
    enough = ("--seconds", 3600, "--nfe", 6, "--method", "bon", "--steps", 3, "--out", tmp_path)
    code, printed, complaint = run("generate", PROMPT, *enough)
    assert (code, complaint) == (0, "") and "6 NFE" in printed


def test_without_a_number_of_evaluations_the_bar_counts_alone():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with RichProgress(TextColumn("{task.fields[count]}"), console=console) as shown:
        bar = output.Bar(shown)
        bar.start(None)
        bar.update(Progress((20, 17), (-1.0, 0.0)))
    assert "37 NFE" in screen.getvalue() and "/" not in screen.getvalue()


def test_defaults_are_those_of_a_request():
    assert options.SearchOptions().request(PROMPT) == rollflow.Request(PROMPT)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rollflow {rollflow.__version__}\n"


def test_interrupt(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["generate", PROMPT]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_progress_counts_evaluations_and_shows_the_best_reward():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with RichProgress(TextColumn("{task.fields[count]} {task.fields[best]}"), console=console) as shown:
        bar = output.Bar(shown)
        bar.start(40)
        bar.update(Progress((5, 0), (-2.0, float("-inf"))))
        bar.update(Progress((20, 17), (-1.0, 0.0)))
    assert "37/40 NFE mean best reward -0.5" in screen.getvalue()


def test_scores_are_printed_plainly():
    shown = [output.number(x) for x in (-0.0, -0.001, 12.55, 0.028071, 0.028068, 12345.67, None, float("nan"))]
    assert shown == ["0", "-0.001", "12.55", "0.02807", "0.02807", "12345.7", "-", "-"]
    assert output.number(0.02807) != output.number(0.02803)


def test_as_a_process_it_is_quiet_and_starts_without_torch(model, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # there is then no choice of lanes that would be timed
    light = "import sys, rollflow.cli.commands as c; c.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", light, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "generate" in done.stdout
    wrong = ["generate", PROMPT, "--model", "nonexist"]
    done = subprocess.run([sys.executable, "-c", light, *wrong], capture_output=True, text=True)
    assert done.returncode == 0 and "there is no model 'nonexist'" in done.stderr
    command = [sys.executable, "-m", "rollflow", "generate", PROMPT, *SMALL, "--model", model, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "two-red-circles-seed0.png").is_file()
