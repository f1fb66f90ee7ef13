"""The commands: embed, compare, rank and ready."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from .client import NpairClient, log
from .environment import default_url, from_environment
from .errors import (
    AccessDeniedError,
    InvalidPhotoError,
    NpairError,
    UnreachableError,
    VersionGoneError,
)
from .photos import Unread, photos_in
from .pool import BACKOFF_SECONDS
from .results import Vectors
from .rows import (
    SAVED_SUFFIXES,
    Rows,
    Saved,
    alone,
    load_saved,
    resume,
    say,
    shown,
    write_npz,
)

EXIT_OK, EXIT_PHOTOS, EXIT_USAGE, EXIT_SERVER = 0, 1, 2, 3
EXIT_INTERRUPTED, EXIT_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # as shells report them
# The next step after an error; the first match counts.
REMEDIES = {
    UnreachableError: "start a server (make serve), or name another: --url or NPAIR_URL",
    AccessDeniedError: "NPAIR_API_KEY holds the key",
}

Options = argparse.Namespace
Command = Callable[[NpairClient, Options], int]


def main() -> int:
    """Run the command that sys.argv names and return its exit code."""
    parser = argparse.ArgumentParser(
        description="Embed and compare photos with an npair server.",
        epilog="Run a command with --help for its options.",
    )
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    options = parser.parse_args()
    print_any_name()
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    return code


def print_any_name() -> None:
    """Let standard output escape what its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to a parser. ``options.command(options)`` runs one; see ``run``."""
    shared = argparse.ArgumentParser(add_help=False)
    server = shared.add_argument_group("server")
    where = "http(s):// or grpc(s)://host:port (NPAIR_URL; default: %(default)s)"
    server.add_argument("--url", default=default_url(), help=where)
    server.add_argument("--version", metavar="N", help="pin a version of the model")
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    wait = "give up if the server has not answered for this long (default: %(default)g)"
    server.add_argument("--wait", default=5.0, help=wait, **seconds)
    timeout = "how long to wait for the answer to one request (default: %(default)g)"
    server.add_argument("--timeout", default=30.0, help=timeout, **seconds)

    def add(
        name: str, command: Command, summary: str, more: str = "", printed: str = "print JSON"
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            parents=[shared],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}",
            epilog="NPAIR_API_KEY, or the content of the file NPAIR_API_KEY_FILE, is sent as a"
            " bearer token. For https:// and grpcs://, NPAIR_CA names certificates (PEM) to trust,"
            " NPAIR_CERT and NPAIR_KEY a certificate to show and its key. Exit codes: 0 done, 1 a"
            " photo was left out, 2 wrong usage, 3 the server failed.",
        )
        added.add_argument("--json", action="store_true", help=printed)
        added.set_defaults(command=partial(run, command), prog=added.prog)
        return added

    embedding = add(
        "embed",
        embed,
        "embed photos: JSON lines on standard output, or a file",
        "Of folders, it takes the photos in them and below, but no hidden files. AVIF, BMP, GIF,"
        " HEIC and TIFF are converted if Pillow and pillow-heif are installed"
        " (pip install 'npair[heic]'). Photos that cannot be embedded are named and counted.",
        "with --out, print the counts as JSON",
    )
    photos = "photo files or folders; - is a photo on standard input"
    embedding.add_argument("photos", nargs="+", type=Path, metavar="PHOTO", help=photos)
    out = "write vectors.npz or vectors.jsonl; after an interruption, the same command goes on"
    embedding.add_argument("--out", type=Path, metavar="FILE", help=out)
    comparison = add("compare", compare, "tell whether two photos show the same product")
    one = "a photo, - for standard input, or a file that embed made of one photo (.npz, .jsonl)"
    for name in "ab":
        comparison.add_argument(name, type=Path, metavar=name.upper(), help=one)
    far = (
        "percentage of pairs of different products that may count as the same"
        " (default: %(default)s)"
    )
    comparison.add_argument("--far", type=float, choices=(1.0, 0.1), default=1.0, help=far)
    ranking = add("rank", rank, "print the photos that are most similar to a query")
    query = "a photo, or - for standard input"
    ranking.add_argument("query", type=Path, metavar="QUERY", help=query)
    saved = "photo files, folders, or files that embed made (.npz, .jsonl)"
    ranking.add_argument("gallery", nargs="+", type=Path, metavar="PHOTO", help=saved)
    ranking.add_argument("-k", type=int, default=5, help="how many to print (default: %(default)s)")
    add(
        "ready",
        ready,
        "tell whether the model embeds photos, and if not, why",
        "It embeds a photo of one pixel, since Triton's own readiness says less.",
    )


def run(command: Command, options: Options) -> int:
    """Run a command on a client. Returns: an exit code; errors become one line on stderr.

    Raises: BrokenPipeError if the reader of standard output is gone.
    """

    def fail(reason: object, code: int) -> int:
        say(f"{options.prog}: {reason}")
        return code

    pinned = {"version": options.version, "timeout": options.timeout}
    try:
        with connected(options.url, options.wait, **pinned) as client:
            return command(client, options)
    except BrokenPipeError:
        raise
    except (InvalidPhotoError, OSError) as error:
        return fail(error, EXIT_PHOTOS)
    except NpairError as error:
        return fail(f"{options.url}: {reason_of(error)}", EXIT_SERVER)
    except ValueError as error:
        return fail(error, EXIT_USAGE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def connected(url: str, wait: float, **options: Any) -> Iterator[NpairClient]:
    """Provide a client that says why it tries again, and does so for at most ``wait`` seconds.

    options: NpairClient's, besides those of the environment.
    Raises: ValueError for another ``wait`` than 0 to 1000000, and for wrong options.
    """
    log.handlers = [Retries()]
    log.setLevel(logging.INFO)
    if not 0 <= wait <= 1e6:
        raise ValueError(f"--wait must be a number of seconds from 0 to 1000000, got {wait}")
    retries = int(math.log2(wait / BACKOFF_SECONDS + 1))  # as many as their pauses leave time for
    options |= {"retries": retries, "retry_seconds": wait}
    with NpairClient(url, **options, **from_environment()) as client:
        yield client


def reason_of(error: NpairError) -> str:
    """Describe an error, and the next step."""
    remedies = (remedy for kind, remedy in REMEDIES.items() if isinstance(error, kind))
    return "; ".join([str(error), *remedies])


class Retries(logging.Handler):
    """Prints each reason for a retry once, when it comes up."""

    def __init__(self) -> None:
        super().__init__()
        self._said = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            say(text)


def embed(client: NpairClient, options: Options) -> int:
    """Print a line of JSON for each photo, or write a file."""
    if options.out is not None:
        return _embed_to(options.out, client, options)
    # A terminal that shows the rows needs no bar between them.
    rows = Rows(client, options.photos, show_progress=not sys.stdout.isatty())
    for line in rows:
        print(json.dumps(line))
    return EXIT_PHOTOS if rows.left_out else EXIT_OK


def _embed_to(out: Path, client: NpairClient, options: Options) -> int:
    """Collect rows in a file beside ``out``, from which an interrupted run goes on; then write
    ``out``. Memory does not grow with the number of photos.
    """
    if out.suffix not in (".npz", ".jsonl"):
        raise ValueError(f"--out must end in .npz or .jsonl, got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"--out must be in an existing folder, got {out}")
    with alone(out.with_name(out.name + ".unfinished")) as unfinished:
        return _go_on(unfinished, out, client, options)


def _go_on(unfinished: IO[bytes], out: Path, client: NpairClient, options: Options) -> int:
    path = Path(unfinished.name)
    done = resume(unfinished, client)
    if strange := done.difference(map(str, photos_in(options.photos))) if done else None:
        other = f"is of another command: it has {shown(min(strange))}; repeat that one"
        raise ValueError(f"{path} {other}, or delete the file")
    rows, version, embedded = Rows(client, options.photos, done), client.version, len(done)
    try:
        for row in rows:
            version = row["version"]
            unfinished.write(json.dumps(row).encode() + b"\n")
            unfinished.flush()
            embedded += 1
        if embedded and out.suffix == ".npz":
            write_npz(path, out)
    except VersionGoneError as error:
        served = client.versions() if embedded and not options.version else None
        if not served:
            raise
        say(f"{error}: all photos are embedded again")
        unfinished.truncate(0)
        client.version = options.version = max(served, key=int)  # pinned, so this happens once
        return _go_on(unfinished, out, client, options)
    except (NpairError, OSError, KeyboardInterrupt):
        if embedded:
            say(f"{embedded} photos are in {path}, and the same command goes on after them")
        raise
    finally:
        if not embedded:
            path.unlink(missing_ok=True)
    if not embedded:
        return EXIT_PHOTOS
    if out.suffix == ".npz":
        path.unlink()
    else:
        path.replace(out)
    counts = {"embedded": embedded, "left_out": rows.left_out}
    if options.json:
        print(json.dumps({"out": str(out), **counts, "model": client.model, "version": version}))
    else:
        made_by = f"{client.model} version {version}"
        print(f"{embedded} photos embedded by {made_by} in {shown(out)}, {rows.left_out} left out")
    return EXIT_PHOTOS if rows.left_out else EXIT_OK


def compare(client: NpairClient, options: Options) -> int:
    """Print the cosine of two photos, and a verdict if the version has thresholds."""
    saved = [path for path in (options.a, options.b) if path.suffix in SAVED_SUFFIXES]
    photos = [path for path in (options.a, options.b) if path not in saved]
    vectors: list[Vectors] = []
    loaded = load_saved(saved, client)
    for path, (_, rows) in zip(saved, loaded, strict=True):
        if len(rows) != 1:
            several = f"{path} holds the vectors of {len(rows)} photos"
            raise ValueError(f"{several}, and compare takes one; rank takes more")
        vectors += [*rows]
    vectors += _embedded(photos, client, loaded)
    cosine, version, threshold = float(vectors[0] @ vectors[1]), client.version, None
    thresholds = client.thresholds()
    if thresholds is not None and thresholds.version == version:
        threshold = thresholds.far_1_percent if options.far == 1 else thresholds.far_01_percent
    same = None if threshold is None else cosine >= threshold
    if options.json:
        known = {} if threshold is None else {"threshold": threshold, "far": options.far / 100}
        print(json.dumps({"cosine": cosine, "version": version, "same_product": same, **known}))
    elif threshold is None:
        reason = f"the server's configuration has no such threshold for version {version}"
        print(f"cosine {cosine:.4f}; no verdict: {reason}")
    else:
        verdict, sign = ("same product", ">=") if same else ("different products", "<")
        share = f"{options.far:g} % of pairs of different products"
        print(f"{verdict}: cosine {cosine:.4f} {sign} {threshold:.4f}, which {share} reach")
    return EXIT_OK


def rank(client: NpairClient, options: Options) -> int:
    """Print the photos of a gallery that are most similar to a query, the nearest first."""
    if options.k < 1:
        raise ValueError(f"-k must be at least 1, got {options.k}")
    # Saved vectors first: they pin the version that must embed the rest.
    paths = [path for path in options.gallery if path.suffix in SAVED_SUFFIXES]
    saved = load_saved(paths, client)
    names = [name for of_file, _ in saved for name in of_file]
    blocks = [vectors for _, vectors in saved]
    (query,) = _embedded([options.query], client, saved)
    left_out = 0
    if photos := [path for path in options.gallery if path not in paths]:
        rows = Rows(client, photos)
        for row in rows:
            names.append(row["photo"])
            blocks.append(np.array([row["embedding"]], np.float32))
        left_out = rows.left_out
    if not names:
        return EXIT_PHOTOS
    cosines = np.concatenate(blocks) @ query
    best = np.argsort(-cosines, kind="stable")[: options.k]
    if options.json:
        ranked = [{"photo": names[index], "cosine": float(cosines[index])} for index in best]
        print(json.dumps({"version": client.version, "ranked": ranked, "left_out": left_out}))
    else:
        print(*(f"{cosines[index]:.4f}  {shown(names[index])}" for index in best), sep="\n")
    return EXIT_PHOTOS if left_out else EXIT_OK


def ready(client: NpairClient, options: Options) -> int:
    """Print whether the model embeds photos, and if not, why."""
    reason = None
    try:
        client.check(client.retries)
    except NpairError as error:
        reason = reason_of(error)
    state = "ready" if reason is None else f"not ready: {reason}"
    told = {"ready": reason is None} if reason is None else {"ready": False, "reason": reason}
    print(json.dumps(told) if options.json else f"{client.model} at {options.url} is {state}")
    return EXIT_OK if reason is None else EXIT_SERVER


def _embedded(photos: Sequence[Path], client: NpairClient, saved: Sequence[Saved]) -> list[Vectors]:
    """Embed photos, each float32 [128], and pin the client to the version.

    Raises: OSError, or ValueError if saved vectors have another length.
    """
    stream = client.stream(Unread(photo) for photo in photos)
    results = list(stream)
    if refused := [each for each in results if each.reason]:
        raise OSError("; ".join(f"{shown(photos[each.index])}: {each.reason}" for each in refused))
    if results:
        client.version = stream.version
    vectors = [each.vector for each in results if each.vector is not None]
    lengths = [rows.shape[1] for _, rows in saved] + [len(vector) for vector in vectors]
    if len(set(lengths)) > 1:
        numbers = f"vectors of {lengths[0]} numbers, and the server gives {lengths[-1]}"
        raise ValueError(f"the files hold {numbers}; embed their photos again")
    return vectors
