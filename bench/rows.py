"""The rows of a study: what one contender did with one prompt set, kept in a file so that a study can resume."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rollflow.engine import Engine
from rollflow.request import Request, Result

Row = dict[str, Any]
KEY = ("part", "model", "reward", "label", "path", "set", "nfe", "seed", "prompts")


class Rows:
    """Rows in `folder/rows.jsonl`; a row that is there already is not computed again.

    A row holds its key (`KEY`), the requests' fields, and for each prompt the reward and the held-out score; the
    committed and executed evaluations and the seconds of all prompts together; and the evaluations at each level.
    """

    def __init__(self, folder: Path):
        self.file = folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        self.rows: dict[tuple, Row] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            self.rows[_key(row)] = row

    def run(self, engine: Engine, key: Row, prompts: Sequence[str], fields: dict[str, Any]) -> Row:
        """The row of a key: from the file, or by running one request a prompt, all of them together."""
        key = {**key, "prompts": len(prompts)}
        if _key(key) not in self.rows:
            base = 1000 * key["seed"]
            start = time.perf_counter()
            results = engine.generate(
                [Request(p, reward=key["reward"], seed=base + i, **fields) for i, p in enumerate(prompts)]
            )
            row = {**key, "fields": fields, **summary(results), "seconds": time.perf_counter() - start}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.rows[_key(row)] = row
        return self.rows[_key(key)]


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def summary(results: Sequence[Result]) -> Row:
    """Scores of each prompt and costs of all."""
    levels: Counter[int] = Counter()
    for result in results:
        for record in result.history:
            levels[record.level] += record.nfe
    return {
        "rewards": [result.reward for result in results],
        "held_out": [result.held_out for result in results],
        "committed_nfe": sum(result.committed_nfe for result in results),
        "executed_nfe": sum(result.executed_nfe for result in results),
        "nfe_by_level": [levels[level] / len(results) for level in range(max(levels) + 1)],
    }
