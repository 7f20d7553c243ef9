"""`rollflow jobs` lists what a journal holds, also while a server has it open."""

import json

import pytest

from rollflow.cli import commands as cli
from rollflow.entries import Entry, Replay
from rollflow.journal import Journal


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path) as made:
        made.accept("srch_a", {"prompt": "two red circles", "nfe": 40}, owner="me")
        made.accept("srch_b", {"prompt": "one blue square", "_fleeting": True}, key="k")
        made.accept("srch_c", {"prompt": "three"})
        made.log("srch_b", 0, Replay((Entry("committed", 0, 0.5), Entry("committed", 1, None))))
        made.finish("srch_a", {"nfe": 40, "reward": 0.123456, "improvements": [[1, 0.1, 0, 0.0]]}, b"png")
        made.fail("srch_c", "failed", {"type": "FunctionError", "message": "the judge is ill"})
        made.flush(30)
        yield tmp_path


def run(capsys, *arguments):
    code = cli.main(["jobs", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_last_come_first_as_json(journal, capsys):
    code, out, _ = run(capsys, "--journal", journal, "--json")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [one["id"] for one in found] == ["srch_c", "srch_b", "srch_a"]
    assert found[0]["error"]["message"] == "the judge is ill"
    assert found[1]["evaluated"] == 2 and found[1]["key"] == "k" and found[1]["result"] is None
    assert found[1]["request"] == {"prompt": "one blue square"}  # what a server keeps beside it is its own
    assert found[2]["result"] == {"nfe": 40, "reward": 0.123456} and found[2]["owner"] == "me"


def test_a_table_says_the_same(journal, capsys):
    code, out, _ = run(capsys, "--journal", journal, "--status", "done")
    assert code == 0 and "srch_b" not in out
    assert all(text in out for text in ("srch_a", "done", "0.1235", "two red circles", "40"))
    assert "the judge is ill" in " ".join(run(capsys, "--journal", journal, "--limit", 1)[1].split())


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--status", "over"), "accepted, done, failed, cancelled"), (("--limit", "0"), "at least 1")],
)
def test_what_cannot_be_asked_is_one_line(journal, capsys, options, message):
    code, _, complaint = run(capsys, "--journal", journal, *options)
    assert code == 2 and message in complaint and complaint.count("\n") == 1


def test_a_folder_without_a_journal_is_said(tmp_path, capsys):
    code, _, complaint = run(capsys, "--journal", tmp_path / "none")
    assert code == 2 and "cannot be used as a journal" in complaint and not (tmp_path / "none").exists()
