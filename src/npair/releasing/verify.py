"""Verify a published version without a server."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

from npair.releasing import ReleaseError
from npair.serving.engine import cores
from npair.serving.manifest import NAME, Manifest, VersionError

SCHEMA = 3  # of the manifests that this code writes, and the highest that it knows
Checked = dict[str, dict[str, float | str]]


def verify(folder: Path, engine: str = "", *, number: int | None = None) -> Checked:
    """Check the manifest and the files, and embed the golden set with the version's own code.

    engine: the only engine to try; by default, all of the manifest's. number: see
    ``read_manifest``.
    Returns: ``golden_distance`` and ``tolerance`` for each engine, or ``cannot_run`` with the
    reason on this machine.
    Raises: ReleaseError if anything is wrong, or no engine runs on this machine.
    """
    manifest = read_manifest(folder, number)
    check_files(folder, manifest)
    checked: Checked = {}
    try:
        with published_code(folder) as code:
            for name in [engine] if engine else manifest.engines:
                try:
                    embedder = code.Embedder(folder, cores=cores(), engine=name)
                except code.EngineError as error:
                    checked[name] = {"cannot_run": str(error)}
                    continue
                embedder.close()
                tolerance = manifest.engines[name].tolerance
                distance = embedder.golden_distance
                checked[name] = {"golden_distance": distance, "tolerance": tolerance}
    except ModuleNotFoundError as error:
        reason = f"its code needs {error.name}: pip install 'npair[release]'"
        raise ReleaseError(f"{folder}: {reason}") from error
    except Exception as error:  # published code has exception classes of its own
        raise ReleaseError(f"{folder}: {error}") from error
    if all("cannot_run" in outcome for outcome in checked.values()):
        reasons = "; ".join(f"{name}: {outcome['cannot_run']}" for name, outcome in checked.items())
        none = "none of its engines runs here to embed the golden set"
        raise ReleaseError(f"{folder}: {none}: {reasons}")
    return checked


def read_manifest(folder: Path, number: int | None = None) -> Manifest:
    """Read a version's manifest, and check what its types do not tell.

    number: that of the version's folder in its repository. Raises: ReleaseError.
    """
    try:
        manifest = Manifest.read(folder)
    except VersionError as error:
        raise ReleaseError(str(error)) from error
    if manifest.schema > SCHEMA:
        raise ReleaseError(
            f"{folder}: it was published by a newer npair, with schema {manifest.schema} of"
            f" {NAME}; this npair knows {SCHEMA}"
        )
    try:
        sum(manifest.recall_at_1().values())
    except (AttributeError, LookupError, TypeError) as error:
        raise ReleaseError(f"{folder}: {NAME} has metrics of another shape: {error!r}") from error
    if number is not None:
        check_number(manifest, number)
    return manifest


def check_number(manifest: Manifest, number: int) -> None:
    """Raise ReleaseError if a version lies under a number that is not its own, as a copy does."""
    if manifest.version != number:
        raise ReleaseError(
            f"the folder of version {number} holds version {manifest.version}; to give it that"
            " number, publish it again: npair publish --run FOLDER"
        )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare a version's files with its manifest, and compile its model.py.

    Raises: ReleaseError if a file is missing, changed or not listed, or model.py is not Python.
    """
    try:
        manifest.check(folder)
    except VersionError as error:
        raise ReleaseError(str(error)) from error
    present = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    if strange := present - set(manifest.files) - {NAME}:
        raise ReleaseError(f"{folder}: {', '.join(sorted(strange))} was not published; delete it")
    try:
        # Compiled, not run: model.py imports Triton's own module.
        compile((folder / "model.py").read_bytes(), "model.py", "exec")
    except (OSError, ValueError, SyntaxError) as error:
        raise ReleaseError(f"{folder}: model.py cannot be run: {error}") from error


@contextlib.contextmanager
def published_code(folder: Path) -> Iterator[types.ModuleType]:
    """Import a version's own embedder.py from source, and forget it at the end of the block."""
    package = types.ModuleType("npair_published")
    package.__path__ = [str(folder)]
    # Ignore bytecode in the folder, and write none there.
    before, sys.pycache_prefix = sys.pycache_prefix, tempfile.mkdtemp(prefix="npair-verify-")
    sys.modules[package.__name__] = package
    try:
        yield importlib.import_module(f"{package.__name__}.embedder")
    finally:
        shutil.rmtree(sys.pycache_prefix, ignore_errors=True)
        sys.pycache_prefix = before
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]
