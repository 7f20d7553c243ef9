"""`rollflow models`: the built-in models, and the families of pipelines that are tested."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Models:
    """List the built-in models and the families of pipelines that are tested, with what was seen.

    Others may work as well: `rollflow probe --model FOLDER` learns a pipeline, checks it against itself, and says what
    it found.
    """

    def __call__(self) -> None:
        """Runs the command."""
        from rollflow.cli.reports import print_models

        print_models()
