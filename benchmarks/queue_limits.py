"""What Triton's limits of the queue cost: photos per second and latency with and without them.

    PYTHONPATH=model/api .venv/bin/python benchmarks/queue_limits.py --photos data/grocery

Two servers take turns: one with the shipped config.pbtxt, and one with a queue policy in it.
Prints a table in Markdown, of medians and the worst p99. Needs: wrk (Debian: apt install wrk).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from statistics import median

from contestants import RAW
from machine import MODELS, command_line, photos_to_send
from wrk import Load, closed_loop, write_bodies

from npair.data.sources import read_dataset
from npair.releasing.tune import markdown, serving

CONNECTIONS = (8, 16, 32)
BATCHING = "dynamic_batching {"
POLICY = " default_queue_policy { default_timeout_microseconds: 5000000 max_queue_size: 128 }"
VECTOR = 512  # bytes


def main() -> None:
    parser = command_line(__doc__, "a data set; its val photos are sent")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--seconds", type=int, default=6, help="of each load (%(default)s)")
    arguments = parser.parse_args()
    photos = photos_to_send(read_dataset(arguments.photos))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_bodies(photos, scratch / "bodies", lambda photo: photo, RAW)
        limited = Path(shutil.copytree(MODELS, scratch / "models"))
        config = limited / "npair/config.pbtxt"
        text = config.read_text()
        assert BATCHING in text
        assert "default_queue_policy" not in text
        config.write_text(text.replace(BATCHING, BATCHING + POLICY))
        loads: dict[tuple[str, int], list[Load]] = {}
        for _ in range(arguments.rounds):
            for limits, models in (("yes", limited), ("no", MODELS)):
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
    head = ["connections", "Triton's limits", "photos/s", "p50 ms", "p99 ms", "worst p99 ms"]
    print(markdown(head, rows))


if __name__ == "__main__":
    main()
