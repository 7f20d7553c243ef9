"""Searches in pipelines of Ray Data: a class for `Dataset.map_batches` whose batches share one engine.

    found = ray.data.read_json("prompts.jsonl").repartition(target_num_rows_per_block=64).map_batches(
        SearchBatches, fn_constructor_kwargs={"model": "shapes", "nfe": 40}, batch_size=8, concurrency=1,
    )

A function that waits for its batch would leave the engine without work at the end of each. This one is asynchronous:
Ray calls it for several batches at a time (`RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY`, by default 4), and the
engine has the searches of all of them. Keep `batch_size` small, so that one slow search holds up few others, and blocks
at several times what runs at a time: at the end of a block the engine has less to do. What was done when a job dies is
done again; for batches that go on where they were there is `rollflow batch`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from rollflow import rewards
from rollflow.engine import Engine
from rollflow.errors import EngineClosed, EngineDead, RequestError, RollflowError, shown
from rollflow.pictures import described, written
from rollflow.request import Request, Result
from rollflow.values import plain

FOUND = ("reward", "held_out", "nfe", "stopped", "seconds", "width", "height")
TEXTS = ("stopped", "error")
_FIELDS = {one.name: str(one.type) for one in fields(Request)}


class SearchBatches:
    """One engine of one actor.

    A batch has a column "prompt", and may have others that are called as fields of `rollflow.Request`; a value of None
    or NaN in one leaves the field out. Columns of other names stay as they are. What is found is added, or replaces a
    column of its name: "image", the bytes of its file, the columns `FOUND`, and "error", which says why a row has none
    of these, or is empty.

    Args:
        model: as of `Engine.from_pretrained`.
        engine: its other options. Ray gives actors one core unless `num_cpus` says more, and sets OMP_NUM_THREADS to
            it: say `lanes` and `threads`.
        defaults: fields of requests, for rows that leave them out.

    Raises:
        RollflowError: there is no such model, or it cannot be used so.
    """

    def __init__(self, model: str = "shapes", engine: Mapping[str, Any] | Engine | None = None, **defaults: Any):
        self._engine = engine if isinstance(engine, Engine) else Engine.from_pretrained(model, **dict(engine or {}))
        self._defaults = defaults
        if unknown := [name for name in defaults if name not in _FIELDS]:
            raise RequestError(f"{unknown[0]}: a request has no such field; a method's own options go into options=...")
        rewards.make(defaults.get("reward", "count"))

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yields the batch with what was found, its rows in order.

        Raises:
            RequestError: it has no column "prompt".
            EngineClosed, EngineDead: the engine can do no more.
        """
        if "prompt" not in batch:
            raise RequestError(f"the batch has the columns {shown([*batch])}: one must be called prompt")
        requests = [self._request(batch, row) for row in range(len(batch["prompt"]))]
        asked = [one for one in requests if isinstance(one, Request)]
        answers = iter(await self._engine.generate_async(asked, return_exceptions=True))
        found = [next(answers) if isinstance(one, Request) else one for one in requests]
        for one in found:
            if isinstance(one, EngineClosed | EngineDead) or not isinstance(one, RollflowError | Result):
                raise one
        rows = [_row(one) for one in found]
        yield {**batch, **{name: _column(name, [row.get(name) for row in rows]) for name in ("image", *FOUND, "error")}}

    def _request(self, batch: Mapping[str, Any], row: int) -> Request | RollflowError:
        own = {name: _value(name, batch[name][row]) for name in _FIELDS if name in batch}
        try:
            return Request(**{**self._defaults, **{name: value for name, value in own.items() if not _nothing(value)}})
        except RollflowError as error:
            return error


def _row(found: Result | RollflowError) -> dict[str, Any]:
    """What is added to a row."""
    if isinstance(found, RollflowError):
        return {"error": f"{type(found).__name__}: {found}"}
    kind, image = written(found)
    return {**described(found, kind), "image": image, "error": ""}


def _column(name: str, values: Sequence[Any]) -> np.ndarray:
    """A column that has the same type in every batch: bytes, texts, or numbers, of which NaN is none."""
    if name == "image":
        column = np.empty(len(values), dtype=object)
        column[:] = [value or b"" for value in values]
        return column
    if name in TEXTS:
        return np.array([value or "" for value in values], dtype=object)
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _value(name: str, value: Any) -> Any:
    """A cell of a column; of a column of whole numbers that has gaps, and so is one of floats, a whole number."""
    found = plain(value)
    if isinstance(found, float) and found.is_integer() and _FIELDS[name] in ("int", "int | None"):
        return int(found)
    return found


def _nothing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
