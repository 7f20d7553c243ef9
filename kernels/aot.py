"""Compile every kernel ahead of time for the supported GPUs, without one: `python -m rollflow.kernels.aot [NAMES]`.

Prints what each variant costs on each target: instructions, registers a thread, bytes spilled to local memory, shared
memory a block, barriers, and the widest accesses. `cuobjdump` and `ptxas` are those that Triton brings.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from triton import knobs

from .finish import launch_finish
from .finish_flat import launch_finish_flat
from .group_norm import launch_group_norm
from .launch import Launch, recorded
from .noise import launch_noise
from .propose import launch_propose

TARGETS = (80, 90, 100)  # A100; H100 and H200; B200
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype]] = {  # velocities and what enters a network: of a model that
    "bf16": (torch.bfloat16, torch.bfloat16),  # rounds its velocities to its dtype, as all built-in adapters do
    "fp32": (torch.float32, torch.float32),
    "fp32 u": (torch.float32, torch.bfloat16),  # does not round them
    "fp32 latents": (torch.bfloat16, torch.float32),  # has an autoencoder in float32, or a map that no kernel knows
}
ROWS = (1, 64)  # the batches that differ: `block_of`
# Tokens of a row (rows, columns), channels of a token, the patch, and numbers a latent channel ("latent") or one for
# each "channel" of a token: the built-in model, FLUX at 1024 x 1024 pixels and in wide format, FLUX.2, unpatched ones.
PATCHED = (
    ((4, 4), 32, (2, 2), "latent"),
    ((64, 64), 64, (2, 2), "latent"),
    ((48, 85), 64, (2, 2), "latent"),
    ((64, 64), 128, (2, 2), "channel"),
    ((128, 128), 16, (1, 1), "latent"),
    ((32, 32), 256, (4, 4), "latent"),
)
NORMALISED = ((128, 1024), (256, 1024), (512, 512))  # channels and the side of what FLUX's decoder normalises
FLAT = ((262144, 1), (2096640, 16), (262144, 262144))  # elements and numbers: SD3, Wan, a number an element


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def noise(rows: int, token: int, channel: int) -> Launch:
    """The launch of `noise` at a size."""
    index = _empty(rows, dtype=torch.int64)
    with recorded() as found:
        launch_noise(index, index, _empty(rows, token, channel))
    return found[0]


def propose(rows: int, token: int, channel: int, velocity: torch.dtype, entering: torch.dtype) -> Launch:
    """The launch of `propose` at a size, with velocities and the model's input in these dtypes."""
    x, u = (_empty(2 * rows, token, channel, dtype=dtype) for dtype in (torch.float32, velocity))
    index, model_input = _empty(rows, dtype=torch.int64), _empty(rows, token, channel, dtype=entering)
    with recorded() as found:
        launch_propose(x, u, index, index, _empty(rows, 4), index, index, model_input)
    return found[0]


def finish(
    rows: int, tokens: tuple[int, int], channel: int, patch: tuple[int, int], table: str, velocity: torch.dtype,
    latents: torch.dtype,
) -> Launch:  # fmt: skip
    """The launch of `finish` at a size."""
    (down, across), (y, x) = tokens, patch
    latent = channel // (y * x)
    u, state = _empty(rows, down * across, channel, dtype=velocity), _empty(rows, down * across, channel)
    numbers = _empty(latent if table == "latent" else channel)
    made = _empty(rows, latent, down * y, across * x, dtype=latents)
    with recorded() as found:
        launch_finish(u, state, u, _empty(rows, dtype=torch.int64), _empty(rows, 2), y, x, numbers, numbers, made)
    return found[0]


def finish_flat(rows: int, elements: int, numbers: int, velocity: torch.dtype, latents: torch.dtype) -> Launch:
    """The launch of `finish_flat` at a size."""
    u, state, table = _empty(rows, 1, elements, dtype=velocity), _empty(rows, 1, elements), _empty(numbers)
    made, index = _empty(rows, elements, dtype=latents), _empty(rows, dtype=torch.int64)
    with recorded() as found:
        launch_finish_flat(u, state, u, index, _empty(rows, 2), table, table, made)
    return found[0]


def group_norm(images: int, channels: int, side: int, dtype: torch.dtype) -> list[Launch]:
    """The launches of `group_norm` with SiLU, in 32 groups."""
    x = torch.empty(images, channels, side, side, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    weight = _empty(channels, dtype=dtype)
    with recorded() as found:
        launch_group_norm(x, 32, weight, weight, 1e-6, True, x)
    return found


@cache
def launches() -> dict[str, Launch]:
    """A launch of every variant that models of the sizes above take, by a name; recorded from the launchers."""
    found = {}
    for rows in ROWS:
        found[f"noise, {rows} rows"] = noise(rows, 4096, 64)
        for name, (velocity, entering) in PRECISIONS.items():
            found[f"propose {name}, {rows} rows"] = propose(rows, 4096, 64, velocity, entering)
            for elements, numbers in FLAT:
                title = f"finish_flat {name}, {numbers} numbers, {rows} rows"
                found[title] = finish_flat(rows, elements, numbers, velocity, entering)
    for name, precision in PRECISIONS.items():
        for tokens, channel, patch, table in PATCHED:
            title = f"finish {name}, {channel} channels, {tokens[0]}x{tokens[1]}"
            found[title] = finish(1, tokens, channel, patch, table, *precision)
    for channels, side in NORMALISED:
        for name, one in zip(
            ("moments", "affine", "apply"), group_norm(1, channels, side, torch.bfloat16), strict=True
        ):
            found[f"group_norm {name} bf16, {channels} channels"] = one
    return found


@dataclass(frozen=True)
class Usage:
    """What a variant takes on a target, of its machine code; sizes in bytes.

    Attributes:
        target: the compute capability times ten.
        instructions: of a program, which issues each once: but for those of group_norm, no kernel loops.
        registers: of a thread.
        spills: local memory of a thread.
        shared: memory of a program.
        barriers: at which a program's warps wait for each other.
        wide_loads, wide_stores: accesses of 128 bits.
    """

    target: int
    instructions: int
    registers: int
    spills: int
    shared: int
    barriers: int
    wide_loads: int
    wide_stores: int


def usage(launch: Launch, target: int) -> Usage:
    """Compiles a launch's variant for a target.

    Raises:
        RuntimeError: Triton runs its interpreter (`TRITON_INTERPRET`), which compiles nothing, or `cuobjdump` fails.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "off", "false", "no", "n"):
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted; unset it to compile them")
    compiled = launch.variant.compiled(launch.kernel, target)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", "--dump-resource-usage", file]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"cuobjdump failed for sm_{target}:\n{run.stdout}{run.stderr}")
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", run.stdout)
    resources = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", run.stdout + run.stderr))

    def count(pattern: str) -> int:
        return sum(re.match(pattern, one) is not None for one in code)

    last = max(i for i, one in enumerate(code) if one == "EXIT")  # what follows never runs
    return Usage(
        target, last + 1, int(resources["REG"]), int(resources["STACK"]) + int(resources["LOCAL"]),
        compiled.metadata.shared, count("BAR"), count(r"LDG\..*128"), count(r"STG\..*128"),
    )  # fmt: skip


def compile_all(names: str = "") -> Iterator[tuple[str, Usage]]:
    """Launches whose name has a match of a pattern, compiled for every target; variants that are equal once."""
    for target in TARGETS:
        done = set()
        for name, launch in launches().items():
            if re.search(names, name) and launch.variant not in done:
                done.add(launch.variant)
                yield name, usage(launch, target)


def main(names: str = "") -> None:
    """Print the table, of all or of those whose name has a match of a pattern."""
    columns = ("instructions", "registers", "spills", "shared", "barriers", "wide_loads", "wide_stores")
    print(f"{'kernel':<50}{'target':<8}", *(f"{column:>12}" for column in columns))
    for name, use in compile_all(names):
        print(f"{name:<50}{f'sm_{use.target}':<8}", *(f"{getattr(use, column):>12}" for column in columns))


if __name__ == "__main__":
    main(*sys.argv[1:2])
