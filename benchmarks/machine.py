"""The machine as benchmarks use it: environments, ports, memory."""

from __future__ import annotations

import argparse
import contextlib
import io
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from supervisor import procfs

from npair.data.dataset import Dataset

ROOT = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).parent / "peers"
MODELS = ROOT / "model_repository"
VERSION = next((MODELS / "npair").glob("[0-9]*"))  # the shipped one


def command_line(doc: str | None, photos: str) -> argparse.ArgumentParser:
    """Return a parser with --photos, a data set. photos: says what is done with them."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--photos", type=Path, default=Path("data/grocery"), help=f"{photos} (%(default)s)"
    )
    return parser


def photos_to_send(dataset: Dataset) -> list[bytes]:
    """Read about 50 val photos, evenly spread. Exits if there is no val."""
    if dataset.val is None:
        sys.exit("the data set has no val photos")
    paths = dataset.val.paths
    return [path.read_bytes() for path in paths[:: max(1, len(paths) // 50)]]


def python_of(name: str, parent: Path) -> Path:
    """The Python of an environment in requirements.txt, which is made on the first use.

    Packages that it lacks, such as the network's, come from npair's own environment.
    """
    folder = parent / name
    python = folder / "bin/python"
    if not (folder / "complete").exists():
        say(f"installing {name}")
        lines = dict(
            line.split(": ")
            for line in (PEERS / "requirements.txt").read_text().splitlines()
            if ": " in line
        )
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *lines[name].split()], check=True
        )
        own, site = (
            subprocess.run(
                [p, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                check=True,
                capture_output=True,
                text=True,
            )
            for p in (sys.executable, python)
        )
        (Path(site.stdout.strip()) / "npair.pth").write_text(own.stdout)
        (folder / "complete").touch()
    return python


def proportional_memory(pid: int) -> float:
    """MB of a process and its descendants by proportional set size (PSS).

    A page that several processes share counts in parts.
    """
    total = 0
    for process in [pid, *descendants(pid)]:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += next(
                int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")
            )
    return total / 1024


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def descendants(pid: int) -> list[int]:
    try:
        children = procfs.children(pid)
    except OSError:
        return []
    return children + [below for child in children for below in descendants(child)]


def pyplot() -> Any:
    import matplotlib  # noqa: PLC0415  # slow to import, and only for pictures

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "npair"  # the same picture from the same numbers
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def resized(photo: bytes, width: int, height: int) -> bytes:
    """Scale a photo, and encode it as a JPEG."""
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("RGB").resize(
        (width, height), Image.Resampling.BICUBIC
    ).save(file, "JPEG", quality=90)
    return file.getvalue()
