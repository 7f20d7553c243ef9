"""Imports follow the architecture: arrows point down and there is no circle, not even for type checkers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"engine": "", "kernels": "kernels", "bench": "bench"}


def lint(tree):
    """Import-linter's verdict on a package; it must find it as one folder, which the installed one may not be."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), tree / "pyproject.toml", "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for part, name in PARTS.items():
        for source in (ROOT / part).rglob("*.py"):
            target = folder / "rollflow" / name / source.relative_to(ROOT / part)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_arrows_point_down(tree):
    found = lint(tree)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("schedule/pool.py", "from rollflow.search import turn", "Arrows point down"),
        ("device/runner.py", "if TYPE_CHECKING:\n    from rollflow.loop import Loop", "Arrows point down"),
        ("stray.py", "", "exhaustive"),
        ("kernels/philox.py", "from rollflow.kernels import propose", "No circles"),
    ],
)
def test_what_is_forbidden_is_found(tree, file, line, broken):
    path = tree / "rollflow" / file
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\nfrom typing import TYPE_CHECKING\n{line}\n")
    try:
        found = lint(tree)
        assert found.returncode != 0 and broken in found.stdout, found.stdout + found.stderr
    finally:
        path.unlink() if before is None else path.write_text(before)
