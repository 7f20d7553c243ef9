"""The command line: `rollflow generate | demo | study | serve | jobs | bench`."""

from rollflow.cli.commands import main as main
