"""The rows of a study: what one contender did with one prompt set, kept in a file so that a study can resume."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from rollflow.bench import outputs
from rollflow.engine import Engine
from rollflow.errors import RequestError, shown
from rollflow.request import Request, Result
from rollflow.rewards.own import reward_of

Row = dict[str, Any]
KEY = ("part", "model", "reward", "label", "path", "set", "nfe", "seed", "prompts")


class Job(NamedTuple):
    """One row to compute: its key, the model's name or folder, the prompts, the fields of their requests, the reward.

    `reward` is its name, or FILE.py:NAME, of which the key has the name alone.
    """

    key: Row
    model: str
    prompts: Sequence[str]
    fields: dict[str, Any]
    reward: str


class Rows:
    """Rows in `folder/rows.jsonl`; a row that is there already, of the same prompts and options, is not computed again.

    A row holds its key (`KEY`), the requests' fields, a digest of the prompts and the model, and for each prompt the
    reward and the held-out score; the committed and executed evaluations and the seconds of all prompts together; and
    the evaluations at each level. Of two rows with one key the later counts.

    Raises:
        RequestError: the folder cannot be made or written to, or the file holds something else than rows. A line that
            was not written to its end is left out.
    """

    def __init__(self, folder: Path):
        outputs.check_folder(folder)
        self.file = folder / "rows.jsonl"
        outputs.check_file(self.file, "--out")
        self.rows: dict[tuple, Row] = {}
        content = self.file.read_bytes()
        for number, line in enumerate(content.split(b"\n"), 1):
            try:
                row = json.loads(line.decode())
            except json.JSONDecodeError:  # of a study that was stopped while it wrote
                continue
            except (UnicodeDecodeError, RecursionError) as error:
                raise _garbled(self.file, number) from error
            if not _is_row(row):
                raise _garbled(self.file, number)
            self.rows[_key(row)] = row
        self._half = bool(content) and not content.endswith(b"\n")  # the last line was not written to its end

    def run(self, jobs: Sequence[Job], workers: int = 1) -> Iterator[Row]:
        """Computes what is missing, and yields each row when it is there.

        With several workers each is a process with its share of the cores; rows come in the order they are ready.
        """
        missing = []
        for job in jobs:
            row = self.rows.get(_key(job.key))
            if row and (row["fields"], row["digest"]) == (job.fields, digest(job)):
                yield row
            else:
                missing.append(job)
        for row in _computed(missing, workers):
            with self.file.open("a", encoding="utf-8") as file:
                file.write("\n" * self._half + json.dumps(row) + "\n")
            self._half = False
            self.rows[_key(row)] = row
            yield row


def digest(job: Job) -> str:
    """Of the prompts and the full names of the model and the reward, which the key shortens."""
    reward = [] if job.reward == job.key["reward"] else [job.reward]
    return hashlib.sha256(json.dumps([job.model, *reward, *job.prompts]).encode()).hexdigest()[:16]


def _is_row(row: Any) -> bool:
    """Whether a line of a file holds what is read of a row: values that compare, and the lists of figures."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str | int) for name in KEY):
        return False
    lists = all(isinstance(row.get(name), list) for name in ("rewards", "held_out", "nfe_by_level"))
    figures = all(isinstance(row.get(name), int | float) for name in ("committed_nfe", "executed_nfe", "seconds"))
    return lists and figures and isinstance(row.get("fields"), dict) and isinstance(row.get("digest"), str)


def _garbled(file: Path, number: int) -> RequestError:
    return RequestError(
        f"line {number} of {shown(str(file))} is no row of a study: take it out, or choose another --out"
    )


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def _computed(jobs: list[Job], workers: int) -> Iterator[Row]:
    if workers == 1 or len(jobs) < 2:
        yield from map(compute, jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_limit, initargs=(threads,)) as pool:
        try:
            for done in as_completed([pool.submit(compute, job) for job in jobs]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _limit(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def engine_of(model: str) -> Engine:
    """The engine of this process, loaded once."""
    from rollflow.models import silence

    silence()
    return Engine.from_pretrained(model)


def compute(job: Job) -> Row:
    """One row: a request a prompt, all of them together."""
    engine, base, reward = engine_of(job.model), 1000 * job.key["seed"], reward_of(job.reward)
    start = time.perf_counter()
    results = engine.generate(
        [Request(p, reward=reward, seed=base + i, **job.fields) for i, p in enumerate(job.prompts)]
    )
    seconds = time.perf_counter() - start
    return {**job.key, "fields": job.fields, "digest": digest(job), **summary(results), "seconds": seconds}


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
