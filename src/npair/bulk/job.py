"""A bulk job: pieces of a list through actors of a Ray cluster into an output."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read by Ray when it is imported

import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import FilenameProvider

from npair.bulk import BulkError
from npair.bulk.actor import Embed
from npair.bulk.lists import open_source
from npair.bulk.output import About, Output, Progress
from npair.bulk.progress import Counter, Done, shown_progress
from npair.bulk.schema import DICTIONARIES, PREFIX
from npair.bulk.source import Source
from npair.bulk.storage import absolute
from npair.bulk.version import Version
from npair.serving.engine import cores

# CPUs beside those of the actors: one for Ray's filter of what is written already, one for tasks
# that read pieces and write rows, and more of these in a large cluster. If the actors had all, a
# continued job would never end.
SPARE, MANY = 2, 32
WRITING = {"num_cpus": 0.25}  # a task that writes waits for the store


class Names(FilenameProvider):  # type: ignore[misc]  # Ray's types are skipped
    """Names files by job and task, from which Ray's checkpoints know what to delete."""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"{PREFIX}{write_uuid}-{task_index:08}.parquet"


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
    many as there are cores, or a few less than the CPUs of a cluster.
    Returns: what the output holds, and what was embedded now. Raises: BulkError.
    """
    version, output, source = Version.read(version_folder), Output(out), open_source(photos)
    manifest = version.manifest
    wanted = About(
        manifest.model,
        manifest.version,
        version.manifest_sha256,
        precision,
        absolute(photos),
        source.stamp,
        source.unit,
    )
    about = output.about()
    if about is None:
        output.begin(wanted, source.pieces(rows))
        about = wanted
    refuse_mixture(output, about, wanted)
    if about.rows is not None:
        output.tidy()
        return about, Done()
    progress, done = output.resume(), Done()
    if progress.done:
        say(f"{progress.done / progress.total:.0%} of {output.location} are done; continuing")
    if progress.done < progress.total:
        with quiet() as stderr, cluster(address, actors) as count:
            done = embed(
                version, source, output, progress, precision=precision, actors=count, stderr=stderr
            )
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
    if about.source != wanted.source or about.stamp != wanted.stamp:
        same = about.source == wanted.source
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
    local = {"num_cpus": (actors or cores()) + SPARE, "include_dashboard": False}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **({} if address else local),
        )
    except Exception as error:  # Ray raises no other class if a node does not start in time
        where = f"Ray at {address} cannot be reached" if address else "Ray does not start"
        raise BulkError(f"{where}: {error}") from error
    try:
        found = int(ray.cluster_resources().get("CPU", 0))
        yield actors or max(1, found - SPARE - found // MANY)
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


def embed(
    version: Version,
    source: Source,
    output: Output,
    progress: Progress,
    *,
    precision: str,
    actors: int,
    stderr: TextIO,
) -> Done:
    """Run the pieces that are left through actors. Raises: BulkError."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.checkpoint_config = CheckpointConfig(
        "piece",
        output.checkpoints,
        override_filesystem=output.system,
        delete_checkpoint_on_success=False,  # only once the output is checked
    )
    counter = ray.remote(num_cpus=0)(Counter).remote()
    constructed = (ray.put(version), source, precision, counter)
    pieces = ray.data.read_parquet(output.plan, filesystem=output.system)
    rows = pieces.repartition(target_num_rows_per_block=1).map_batches(
        Embed,
        fn_constructor_args=constructed,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    with shown_progress(counter, progress, source.unit, stderr):
        rows.write_parquet(
            output.path,
            filesystem=output.system,
            filename_provider=Names(),
            ray_remote_args=WRITING,
            use_dictionary=DICTIONARIES,
        )
    done: Done = ray.get(counter.read.remote())
    return done
