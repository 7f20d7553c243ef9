"""What the kernels must cost, from their machine code alone: `python -m rollflow.bench kernels --static`.

A launch lasts at least as long as its bytes take at the memory's rate, and as its instructions take at one a clock and
scheduler, of which a multiprocessor has four; which is longer bounds it. Both begin `START` after the launch does. The
rates are of the data sheets but for the memory of sm_90, which the kernels were measured to reach on an H100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table

from rollflow.errors import RequestError

START = 2.4e-6  # seconds: of the shortest launch of a CUDA graph, and of a chain of two loads
SCHEDULERS = 4  # of a multiprocessor


class Chip(NamedTuple):
    """A GPU of a target: multiprocessors, clocks a second, bytes a second of kernels and of a copy."""

    name: str
    multiprocessors: int
    clock: float
    memory: float
    copy: float


CHIPS = {
    80: Chip("A100 80GB", 108, 1.41e9, 1.80e12, 1.65e12),
    90: Chip("H100 SXM", 132, 1.755e9, 2.95e12, 2.44e12),
    100: Chip("B200", 148, 1.85e9, 6.8e12, 6.2e12),
}


class Work(NamedTuple):
    """A kernel at a size, with the bytes that it must move; `patch` counts for `finish`."""

    kernel: str
    rows: int
    token: int
    channel: int
    patch: tuple[int, int]
    dtype: torch.dtype
    bytes: int


def rows(works: Sequence[Work]) -> list[dict[str, Any]]:
    """A row for each target and work.

    Raises:
        RequestError: Triton is not installed, or runs its interpreter.
    """
    try:
        from rollflow.kernels import aot
    except ImportError as error:
        raise RequestError("static=True compiles the kernels: install triton, which they are written in") from error
    found, known = [], dict[Any, Any]()
    for target, chip in CHIPS.items():
        for work in works:
            launch = _launched(aot, work)
            key = launch.variant, target
            try:
                known[key] = known.get(key) or aot.usage(launch, target)
            except RuntimeError as error:
                raise RequestError(f"static=True: {error}") from error
            found.append(_row(work, chip, launch, known[key]))
    return found


def _launched(aot: Any, work: Work) -> Any:
    """The kernel's launch at a size."""
    size, dtype = (work.rows, work.token, work.channel), work.dtype
    if work.kernel == "noise":
        return aot.noise(*size)
    if work.kernel == "propose":
        return aot.propose(*size, dtype, dtype)
    side = math.isqrt(work.token)
    return aot.finish(work.rows, (side, side), work.channel, work.patch, "latent", dtype, dtype)


def _row(work: Work, chip: Chip, launch: Any, use: Any) -> dict[str, Any]:
    issued = math.prod(launch.grid) * launch.variant.warps * use.instructions
    memory = work.bytes / chip.memory
    slots = issued / (chip.multiprocessors * SCHEDULERS * chip.clock)
    seconds = START + max(memory, slots)
    return {
        "kernel": work.kernel, "rows": work.rows, "token": work.token, "channel": work.channel,
        "target": f"sm_{use.target}", "device": chip.name,
        "bytes": work.bytes,
        "instructions": use.instructions, "warps": math.prod(launch.grid) * launch.variant.warps,
        "registers": use.registers, "spills": use.spills, "shared": use.shared, "barriers": use.barriers,
        "memory_seconds": memory, "issue_seconds": slots,
        "bound": "start" if max(memory, slots) < START else "memory" if memory >= slots else "issue slots",
        "seconds": seconds, "of_copy": work.bytes / seconds / chip.copy,
    }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> Table:
    """What is printed."""
    shown = Table(title="the kernels by their machine code; size: rows x token x channel; µs and of a copy: predicted")
    for column in ("kernel", "size", "target", "MB", "instr.", "regs", "spills", "shared", "bound", "µs", "of a copy"):
        shown.add_column(column, justify="left" if column in ("kernel", "target", "bound") else "right", no_wrap=True)
    for row in found:
        shown.add_row(
            row["kernel"], f"{row['rows']} x {row['token']} x {row['channel']}", row["target"],
            f"{row['bytes'] / 1e6:.1f}", *(str(row[k]) for k in ("instructions", "registers", "spills", "shared")),
            row["bound"], f"{1e6 * row['seconds']:.1f}", f"{100 * row['of_copy']:.0f} %",
        )  # fmt: skip
    return shown
