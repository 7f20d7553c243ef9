"""What a results file says of where its numbers came from."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import torch

import rollflow
from rollflow.profile.machine import device_name, versions


def environment() -> dict[str, str | int]:
    """Machine, versions, commit and date of this run."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "rollflow": rollflow.__version__,
        **versions(),
        "device": device_name(),
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
