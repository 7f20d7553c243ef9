"""The command line: `rollflow generate | demo | study | bench`."""

from rollflow.cli.commands import main as main
