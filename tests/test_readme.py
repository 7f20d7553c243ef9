"""The README's programs do what it says."""

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def program(marker):
    """The Python block that follows a marker."""
    return README.read_text().split(f"<!-- {marker} -->")[1].split("```python\n")[1].split("```")[0]


def test_an_asyncio_program_embeds_the_engine(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "program"}
    exec(compile(program("embed"), "README.md", "exec"), names)
    whole, preview, timed = names["results"]
    assert whole.stopped == "budget" and whole.committed_nfe == 200
    assert preview.stopped == "cancelled" and 40 <= preview.committed_nfe < 500 and Path("preview.png").stat().st_size
    assert timed.stopped in ("seconds", "budget")
    said = capsys.readouterr().out
    assert "whole: 200 NFE" in said and "done, " in said  # the last update, and the callback's job
