"""What the limits of the queue cost: photos per second and latency with and without them.

    PYTHONPATH=model/api .venv/bin/python benchmarks/queue_limits.py --photos data/grocery

Two servers take turns: one with the shipped config.pbtxt, one without its default_queue_policy.
Prints a table in Markdown, of medians and the worst p99. Needs: wrk (Debian: apt install wrk).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from statistics import median

from contestants import RAW
from machine import MODELS, command_line
from wrk import Load, closed_loop, write_bodies

from npair.data.sources import read_dataset
from npair.releasing.tune import markdown, serving

CONNECTIONS = (8, 16, 32)
POLICY = r" default_queue_policy \{[^}]*\}"
VECTOR = 512  # bytes


def main() -> None:
    parser = command_line(__doc__, "a data set; its val photos are sent")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--seconds", type=int, default=6, help="of each load (%(default)s)")
    arguments = parser.parse_args()
    dataset = read_dataset(arguments.photos)
    paths = (dataset.val or dataset.train).paths
    photos = [path.read_bytes() for path in paths[:: max(1, len(paths) // 50)]]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_bodies(photos, scratch / "bodies", lambda photo: photo, RAW)
        unlimited = Path(shutil.copytree(MODELS, scratch / "models"))
        config = unlimited / "npair/config.pbtxt"
        text, found = re.subn(POLICY, "", config.read_text())
        assert found == 1, "config.pbtxt has no default_queue_policy"
        config.write_text(text)
        loads: dict[tuple[str, int], list[Load]] = {}
        for _ in range(arguments.rounds):
            for limits, models in (("yes", MODELS), ("no", unlimited)):
                with serving(models) as server:
                    url = f"{server.http}/v2/models/npair/infer"
                    closed_loop(url, scratch / "bodies", 8, 2, least=VECTOR)  # warm-up
                    for connections in CONNECTIONS:
                        load = closed_loop(
                            url, scratch / "bodies", connections, arguments.seconds, least=VECTOR
                        )
                        loads.setdefault((limits, connections), []).append(load)
    rows = []
    for connections in CONNECTIONS:
        for limits in ("yes", "no"):
            of = loads[limits, connections]
            rate, p50, p99 = (
                median(getattr(one, key) for one in of) for key in ("rate", "p50", "p99")
            )
            worst = max(one.p99 for one in of)
            rows.append([connections, limits, *map("{:.0f}".format, (rate, p50, p99, worst))])
    head = ["connections", "limits", "photos/s", "p50 ms", "p99 ms", "worst p99 ms"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
