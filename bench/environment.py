"""What a results file says of where its numbers came from."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import rollflow


def environment() -> dict[str, str | int]:
    """Machine, versions, commit and date of this run."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "rollflow": rollflow.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, CPU only",
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    """The commit of the checkout that this file lies in, marked where files differ from it."""
    here = Path(__file__).parent
    try:
        git = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True
        )
        tracked = subprocess.run(["git", "-C", str(here), "ls-files", "--error-unmatch", __file__], capture_output=True)
    except OSError:
        return "unknown"
    return git.stdout.strip() if tracked.returncode == 0 else "unknown"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
