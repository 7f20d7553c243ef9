"""`python -m rollflow.bench throughput | scaling | overhead | kernels | compare | study`."""

import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import tyro

from rollflow.bench.compare import Compare
from rollflow.bench.kernel_bandwidth import Kernels
from rollflow.bench.overhead import Overhead
from rollflow.bench.scaling import Scaling
from rollflow.bench.study import Study
from rollflow.bench.throughput import Throughput
from rollflow.cli import silence
from rollflow.errors import RollflowError

COMMANDS = {
    "throughput": Throughput,
    "scaling": Scaling,
    "overhead": Overhead,
    "kernels": Kernels,
    "compare": Compare,
    "study": Study,
}


def main() -> int:
    """Runs the benchmark that the command line names; returns the exit code, 2 for what cannot be honoured."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m rollflow.bench")
    silence()
    try:
        command()
    except (RollflowError, OSError) as error:
        print(f"rollflow.bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
