"""The command line: `rollflow generate | demo | study | serve | bench`."""

from rollflow.cli.commands import main as main
