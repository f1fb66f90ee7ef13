"""Count the usable cores; test_embedder.py and tests/server cover the engines."""

from __future__ import annotations

import os
import subprocess
import sys

from npair.serving.engine import cores


def test_cores_are_those_of_the_affinity() -> None:
    assert 1 <= cores() <= len(os.sched_getaffinity(0))
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}});"
        "from npair.serving.engine import cores; print(cores())"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        == "1\n"
    )
