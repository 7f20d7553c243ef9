"""Where processes that serve log to: commands and workers, of whom the process is; the package sets no handlers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
FORMAT, TIME = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"
LOGGERS = ("rollflow", "uvicorn")


@contextmanager
def told_on_stderr(level: Level) -> Iterator[None]:
    """Within the block, what is logged from a level on goes to standard error, a line with its time each.

    uvicorn is told of from WARNING on at least: rollflow counts and logs requests itself.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT, TIME))
    handler.setLevel(level.upper())
    log, before = logging.getLogger("rollflow"), logging.getLogger("rollflow").level
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    log.setLevel(level.upper())
    try:
        yield
    finally:
        log.setLevel(before)
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
