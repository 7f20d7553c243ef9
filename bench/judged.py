"""How many evaluated rows are decoded and judged, and how many need not be: `rollflow bench judged`.

Each method's searches run twice: with every reward that the method asks for (`judge_all`), and without those on which
nothing depends. Rows that are known not to be needed by the time that they are decoded are left out of both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rollflow import methods
from rollflow.bench import outputs, prompt_sets
from rollflow.bench.environment import environment
from rollflow.engine import Engine
from rollflow.errors import RollflowError
from rollflow.profile.records import KINDS
from rollflow.request import Request, Result

_NO_SEARCH = [KINDS.index("padding"), KINDS.index("image")]


@dataclass(frozen=True)
class Judged:
    """Counts judged rows of every method, and checks that leaving rows out changes no image.

    Attributes:
        model: which model.
        methods: search methods, with their defaults; all by default.
        budgets: evaluations of each prompt.
        finishes: steps of the finish; with one, by default, only the method's choice is finished and compared to none.
        prompts: how many searches run at a time.
        json: a file for the rows.
    """

    model: str = "shapes"
    methods: tuple[str, ...] = tuple(methods.names())
    budgets: tuple[int, ...] = (20, 100)
    finishes: tuple[int, ...] = (0, 2)
    prompts: int = 2
    json: Path | None = None

    def __call__(self) -> None:
        """Runs all methods, prints the table, writes the file."""
        outputs.check_file(self.json)
        where, console, chosen = environment(), Console(width=110), prompt_sets.load("medium", self.prompts)
        cases = [(nfe, finish, name) for nfe in self.budgets for finish in self.finishes for name in self.methods]
        with Engine.from_pretrained(
            self.model, buckets=(8,), lanes=2
        ) as engine:  # one bucket: the same bits in all batches
            rows = [self._row(engine, chosen, *case) for case in cases]
        table = Table(title=f"rows that are decoded and judged, {self.prompts} prompts at a time")
        for column in ("method", "NFE", "finish", "rows", "asked", "judged", "decide nothing", "not needed any more"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            asked = row["asked"]
            table.add_row(
                row["method"], str(row["nfe"]), str(row["finish"]), str(row["rows"]), f"{asked / row['rows']:.0%}",
                f"{row['judged'] / row['rows']:.0%}", f"{row['decide_nothing'] / asked:.1%}",
                f"{row['not_needed'] / asked:.1%}",
            )  # fmt: skip
        console.print(table)
        console.print("asked, judged: of the rows; decide nothing, not needed any more: of those asked")
        if self.json:
            self.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")

    def _row(self, engine: Engine, prompts: Sequence[str], nfe: int, finish: int, method: str) -> dict[str, Any]:
        reward = "soft_count" if methods.guided(method, {}) else "count"
        requests = [Request(p, reward, method, nfe, seed=i, finish=finish) for i, p in enumerate(prompts)]
        _, every = _run(engine, [replace(request, judge_all=True) for request in requests])
        counts, fewer = _run(engine, requests)
        if not all(_alike(a, b) for a, b in zip(every, fewer, strict=True)):
            raise RollflowError(f"{method} with nfe={nfe} and finish={finish} found other images: a fault of rollflow")
        spared = sum(_judged(result) for result in every) - sum(_judged(result) for result in fewer)
        asked = counts["judged"] + counts["not_needed"] + spared
        return {"method": method, "nfe": nfe, "finish": finish, **counts, "asked": asked, "decide_nothing": spared}


def _run(engine: Engine, requests: Sequence[Request]) -> tuple[dict[str, int], list[Result]]:
    """Runs searches; how many rows they took, of which so many were judged, or left out when it came to that."""
    engine.ledger.clear()
    found = engine.generate([*requests])
    rows = engine.ledger.table("rows")
    own = rows[~np.isin(rows["kind"], _NO_SEARCH)]
    counts = {"rows": len(own), "judged": int(own["scored"].sum()), "not_needed": engine.ledger.unjudged}
    return counts, found


def _judged(result: Result) -> int:
    """Its particles that were judged; that of an only finalist has its image's reward."""
    one = result.request.finish and not result.request.judge_all and result.history[-1].kind == "finish"
    return sum(record.reward is not None for record in result.history) - bool(one)


def _alike(a: Result, b: Result) -> bool:
    """Whether two searches made the same image in the same way."""
    ways = [[(one.level, one.parent, one.kind) for one in result.history] for result in (a, b)]
    return ways[0] == ways[1] and a.reward == b.reward and bool((a.pixels == b.pixels).all())
