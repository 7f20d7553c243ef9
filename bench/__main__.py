"""Benchmarks: `python -m rollflow.bench COMMAND`, or `rollflow bench COMMAND`."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import tyro

from rollflow.bench.adapters import Adapters
from rollflow.bench.caching import Caching
from rollflow.bench.compare import Compare
from rollflow.bench.fleet import Fleet
from rollflow.bench.gpu import Gpu
from rollflow.bench.journal import JournalCost
from rollflow.bench.judged import Judged
from rollflow.bench.kernel_bandwidth import Kernels
from rollflow.bench.latency import Latency
from rollflow.bench.overhead import Overhead
from rollflow.bench.preview_quality import Preview
from rollflow.bench.scaling import Scaling
from rollflow.bench.serve import Serve
from rollflow.bench.soak import Soak
from rollflow.bench.study import Study
from rollflow.bench.throughput import Throughput
from rollflow.bench.versus import Versus
from rollflow.bench.video_quality import Video
from rollflow.bench.what_if import WhatIf
from rollflow.errors import LONGEST, RollflowError, line
from rollflow.models import silence

COMMANDS: dict[str, Callable[..., Any]] = {
    "throughput": Throughput,
    "scaling": Scaling,
    "overhead": Overhead,
    "journal": JournalCost,
    "latency": Latency,
    "preview": Preview,
    "caching": Caching,
    "judged": Judged,
    "kernels": Kernels,
    "gpu": Gpu,
    "compare": Compare,
    "versus": Versus,
    "study": Study,
    "video": Video,
    "adapters": Adapters,
    "what-if": WhatIf,
    "serve": Serve,
    "soak": Soak,
    "fleet": Fleet,
}


def main(arguments: Sequence[str] | None = None, program: str = "python -m rollflow.bench") -> int:
    """Runs the benchmark that the command line names; returns the exit code, 2 for what cannot be honoured."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog=program, description=__doc__, args=None if arguments is None else list(arguments)
    )
    silence()
    try:
        command()
    except (RollflowError, OSError) as error:
        print(f"rollflow.bench: error: {line(str(error), LONGEST)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
