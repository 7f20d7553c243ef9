"""Kernels compile for every supported GPU, on a machine that has none: what their code must and must not hold."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton.backends.nvidia.compiler")

from rollflow.kernels.launch import recorded
from rollflow.kernels.propose import launch_propose

# Instructions and registers of the hot kernels: what they have, and a tenth more.
CEILINGS = {
    "propose bf16, 1 rows": (335, 36),
    "propose bf16, 64 rows": (900, 64),
    "finish bf16, 32 channels, 4x4": (230, 64),
    "finish bf16, 64 channels, 64x64": (270, 56),
    "finish_flat bf16, 1 numbers, 64 rows": (240, 48),
}
OTHERS = ("finish fp32 u, 64 channels, 64x64",)  # of a model that declares nothing of its velocities


def plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_kernels_change_no_layout(reported) -> None:
    names = "|".join(f"^{name}$" for name in (*CEILINGS, *OTHERS))
    command = [sys.executable, "-m", "rollflow.kernels.aot", names]
    run = subprocess.run(command, capture_output=True, text=True, env=plain())
    assert run.returncode == 0, run.stderr
    reported(run.stdout)
    header, *rows = (line.rsplit(maxsplit=8) for line in run.stdout.splitlines())
    assert header == ["kernel", "target", "instructions", "registers", "spills", "shared", "barriers", "wide_loads",
                      "wide_stores"]  # fmt: skip
    assert {row[1] for row in rows} == {"sm_80", "sm_90", "sm_100"} and len(rows) == 3 * (len(CEILINGS) + len(OTHERS))
    for name, target, *numbers in rows:
        instructions, registers, spills, shared, barriers, loads, stores = map(int, numbers)
        assert spills == shared == barriers == 0, (name, target)
        # x is read 16 bytes at a time, and what is written in float32 or whole lines of latents is, too; latents of
        # `finish_flat` in 16 bits are four elements, 8 bytes.
        assert loads > 0 and (stores > 0 or "flat" in name), (name, target)
        most = CEILINGS.get(name, (400, 128))
        assert instructions <= most[0] and registers <= most[1], (name, target, instructions, registers)


def test_group_norm_reads_and_writes_wide_and_spills_nothing(reported) -> None:
    command = [sys.executable, "-m", "rollflow.kernels.aot", "^group_norm .*128 channels"]
    run = subprocess.run(command, capture_output=True, text=True, env=plain())
    assert run.returncode == 0, run.stderr
    reported(run.stdout)
    rows = [line.rsplit(maxsplit=8) for line in run.stdout.splitlines()[1:]]
    assert len(rows) == 9
    for name, target, *numbers in rows:
        _, registers, spills, _, _, loads, stores = map(int, numbers)
        assert not spills and registers <= 128, (name, target, registers)
        assert "affine" in name or loads > 0, (name, target)
        assert "apply" not in name or stores > 0, (name, target)


def test_the_interpreter_compiles_nothing() -> None:
    command = [sys.executable, "-m", "rollflow.kernels.aot"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode != 0
    assert "TRITON_INTERPRET is set" in run.stderr


def test_what_is_recorded_is_what_is_launched(monkeypatch) -> None:
    """The grid and the constants of a launch, of tensors without memory, are those that the kernel is run with."""
    ran = []

    class Kernel:
        __name__ = "propose_kernel"

        def __getitem__(self, grid):
            return lambda *arguments, **options: ran.append((grid, options))

    monkeypatch.setattr(sys.modules["rollflow.kernels.propose"], "propose_kernel", Kernel())
    x, index = torch.zeros(4, 16, 32), torch.arange(2)
    arguments = (x, x.bfloat16(), index, index, torch.zeros(2, 4), index, index, torch.zeros(2, 16, 32))
    launch_propose(*arguments)
    with recorded() as found:
        launch_propose(*arguments)
    ((grid, options),), (launch,) = ran, found
    assert grid == launch.grid == (1, 2)
    assert options == {"BLOCK": 512, "num_warps": 4, "enable_fp_fusion": True}
    assert dict(launch.variant.constants) == {"BLOCK": 512} and launch.variant.warps == 4
    assert dict(launch.variant.types)["u_pool"] == "*bf16" and "elements" in launch.variant.aligned
