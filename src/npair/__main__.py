"""Run npair's commands: ``python -m npair``."""

import sys

from npair.cli import main

sys.exit(main())
