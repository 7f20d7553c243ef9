"""`rollflow profile` and `rollflow what-if`: what they write and say, and one line for what cannot be."""

import gzip
import json

import pytest
from PIL import Image

from rollflow import RequestError
from rollflow.cli import commands
from rollflow.cli.options import SearchOptions
from rollflow.cli.profiling import read_requests
from rollflow.profile.recording import Recording

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """A folder that the command wrote."""
    folder = tmp_path_factory.mktemp("profile")
    lines = [
        {"prompt": "two red circles", "method": "rbf", "nfe": 20, "options": {"initial": 4}},
        {"prompt": "one blue square", "method": "bon", "nfe": 10, "steps": 5, "seed": 3, "at": 0.05},
        {"prompt": "three green triangles"},
    ]
    (folder / "requests.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    arguments = ["--requests", str(folder / "requests.jsonl"), "--nfe", "24", "--out", str(folder / "out")]
    assert commands.main(["profile", *arguments, "--usd-per-hour", "3"]) == 0
    return folder / "out"


def test_what_is_written(profiled):
    recording = Recording.load(profiled)
    requests = recording.requests
    assert sorted(requests["method"]) == ["bon", "rbf", "sprout"] and sorted(requests["nfe"]) == [10, 20, 24]
    assert set(requests["state"]) == {2} and recording.about["model"] == "shapes"
    assert recording.specs[int(requests["request"][requests["method"] == "rbf"][0])]["options"]["initial"] == 4
    assert json.loads(gzip.decompress((profiled / "trace.json.gz").read_bytes()))["traceEvents"]
    page = (profiled / "report.html").read_text()
    assert "decode 0.5x" in page and "two red circles" in page
    looks = recording.about["looks"]
    assert sum(look["final"] for look in looks) == 3
    for look in looks:
        with Image.open(profiled / look["file"]) as image:
            assert image.size == (64, 64)
        assert recording.begin <= look["seconds"] <= recording.end and 0 < look["nfe"] <= 24


def test_what_if_and_diff_of_it(profiled, capsys, tmp_path):
    file = tmp_path / "rows.json"
    assert commands.main(["what-if", str(profiled), "--decode", "0.5x", "--prompts", "6", "--json", str(file)]) == 0
    assert "6 prompts, decode 0.5x" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["as recorded", "6 prompts, decode 0.5x"]
    assert commands.main(["what-if", str(profiled), "--rate", "1", "--p95", "60"]) == 0
    assert "enough" in capsys.readouterr().out
    assert commands.main(["profile", "diff", str(profiled), str(profiled)]) == 0


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("profile",), "give either prompts, in quotes, or a file of requests"),
        (("profile", "a", "--requests", "x.jsonl"), "give either prompts, in quotes, or a file of requests"),
        (("profile", "a", "--repetitions", "0"), "--repetitions 0: everything runs at least once"),
        (("profile", "--requests", "missing.jsonl"), "--requests 'missing.jsonl': it cannot be read"),
        (("what-if",), "give the folder of a recording"),
        (("what-if", "nowhere"), "'nowhere' holds no recording"),
        (("what-if", "nowhere", "--decode", "fast"), "--decode 'fast': it must be a factor of its time, such as 0.5x"),
    ],
)
def test_wrong_options_are_one_line(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.main(arguments) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{", "line 2: Expecting"),
        ('["a"]', 'line 2: a request is an object with a prompt, such as {"prompt": "two red circles", "nfe": 200}'),
        ('{"prompt": "a", "colour": 1}', "line 2: unknown field 'colour': there are prompt, at, options, "),
        ('{"prompt": "a", "at": -1}', "line 2: at=-1: it must be seconds from 0 on"),
        ('{"prompt": "a", "options": 3}', "line 2: options=3: they must be an object"),
    ],
)
def test_a_line_that_is_no_request_is_named(line, expected, tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(RequestError, match=expected.replace("(", r"\(").replace("{", r"\{")):
        read_requests(file, SearchOptions())


def test_requests_of_a_file_come_in_their_order(tmp_path):
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "late", "at": 7.5}\n{"prompt": "early", "at": 2, "nfe": 7}\n')
    found = read_requests(file, SearchOptions(nfe=50))
    assert [(when, one.prompt, one.nfe) for when, one in found] == [(0.0, "early", 7), (5.5, "late", 50)]
    file.write_text("\n")
    with pytest.raises(RequestError, match="there is no request in it"):
        read_requests(file, SearchOptions())
