"""Cost of metrics: a server with them beside one without, in turns, as ratios.

    PYTHONPATH=model/api .venv/bin/python benchmarks/observing.py

By default of a version's own metrics; with --percentiles, of Triton's percentiles of latency. Run
nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from costs import cpu_seconds
from machine import MODELS, ROOT, VERSION
from PIL import Image, ImageFilter

import npair.serving
from npair.data.sources import read_dataset
from npair.publishing.drawings import encode
from npair.publishing.version_folder import CODE
from npair.releasing.traffic import closed
from npair.releasing.tune import LocalServer, markdown, serving
from npair.serving.embedder import UNLIMITED, Embedder
from npair.serving.manifest import Manifest

CONNECTIONS = (1, 16)
SILENT = """

class Silent:
    def __init__(self, embedder, _):
        embedder._count = self.batch

    def batch(self, *_):
        pass

    close = batch


Report = Silent
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        help="turns of each server and number of connections (%(default)s)",
    )
    parser.add_argument("--seconds", type=float, default=3, help="of a turn (%(default)s)")
    parser.add_argument(
        "--percentiles",
        action="store_true",
        help="measure Triton's percentiles of latency instead of a version's metrics",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a data set whose val photos are embedded, changed in several ways",
    )
    arguments = parser.parse_args()
    if arguments.data:
        lengths(read_dataset(arguments.data).splits["val"].paths)
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        models = prepared(scratch / "models", "")
        if arguments.percentiles:
            without = serving(models, api_without_percentiles(scratch))
        else:
            without = serving(prepared(scratch / "silent", SILENT))
        servers = {"without": without, "with": serving(models)}
        photos = [path.read_bytes() for path in sorted(models.glob("npair/*/golden/*.jpg"))]
        compare(
            {name: stack.enter_context(server) for name, server in servers.items()},
            photos,
            arguments.rounds,
            arguments.seconds,
        )


def compare(
    servers: Mapping[str, LocalServer], photos: Sequence[bytes], rounds: int, seconds: float
) -> None:
    """Load the servers "with" and "without" in turns, and print medians and paired ratios."""
    head = "connections", "photos a second, without", "of that, with"
    rows = []
    for connections in CONNECTIONS:
        rates: dict[str, list[float]] = {name: [] for name in servers}
        costs: dict[str, list[float]] = {name: [] for name in servers}
        for turn in range(-1, rounds):  # the first warms up
            for name in sorted(servers, reverse=turn % 2 == 0):
                before = sum(cpu_seconds(servers[name].pid).values())
                load = closed(servers[name].http, photos, connections, seconds)
                if turn >= 0:
                    rates[name].append(load.rate)
                    used = sum(cpu_seconds(servers[name].pid).values()) - before
                    costs[name].append(1e3 * used / (load.rate * seconds))
        paired = [
            median(on / off for on, off in zip(each["with"], each["without"], strict=True))
            for each in (rates, costs)
        ]
        rows.append(
            (
                connections,
                f"{median(rates['without']):.0f}",
                f"{paired[0]:.3f}",
                f"{median(costs['without']):.2f}",
                f"{paired[1]:.3f}",
            )
        )
    print(markdown((*head, "CPU ms a photo, without", "of that, with"), rows))


def lengths(paths: Sequence[Path]) -> None:
    changes: dict[str, Callable[[Image.Image], Image.Image]] = {
        "as they are": lambda image: image,
        "grey": lambda image: image.convert("L"),
        "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(12)),
        "a quarter as bright": lambda image: image.point(lambda level: level // 4),
        "black": lambda image: image.point(lambda _: 0),
        "noise": lambda image: Image.effect_noise(image.size, 100),
    }
    print("| photos | mean length |\n| --- | --- |")
    for name, change in changes.items():
        embedder = Embedder(VERSION, cores=2)
        for path in paths:
            with Image.open(path) as image:
                embedder.embed_photos(
                    [encode(change(image.convert("RGB")), "JPEG", quality=90)], UNLIMITED
                )
        print(f"| {name} | {embedder.work.norm / embedder.work.photos:.2f} |")
        embedder.close()


def api_without_percentiles(scratch: Path) -> Path:
    """Copy model/api, without Triton's percentiles. Returns: its serve.py."""
    shutil.copytree(ROOT / "model/api", scratch / "api")
    with (scratch / "api/supervisor/launch.py").open("a") as file:
        file.write("\nSUMMARIES = ()\n")
    return scratch / "api/serve.py"


def prepared(models: Path, code: str) -> Path:
    """Copy the models, with the current code, to which ``code`` is appended."""
    shutil.copytree(MODELS, models, ignore=shutil.ignore_patterns("__pycache__"))
    version = next((models / "npair").glob("[0-9]*"))
    for name in CODE:
        shutil.copyfile(Path(npair.serving.__path__[0]) / name, version / name)
    with (version / "model.py").open("a") as file:
        file.write(code)
    Manifest.read(version).write(version)
    return models


if __name__ == "__main__":
    main()
