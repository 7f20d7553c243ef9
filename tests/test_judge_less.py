"""Rows that are not judged: those that nobody needs when they would be decoded, and what the command counts."""

import json

import pytest
import tiny

from rollflow.bench.judged import Judged
from rollflow.engine import Engine
from rollflow.errors import Cancelled
from rollflow.plan import plan
from rollflow.rewards import make
from rollflow.row import Brief, Limit, Row


class Ends(tiny.Tiny):
    """A model in the middle of whose second batch something happens."""

    def __init__(self, then):
        self.then, self.batches, self.decoded = then, 0, []

    def velocity(self, x, *given):
        self.batches += 1
        if self.batches == 2:
            self.then()
        return super().velocity(x, *given)

    def decode(self, latents):
        self.decoded.append(len(latents))
        return super().decode(latents)


class Large(tiny.Tiny):
    """Images as large as those that the reward `count` reads."""

    def geometry(self, height=None, width=None):
        return super().geometry(height or 64, width or 64)


def test_rows_of_a_search_that_ended_during_their_forward_are_not_decoded():
    jobs = []

    def cancel():
        jobs[0].cancel()
        engine.stats()
        engine.stats()  # the loop has dealt with it

    with tiny.engine(model := Ends(cancel)) as engine:
        jobs.append(engine.submit(tiny.bon(32, method="svdd", steps=4)))
        with pytest.raises(Cancelled):
            jobs[0].result(tiny.PATIENCE)
        tiny.ended(jobs[0])
        assert model.batches == 2 and len(model.decoded) == 2  # the first batch's, and the best so far's
        rows, batches = engine.ledger.table("rows"), engine.ledger.table("batches")
        second = batches["batch"][batches["work"] == 0][1]
        assert rows["scored"][rows["batch"] == second].sum() == 0 == batches["judged"][batches["batch"] == second].sum()
        assert engine.ledger.unjudged == 8


def test_a_row_is_wanted_below_its_limit():
    brief = Brief(0, "a", tiny.SIZE, 0, 1.0, None, make(tiny.brightness))
    row = Row(brief, 0, 0, 0, 0, plan(tiny.rbf()).steps[0], child=2, limit=(limit := Limit(3)))
    assert row.wanted and not row._replace(scored=False).wanted and row._replace(limit=None).wanted
    limit.children = 2
    assert not row.wanted


def test_the_command_counts_what_is_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "from_pretrained", lambda model, **options: tiny.engine(Large(), **options))
    chosen = ("bon", "evosearch", "rbf")
    Judged(methods=chosen, budgets=(20,), json=tmp_path / "judged.json")()
    report = json.loads((tmp_path / "judged.json").read_text())
    found = {(row["method"], row["finish"]): row for row in report["rows"]}
    assert found.keys() == {(name, finish) for name in chosen for finish in (0, 2)}
    for row in report["rows"]:
        assert row["rows"] >= row["asked"] == row["judged"] + row["decide_nothing"] + row["not_needed"]
    assert [found["rbf", finish]["decide_nothing"] for finish in (0, 2)] == [0, 2 * 9]  # one child a level, the finish
    assert [found[name, 2]["decide_nothing"] for name in ("bon", "evosearch")] == [2, 2]  # the finish of each prompt
    shown = capsys.readouterr().out
    assert all(name in shown for name in chosen)
