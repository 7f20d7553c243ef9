"""What a process and its children hold over time, and its trend: memory, descriptors, threads; of Linux' /proc."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import theilslopes

PROC = Path("/proc")
PAGE, TICK = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
LEAST = 20  # samples that a trend takes


class Sample(NamedTuple):
    """What a process and all below it held.

    Attributes:
        seconds: when, since the first sample.
        rss_bytes: resident memory; pages that processes share count in each.
        processes: how many there were.
        descriptors: open files, sockets and pipes.
        threads: of all processes.
    """

    seconds: float
    rss_bytes: int
    processes: int
    descriptors: int
    threads: int


def sample(pid: int, seconds: float) -> Sample:
    """What a process and all below it hold now; those that end meanwhile are left out."""
    rss = descriptors = threads = processes = 0
    for one in family(pid):
        try:
            pages = int((PROC / str(one) / "statm").read_text().split()[1])
            opened, running = (len(os.listdir(PROC / str(one) / what)) for what in ("fd", "task"))
        except OSError:
            continue
        processes, rss = processes + 1, rss + pages * PAGE
        descriptors, threads = descriptors + opened, threads + running
    return Sample(seconds, rss, processes, descriptors, threads)


def processor_seconds(pid: int) -> float:
    """Seconds that a process and all below it have computed; those that have ended are left out."""
    ticks = 0
    for one in family(pid):
        try:
            after = (PROC / str(one) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(after[11]) + int(after[12])  # in user mode and in the kernel
    return ticks / TICK


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def trend(seconds: Sequence[float], values: Sequence[float], most: float) -> dict[str, Any] | None:
    """A line through samples by the median of their slopes (Theil-Sen); None of fewer than `LEAST`.

    Args:
        seconds: when they were taken.
        values: what they were.
        most: by what share of the median the line may rise over all of the time, and still be flat.
    """
    if len(values) < LEAST:
        return None
    slope, _, low, high = theilslopes(np.asarray(values, dtype=float), np.asarray(seconds, dtype=float))
    middle, span = float(np.median(values)), seconds[-1] - seconds[0]
    growth = float(slope) * span / middle if middle else 0.0
    return {
        "median": middle,
        "per_hour": 3600 * float(slope),
        "per_hour_95": (3600 * float(low), 3600 * float(high)),
        "growth": growth,
        "allowed_growth": most,
        "flat": growth <= most,
    }
