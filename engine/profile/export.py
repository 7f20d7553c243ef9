"""The ledger's tables for other programs: pandas, Parquet, CSV, JSON."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from rollflow.errors import RequestError, shown
from rollflow.profile.records import NAMES

SUFFIXES = (".parquet", ".csv", ".json")


def columns(table: np.ndarray) -> dict[str, np.ndarray]:
    """A table by column, with words where it has numbers that stand for them."""
    found = {}
    for name in table.dtype.names or ():
        column = table[name]
        found[name] = np.array(NAMES[name], dtype=object)[column] if name in NAMES else column
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
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise RequestError(
                "a .parquet file takes pyarrow: pip install 'rollflow[profile]', or choose .csv"
            ) from error
        parquet.write_table(pyarrow.table(columns(table)), path)
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


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
