"""Run a command beside a cluster, inside the namespaces that scripts/with_cluster.py makes.

Arguments: kubernetes or swarm, the folders of its state and of the cache, and the command.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from cluster import kubernetes, swarm
from cluster.binaries import binaries
from cluster.image import archive
from cluster.machines import bridge
from image.commands import end_in_order, step


def main(kind: str, scratch: Path, cache: Path, command: list[str]) -> NoReturn:
    end_in_order()
    bridge()
    with contextlib.ExitStack() as stack:
        if kind == "swarm":
            swarm.start(stack, scratch, archive(cache))
        else:
            kubernetes.start(stack, scratch, binaries(cache), archive(cache))
        step("run")
        code = subprocess.run(command, check=False).returncode
        os._exit(code)  # all else ends with this process, the first of its namespace


if __name__ == "__main__":
    kind, scratch, cache, *command = sys.argv[1:]
    main(kind, Path(scratch), Path(cache), command)
