"""Files that cannot be written or read: one line and exit code 2, before any work."""

import json

import pytest

from rollflow.bench import __main__ as bench
from rollflow.bench.rows import KEY, Rows
from rollflow.bench.study import Study
from rollflow.cli import main
from rollflow.errors import RequestError

ROW = {
    **dict.fromkeys(KEY, "a"), "fields": {}, "digest": "d", "rewards": [0.0], "held_out": [None], "committed_nfe": 1,
    "executed_nfe": 1, "nfe_by_level": [1.0], "seconds": 1.0,
}  # fmt: skip


def refused(run, capsys, program):
    assert run() == 2
    out, said = capsys.readouterr()
    assert not out and said.startswith(f"{program}: error: ") and said.count("\n") == 1 and len(said) < 600
    return said


@pytest.mark.parametrize("command", ["throughput", "scaling", "overhead", "preview", "kernels"])
def test_results_that_cannot_be_written(command, tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nowhere" / "x.json"):
        said = refused(lambda path=path: bench.main([command, "--json", str(path)]), capsys, "rollflow.bench")
        assert "cannot be written" in said and "choose another --json" in said


def test_plots_that_cannot_be_written(tmp_path, capsys):
    for path, why in ((tmp_path, "must end in .png"), (tmp_path / "no" / "x.png", "cannot be written")):
        assert why in refused(
            lambda path=path: bench.main(["throughput", "--plot", str(path)]), capsys, "rollflow.bench"
        )


def test_folders_that_are_files(tmp_path, capsys):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file")
    assert "choose another --out" in refused(lambda: bench.main(["gpu", "--device", "cpu", "--out", out]), capsys,
                                             "rollflow.bench")  # fmt: skip
    for arguments in (["generate", "two red circles"], ["demo"], ["study", "methods"]):
        said = refused(lambda arguments=arguments: main([*arguments, "--out", out]), capsys, "rollflow")
        assert "choose another --out" in said


def test_images_whose_names_are_folders(tmp_path, capsys):
    (tmp_path / "two-red-circles-seed0.json").mkdir()
    said = refused(lambda: main(["generate", "two red circles", "--out", str(tmp_path)]), capsys, "rollflow")
    assert "two-red-circles-seed0.json' is a folder" in said


@pytest.mark.parametrize("line", [b"3", b"[]", b"{}", b'{"part": 1}', b"\xff\xfe", b"[" * 100_000,
                                  json.dumps({**ROW, "rewards": 3}).encode(), json.dumps({**ROW, "set": [1]}).encode()],
                         ids=range(8))  # fmt: skip
def test_rows_that_are_none(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + line + b"\n")
    with pytest.raises(RequestError, match=r"line 2 of .* is no row of a study: take it out") as kept:
        Rows(tmp_path)
    assert len(str(kept.value)) < 600


def test_a_row_that_was_not_written_to_its_end_is_left_out(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:40])
    rows = Rows(tmp_path)
    assert [*rows.rows.values()] == [ROW]
    monkeypatch.setattr("rollflow.bench.rows._computed", lambda jobs, workers: [{**ROW, "label": "b"}])
    assert [row["label"] for row in rows.run([])] == ["b"]
    assert len(Rows(tmp_path).rows) == 2 and len(file.read_text().splitlines()) == 3


def test_prompt_files_that_hold_no_prompts(tmp_path):
    for name, content, why in (
        ("latin", b"r\xf6te Kreise\n", "cannot be read"),
        ("empty", b" \n\n", "there is no prompt"),
        ("strange", b"two red\x00 circles\n", "is no text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match=why):
            Study(prompt_file=tmp_path / name, out=tmp_path / "out")()
    with pytest.raises(RequestError, match="cannot be read"):
        Study(prompt_file=tmp_path, out=tmp_path / "out")()
    assert not (tmp_path / "out").exists()
