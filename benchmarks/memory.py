"""Memory of the worst requests that config.pbtxt allows, and of those beyond its limits.

    PYTHONPATH=model/api .venv/bin/python benchmarks/memory.py

Each case has its own server and is compared with the bound that follows from the configuration.
Prints a table in Markdown, of MB above the idle server: at the peak, and ten seconds after the
answer. Memory is the proportional set size of serve.py and its descendants, read every 20 ms. A
case is cut off after a minute: by then, all concurrent decoding has happened. Exits with code 1 if
a peak is above its bound.
"""

from __future__ import annotations

import argparse
import io
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import ROOT, proportional_memory, say
from PIL import Image

from npair.client import (
    InvalidPhotoError,
    NpairClient,
    NpairError,
    RequestTimeoutError,
    UnavailableError,
)
from npair.releasing.config import parameters, parse
from npair.releasing.tune import LocalServer, read_setting, serving
from npair.serving.engine import cores
from npair.serving.preprocess import LARGE

# Bytes that decoding needs per pixel, at worst: a WebP with transparency takes five pictures of
# four bytes per pixel.
PIXEL = 21
# Copies of a request's photos, at most: as received, for the backend, in memory shared with a stub,
# and in the stub.
COPIES = 5
SECONDS, AFTER = 60.0, 10.0


@dataclass(frozen=True)
class Case:
    """Requests with the same photos: ``at_once`` concurrent ones, repeated ``times`` times."""

    name: str
    photos: list[bytes]
    protocols: tuple[str, ...] = ("http", "grpc")
    at_once: int = 1
    times: int = 1

    @property
    def sent(self) -> int:
        """The bytes of all concurrent requests."""
        return self.at_once * sum(map(len, self.photos))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", type=Path, default=ROOT / "model_repository", help="(%(default)s)"
    )
    models = parser.parse_args().models
    config = (models / "npair/config.pbtxt").read_text()
    max_bytes, max_pixels = (int(parameters(config)[key]) for key in ("max_bytes", "max_pixels"))
    batch, instances = parse(config).max_batch_size, read_setting(config).instances
    threads = instances * max(1, cores() // instances)
    decoding = (
        PIXEL * (instances * max_pixels + (threads - instances) * min(LARGE, max_pixels)) / 1e6
    )
    say(
        f"{threads} threads of {instances} instances decode photos of at most {max_pixels:,} "
        f"pixels: {decoding:,.0f} MB"
    )
    print(
        "| requests | protocol | MB sent | peak | bound | after | outcome |",
        "| --- " * 7 + "|",
        sep="\n",
        flush=True,
    )
    good = True
    for case in cases(max_bytes, max_pixels, batch):
        bound = decoding + COPIES * case.sent / 1e6
        for protocol in case.protocols:
            with serving(models) as server:
                peak, after, outcome = measured(server, case, protocol)
            good &= peak <= bound
            values = [f"{value:,.0f}" for value in (case.sent / 1e6, peak, bound)]
            print("|", " | ".join([case.name, protocol, *values, after, outcome]), "|", flush=True)
    return 0 if good else 1


def cases(max_bytes: int, max_pixels: int, batch: int) -> Iterator[Case]:
    side = int(max_pixels**0.5)
    square, wide = (
        Image.new("RGB", (side, side), "red"),
        Image.new("RGBA", (16_000, max_pixels // 16_000), (255, 0, 0, 99)),
    )
    webp = encoded(wide, "WEBP", quality=1, method=0)
    largest = encoded(Image.new("RGB", (64, 64)), "PNG").ljust(max_bytes, b"\0")
    yield Case("PNG, RGBA", [encoded(square.convert("RGBA"), "PNG")])
    yield Case(
        "PNG, 16-bit grey",
        [encoded(Image.fromarray(np.zeros((side, side), np.uint16)), "PNG")],
        ("http",),
    )
    yield Case("PNG, grey and alpha", [encoded(square.convert("LA"), "PNG")], ("http",))
    yield Case("JPEG, grey", [encoded(square.convert("L"), "JPEG")], ("http",))
    yield Case(
        "JPEG, progressive RGB",
        [encoded(square, "JPEG", progressive=True, subsampling=0)],
        ("http",),
    )
    yield Case(
        "JPEG, progressive CMYK",
        [encoded(square.convert("CMYK"), "JPEG", progressive=True)],
        ("http",),
    )
    yield Case("WebP, RGBA", [webp])
    yield Case("WebP, RGBA: 8 requests at once", [webp], at_once=8)
    yield Case(f"WebP, RGBA: {batch} in one request", [webp] * batch)
    yield Case(f"{batch} photos of {max_bytes / 1e6:.0f} MB in one request", [largest] * batch)
    yield Case(f"{max_bytes / 1e6:.0f} MB: 8 requests at once", [largest], at_once=8)
    yield Case(
        "beyond: one row of pixels more",
        [encoded(Image.new("RGBA", (side, max_pixels // side + 1)), "PNG")],
    )
    yield Case("beyond: one byte more", [largest + b"\0"])
    yield Case("beyond: one byte more, 100 times", [largest + b"\0"], times=100)
    yield Case("beyond: one photo more", [encoded(Image.new("RGB", (64, 64)), "PNG")] * (batch + 1))
    yield Case("beyond: one photo of 1 GB", [bytes(10**9)])


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def measured(server: LocalServer, case: Case, protocol: str) -> tuple[float, str, str]:
    """Run a case. Returns: MB above idle at the peak, MB above idle later, and the outcomes."""
    idle, done = proportional_memory(server.pid), threading.Event()
    peaks = [idle]

    def watch() -> None:
        while not done.wait(0.02):
            peaks.append(proportional_memory(server.pid))

    def send(_: int) -> str:
        url = server.http if protocol == "http" else server.grpc
        with NpairClient(
            url, retries=0, timeout=SECONDS, batch_size=1000, batch_bytes=1 << 40
        ) as client:
            try:
                client.embed(case.photos)
            except InvalidPhotoError:
                return "refused by the model"
            except RequestTimeoutError:
                return "cut off"
            except UnavailableError:
                return "refused: waited too long"
            except NpairError:
                return "refused by Triton"
        return "embedded"

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(case.at_once) as pool:
        outcomes = sorted(
            {outcome for _ in range(case.times) for outcome in pool.map(send, range(case.at_once))}
        )
    done.set()
    watcher.join()
    time.sleep(AFTER)
    after = proportional_memory(server.pid) - idle
    return max(peaks) - idle, "" if "cut off" in outcomes else f"{after:,.0f}", ", ".join(outcomes)


if __name__ == "__main__":
    sys.exit(main())
