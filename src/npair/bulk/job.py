"""A bulk job: pieces of a list through actors of a Ray cluster into an output."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by Ray when it is imported

import ray
import ray.data

from npair.bulk import BulkError
from npair.bulk.actor import Embed
from npair.bulk.lists import open_source
from npair.bulk.output import About, Output
from npair.bulk.progress import Counter, Done, shown_progress
from npair.bulk.source import Source
from npair.bulk.storage import absolute
from npair.bulk.version import Version
from npair.serving.engine import cores

TASKS = 100  # for each actor at most, of one piece or several: Ray keeps an object for each


def run(
    photos: str,
    version_folder: str,
    out: str,
    *,
    precision: str = "fp32",
    rows: int = 1000,
    address: str | None = None,
    actors: int | None = None,
    say: Callable[[str], None] = print,
) -> tuple[About, Done]:
    """Embed a list into an output, or continue with what is left of it.

    photos, version_folder, out: locations. precision: one of schema.PRECISIONS.
    rows: photos of a piece, where the list has no parts of its own.
    address: of the Ray cluster; by default, one is started on this machine. actors: by default, as
    many as there are cores, or CPUs of the cluster.
    Returns: what the output holds, and what was embedded now. Raises: BulkError.
    """
    version, output = Version.read(version_folder), Output(out)
    about, manifest = output.about(), version.manifest
    source = open_source(photos, about.kind if about and about.source == absolute(photos) else "")
    wanted = About(
        manifest.model,
        manifest.version,
        version.manifest_sha256,
        precision,
        absolute(photos),
        source.stamp,
        source.unit,
        source.kind,
    )
    if about is None:
        output.begin(wanted, source.pieces(rows))
        about = wanted
    refuse_mixture(output, about, wanted)
    if about.rows is not None:
        output.tidy()
        return about, Done()
    (left, progress), done = output.resume(), Done()
    if progress.done:
        say(f"{progress.done / progress.total:.0%} of {output.location} are done; continuing")
    if left:
        counter, made_of = Counter(), (version, source, output.location, precision)
        with (
            quiet() as stderr,
            cluster(address, actors) as count,
            shown_progress(counter, progress, source.unit, stderr),
        ):
            for piece in embedded(left, count, made_of):
                counter.add(**piece)
        done = counter.done
    return output.complete(about), done


def refuse_mixture(output: Output, about: About, wanted: About) -> None:
    """Raise BulkError if an output is of another version or another list."""
    if (about.model, about.version, about.manifest) != (
        wanted.model,
        wanted.version,
        wanted.manifest,
    ):
        raise BulkError(
            f"{output.location} holds vectors of version {about.version} of {about.model}"
            f" ({about.manifest[:12]}), not of version {wanted.version} of {wanted.model}"
            f" ({wanted.manifest[:12]}); vectors of two versions are never mixed: name another"
            " folder"
        )
    state = "unfinished" if about.rows is None else "complete"
    same = about.source == wanted.source
    if not same or about.stamp != wanted.stamp or about.kind not in ("", wanted.kind):
        raise BulkError(
            f"{output.location} is {state}, with the list {about.source}"
            f"{', which has changed since' if same else ''}; name another folder"
        )
    if about.precision != wanted.precision:
        raise BulkError(
            f"{output.location} is {state}, in {about.precision}; name another folder, or add"
            f" --precision {about.precision}"
        )


@contextlib.contextmanager
def cluster(address: str | None, actors: int | None) -> Iterator[int]:
    """Connect to a Ray cluster, or start one on this machine. Yields: how many actors to run.

    Raises: BulkError if there is none, or for the error of an actor.
    """
    local = {"num_cpus": actors or cores(), "include_dashboard": False}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        ray.init(
            address or "local",  # not None, which takes a cluster that runs here or RAY_ADDRESS
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **({} if address else local),
        )
    except Exception as error:  # Ray raises no other class if a node does not start in time
        where = f"Ray at {address} cannot be reached" if address else "Ray does not start"
        raise BulkError(f"{where}: {error}") from error
    try:
        yield actors or max(1, int(ray.cluster_resources().get("CPU", 0)))
    except ray.exceptions.RayError as error:
        ours = re.search(r"BulkError: (.*)", str(error))
        raise BulkError(ours[1] if ours else f"Ray: {error}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command continues") from None
    finally:
        ray.shutdown()


@contextlib.contextmanager
def quiet() -> Iterator[TextIO]:
    """Send nowhere what Ray's processes and libraries write on stdout and stderr.

    They write it into Ray's own logs as well, below /tmp/ray. Yields: stderr, for npair.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with (
        os.fdopen(os.dup(1), "w") as stdout,
        os.fdopen(os.dup(2), "w") as stderr,
        Path(os.devnull).open("w") as nowhere,
    ):
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield stderr
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)


def embedded(
    left: list[dict[str, Any]], actors: int, made_of: tuple[Version, Source, str, str]
) -> Iterator[dict[str, Any]]:
    """Run pieces through actors, which write their rows.

    made_of: the arguments of Embed. Yields: for each piece, the fields of progress.Done.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # No stage of Ray Data reads or writes: each would start processes beside the actors.
    pieces = ray.data.from_items(left, override_num_blocks=min(len(left), TASKS * actors))
    version, *others = made_of
    done = pieces.map_batches(
        Embed,
        fn_constructor_args=(ray.put(version), *others),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    for batch in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()
