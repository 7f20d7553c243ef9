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

from rollflow.bench.kernel_bytes import PATCH, STEP, Size, finish_bytes, noise_bytes, propose_bytes
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


def rows(sizes: Sequence[Size], dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each kernel, size and target.

    Raises:
        RequestError: Triton is not installed, or runs its interpreter.
    """
    try:
        from rollflow.kernels import aot
    except ImportError as error:
        raise RequestError(
            "static=True compiles the kernels, and Triton is not installed: pip install triton"
        ) from error
    found, known = [], dict[Any, Any]()
    for target, chip in CHIPS.items():
        for kernel in ("propose", "finish", "noise"):
            for size in sizes:
                launch, moved = _launched(aot, kernel, size, dtype)
                key = launch.variant, target
                try:
                    known[key] = known.get(key) or aot.usage(launch, target)
                except RuntimeError as error:
                    raise RequestError(f"static=True: {error}") from error
                found.append(_row(kernel, size, chip, launch, known[key], moved))
    return found


def _launched(aot: Any, kernel: str, size: Size, dtype: torch.dtype) -> tuple[Any, int]:
    """The kernel's launch at a size, and the bytes that it must move."""
    count, token, channel = size
    index = torch.arange(count)
    if kernel == "noise":
        return aot.noise(*size), noise_bytes(count, token * channel)
    if kernel == "propose":
        steps = torch.tensor(STEP).repeat(count, 1)
        return aot.propose(*size, dtype, dtype), propose_bytes(index, index, steps, token * channel, dtype)
    side = math.isqrt(token)
    launch = aot.finish(count, (side, side), channel, PATCH[1:], "latent", dtype, dtype)
    return launch, finish_bytes(index, token * channel, dtype)


def _row(kernel: str, size: Size, chip: Chip, launch: Any, use: Any, moved: int) -> dict[str, Any]:
    issued = math.prod(launch.grid) * launch.variant.warps * use.instructions
    memory = moved / chip.memory
    slots = issued / (chip.multiprocessors * SCHEDULERS * chip.clock)
    seconds = START + max(memory, slots)
    return {
        "kernel": kernel, **size._asdict(), "target": f"sm_{use.target}", "device": chip.name, "bytes": moved,
        "instructions": use.instructions, "warps": math.prod(launch.grid) * launch.variant.warps,
        "registers": use.registers, "spills": use.spills, "shared": use.shared, "barriers": use.barriers,
        "memory_seconds": memory, "issue_seconds": slots,
        "bound": "start" if max(memory, slots) < START else "memory" if memory >= slots else "issue slots",
        "seconds": seconds, "of_copy": moved / seconds / chip.copy,
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
