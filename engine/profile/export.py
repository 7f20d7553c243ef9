"""The ledger's tables for other programs: pandas, Parquet, CSV, JSON."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rollflow.errors import RequestError, said, shown
from rollflow.profile.records import NAMES, TABLES

SUFFIXES = (".parquet", ".csv", ".json")


def columns(table: np.ndarray) -> dict[str, np.ndarray]:
    """A table by column, with words where it has numbers that stand for them.

    Raises:
        RequestError: it is none of the ledger's tables.
    """
    names = NAMES[_which(table)]
    found = {}
    for name in table.dtype.names or ():
        column = table[name]
        if name in names:
            column = np.array(names[name], dtype=object)[column]
        elif column.dtype.kind == "U":
            column = column.astype(object)
        found[name] = column
    return found


def _which(table: np.ndarray) -> str:
    if (found := next((name for name, kind in TABLES.items() if kind == table.dtype), None)) is None:
        raise RequestError(
            f"a table of {shown(table.dtype)}: give one of the ledger's ({', '.join(TABLES)}), or some of its entries"
        )
    return found


def to_pandas(table: np.ndarray) -> Any:
    """A table as a `pandas.DataFrame`; raises `RequestError` where pandas is not installed."""
    try:
        import pandas
    except ImportError as error:
        raise RequestError("to_pandas() takes pandas: pip install 'rollflow[profile]'") from error
    return pandas.DataFrame(columns(table))


def save(table: np.ndarray, path: str | Path) -> Path:
    """Writes a table in the format that the path's suffix says: .parquet, .csv or .json (a list of objects).

    What was not written is missing: an empty field of CSV, null in JSON.

    Raises:
        RequestError: another suffix, or for Parquet that pyarrow is not installed.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise RequestError(f"{shown(str(path))}: a table is written as one of {', '.join(SUFFIXES)}")
    if path.suffix == ".parquet":
        arrow = _arrow()
        arrow.parquet.write_table(arrow.table(columns(table)), path)
        return path
    found = {name: [_plain(value) for value in column.tolist()] for name, column in columns(table).items()}
    rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows) + "\n", encoding="utf-8")
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*found])
        writer.writeheader()
        writer.writerows(rows)
    return path


def load(path: str | Path, which: str) -> np.ndarray:
    """A table that `save` wrote as Parquet.

    Args:
        path: the file.
        which: which table it is, see `rollflow.profile.records`.

    Raises:
        RequestError: it is not there, is none of these tables, or pyarrow is not installed.
    """
    arrow, kind = _arrow(), TABLES[which]
    try:
        read = arrow.parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        raise RequestError(
            f"{shown(str(path))} cannot be read as a table of {which} ({said(error)}): record it again"
        ) from error
    table = np.zeros(len(read), kind)
    for name in kind.names or ():
        if name not in read.column_names:
            if name == "cached":  # of recordings from before there was a cache
                continue
            raise RequestError(f"{shown(str(path))} is no table of {which}: it has no column {name}; record it again")
        column, words = read[name].to_numpy(zero_copy_only=False), NAMES[which].get(name)
        if words is not None and {*column} <= {*words}:
            column = np.array([words.index(word) for word in column], kind[name])
        elif kind[name].kind == "U" and all(isinstance(text, str) for text in column):
            column = column.astype(kind[name])
        if column.dtype != kind[name]:
            raise RequestError(
                f"{shown(str(path))} is no table of {which}: its column {name} holds {read[name].type}, or other words "
                "than a ledger's; record it again"
            )
        table[name] = column
    return table


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise RequestError("a .parquet file takes pyarrow: pip install 'rollflow[profile]', or choose .csv") from error
    return pyarrow


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
