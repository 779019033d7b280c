"""`python -m headrace.cli`: the `headrace` command where no script is installed."""

import sys

from headrace.cli import main

sys.exit(main())
