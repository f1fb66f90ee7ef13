"""Run the commands, as ``python -m client`` or ``python -m npair.client``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
