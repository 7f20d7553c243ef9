"""`python -m rollflow.bench study | throughput`."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import tyro

from rollflow.bench.study import Study
from rollflow.bench.throughput import Throughput


def main() -> None:
    """Runs the benchmark that the command line names."""
    tyro.extras.subcommand_cli_from_dict({"study": Study, "throughput": Throughput}).run()


if __name__ == "__main__":
    main()
