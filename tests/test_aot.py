"""Every kernel compiles for every supported GPU, on a machine that has none, and spills no register."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton.backends.nvidia.compiler")


def test_kernels_compile_without_spills(reported) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rollflow.kernels.aot"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    reported(run.stdout)
    header, *rows = (line.rsplit(maxsplit=5) for line in run.stdout.splitlines())
    assert header == ["kernel", "target", "registers", "spills", "stack", "shared"]
    assert {row[1] for row in rows} == {"sm_80", "sm_90", "sm_100"} and len(rows) == 51
    for name, target, registers, spills, stack, shared in rows:
        assert int(spills) == int(stack) == 0, (name, target)
        assert int(registers) <= 128 and int(shared) <= 16384, (name, target)  # four blocks a multiprocessor and more


def test_the_interpreter_compiles_nothing() -> None:
    command = [sys.executable, "-m", "rollflow.kernels.aot"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert run.returncode != 0
    assert "TRITON_INTERPRET is set" in run.stderr
