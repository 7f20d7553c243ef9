"""Compile every kernel ahead of time for the supported GPUs, without one: `python -m rollflow.kernels.aot`.

Prints what each kernel costs on each target: registers a thread, bytes spilled to local memory, stack bytes and shared
memory a block. Spills are a bug (a test asserts that there are none); shared memory is the layout change of a kernel.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from .finish import ELEMENTS, finish_kernel, tile
from .noise import BLOCK, noise_kernel
from .philox import OPTIONS
from .propose import propose_kernel

TARGETS = (80, 90, 100)  # A100; H100 and H200; B200

# Argument types as a launch specialises them at FLUX's sizes: pointers and sizes divisible by 16, then the constants,
# with the integers that are 1.
_NOISE = {"seed": "*i64", "key": "*i64", "out": "*fp32", "elements": "i32", "blocks": "i32"}
_PROPOSE = {
    "x_pool": "*fp32", "u_pool": "*fp32", "parent": "*i64", "child": "*i64", "coefficients": "*fp32", "seed": "*i64",
    "key": "*i64", "model_input": "*bf16", "elements": "i32", "blocks": "i32",
}  # fmt: skip
_FINISH = {
    "u": "*bf16", "x_pool": "*fp32", "u_pool": "*fp32", "slot": "*i64", "coefficients": "*fp32",
    "scale": "*fp32", "offset": "*fp32", "latents": "*bf16",
    "elements": "i32", "channels": "i32", "rows": "i32", "columns": "i32",
}  # fmt: skip
_PRECISIONS: tuple[tuple[str, dict[str, str]], ...] = (("bf16", {}), ("fp32", {"u": "*fp32", "latents": "*fp32"}))
_PATCHES = ((2, 2, "latent"), (2, 2, "channel"), (1, 1, "latent"), (4, 4, "latent"))
_FLAT: dict[str, Any] = {"channels": 1, "PATCH_Y": 1, "PATCH_X": 1, "CHANNELS": 1, "COLUMNS": ELEMENTS}
_FINISHES: dict[str, dict[str, Any]] = {
    **{f"{y}x{x}, {t}": {"PATCH_Y": y, "PATCH_X": x, "TABLE": t, **tile(64, x)} for y, x, t in _PATCHES},
    "flat, one": _FLAT | {"rows": 1, "TABLE": "row"},
    "flat, row": _FLAT | {"TABLE": "row"},
    "flat, column": _FLAT | {"rows": 1, "TABLE": "column"},
}
KERNELS: tuple[tuple[str, Any, dict[str, str], dict[str, Any]], ...] = (
    ("noise", noise_kernel, _NOISE, {"BLOCK": BLOCK}),
    ("propose (bf16)", propose_kernel, _PROPOSE, {"BLOCK": BLOCK}),
    ("propose (fp32)", propose_kernel, _PROPOSE | {"model_input": "*fp32"}, {"BLOCK": BLOCK}),
    *(
        (f"finish {name} ({precision})", finish_kernel, _FINISH | types, constants)
        for name, constants in _FINISHES.items()
        for precision, types in _PRECISIONS
    ),
)
_UNALIGNED = ("blocks",)


@dataclass(frozen=True)
class Usage:
    """What `ptxas` reports for one kernel on one target; sizes in bytes."""

    kernel: str
    target: int
    registers: int
    spills: int
    stack: int
    shared: int


def compile_all(targets: tuple[int, ...] = TARGETS) -> Iterator[Usage]:
    """Compile every kernel for every target (compute capability times ten).

    Raises:
        RuntimeError: Triton runs its interpreter (`TRITON_INTERPRET`), which compiles nothing, or `ptxas` fails.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "off", "false", "no", "n"):
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted; unset it to compile them")
    for target in targets:
        for name, kernel, types, constants in KERNELS:
            types = types | dict.fromkeys(constants, "constexpr")
            aligned = {
                (position,): [["tt.divisibility", 16]]
                for position, (argument, kind) in enumerate(types.items())
                if kind not in ("fp32", "constexpr") and argument not in _UNALIGNED
            }
            source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=OPTIONS)
            yield Usage(name, target, *_resources(compiled.asm["ptx"], target), compiled.metadata.shared)


def _resources(ptx: str, target: int) -> tuple[int, int, int]:
    """Registers, spilled bytes (stores and loads) and stack bytes, from the assembler that Triton itself uses."""
    ptxas = Path(get_ptxas(target).path)
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert architecture is not None, "PTX without a .target line"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "kernel.ptx")
        source.write_text(ptx)
        run = subprocess.run(
            [ptxas, "-v", f"--gpu-name={architecture[1]}", source, "-o", Path(scratch, "kernel.cubin")],
            capture_output=True, text=True,
        )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"{ptxas.name} failed for sm_{target}:\n{run.stdout}{run.stderr}")
    report = run.stdout + run.stderr

    def total(pattern: str) -> int:
        found = re.findall(pattern, report)
        if not found:
            raise RuntimeError(f"{ptxas.name} reported no {pattern!r}:\n{report}")
        return sum(map(int, found))

    spills = total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads")
    return total(r"Used (\d+) registers"), spills, total(r"(\d+) bytes stack frame")


def main() -> None:
    """Print the table."""
    print(f"{'kernel':<28}{'target':<8}{'registers':>10}{'spills':>8}{'stack':>7}{'shared':>8}")
    for use in compile_all():
        target = f"sm_{use.target}"
        print(f"{use.kernel:<28}{target:<8}{use.registers:>10}{use.spills:>8}{use.stack:>7}{use.shared:>8}")


if __name__ == "__main__":
    main()
