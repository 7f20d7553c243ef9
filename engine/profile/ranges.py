"""NVTX ranges in the domain "rollflow", and for which batch a thread works.

Without a profiler attached a range costs less than a microsecond.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nvtx

COLORS = {
    "tick": "gray", "encode_prompt": "purple", "propose": "blue", "transformer_forward": "green", "finish": "cyan",
    "vae_decode": "orange", "reward": "red", "backward": "magenta", "decide": "yellow",
}  # fmt: skip
RANGES = {"forward": "transformer_forward", "decode": "vae_decode"}  # stages that Nsight shows by another name
_here = threading.local()  # of the thread: the batch that it works for


def marked(name: str, payload: tuple[int, int] | None = None) -> Any:
    """A range around what a thread does; a tick's payload is the batch's bucket and rows.

    Ranges of one thread nest. None may be inside of what a CUDA graph captures: it would mark the capture alone.
    """
    shown = RANGES.get(name, name)
    return nvtx.annotate(shown, domain="rollflow", color=COLORS.get(shown, "gray"), payload=payload)


def current() -> int | None:
    """The number of the batch that this thread works for."""
    return getattr(_here, "batch", None)


@contextmanager
def working_for(batch: int | None) -> Iterator[None]:
    """What this thread does within it is a batch's work, on whatever thread."""
    before, _here.batch = current(), batch
    try:
        yield
    finally:
        _here.batch = before
