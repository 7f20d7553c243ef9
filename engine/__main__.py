"""`python -m rollflow` is `rollflow`."""

import sys

from rollflow.cli.commands import main

sys.exit(main())
