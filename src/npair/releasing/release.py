"""Promote, roll back and retire versions. On any failure, the previous version keeps serving.

A promotion verifies a version and then rewrites config.pbtxt in one step. If a server does not
load the version, or answers its golden set wrongly, config.pbtxt is restored. For the way back,
config.pbtxt lists earlier versions in its parameter ``served_before``, and fallback.json holds the
whole configuration of the last of them, which serve.py loads if it starts with a broken pin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from npair.client import THRESHOLD_PARAMETERS
from npair.releasing import ReleaseError
from npair.releasing.config import as_json, parameters, pinned, with_release
from npair.releasing.control import Server, on_all, try_all
from npair.releasing.repository import Repository
from npair.releasing.verify import check_files, check_number, read_manifest, verify
from npair.serving.manifest import NAME, Manifest

FALLBACK = "fallback.json"
REMEMBERED = 10  # earlier versions
Say = Callable[[str], object]


def promote(
    repository: Repository,
    number: int,
    servers: Sequence[Server],
    *,
    keep: int | None = None,
    say: Say = lambda _: None,
) -> None:
    """Verify a version and have the servers switch to it.

    keep: a lower version to serve beside it, for requests that name it, so that an index can be
    rebuilt meanwhile. Requests that name no version go to the highest.
    say: is told what cannot be served again, and that the previous state is being restored.
    Raises: ReleaseError if the version or a server fails, after restoring the previous state;
    RepositoryError, ConfigError.
    """
    if keep is not None and keep >= number:
        raise ReleaseError(
            f"--keep must be a version below {number}: requests that name none go to the highest"
        )
    with repository.exclusive():
        config = _config(repository)
        served = [*_served_before(config), pinned(config)[-1]]
        history = _whole(repository, [version for version in served if version != number], say)
        _serve(repository, number, servers, keep=keep, history=history[-REMEMBERED:], say=say)


def rollback(
    repository: Repository, servers: Sequence[Server], *, say: Say = lambda _: None
) -> int:
    """Switch to the last version served before that is whole, alone. Returns: it.

    say, Raises: as promote.
    """
    with repository.exclusive():
        history = _whole(repository, _served_before(_config(repository)), say)
        if not history:
            raise ReleaseError(
                "nothing was served before that is still there; promote the version that you want"
            )
        number = history.pop()
        history = _whole(repository, history, say)
        _serve(repository, number, servers, keep=None, history=history, say=say)
        return number


def bring_along(
    repository: Repository,
    servers: Sequence[Server],
    find: Callable[[], list[Server]],
    seconds: float,
) -> list[Server]:
    """Have servers that join within some seconds of a change load what config.pbtxt pins.

    They may have read it just before it changed.
    servers: those that have changed. find: returns all that there are.
    Returns: those that joined. Raises: ReleaseError if one of them still fails at the end;
    RepositoryError, ConfigError.
    """
    joined: list[Server] = []
    deadline = time.monotonic() + seconds
    while True:
        known = {server.url for server in (*servers, *joined)}
        new = [server for server in find() if server.url not in known]
        failed = _load_pinned(repository, new) if new else {}
        joined += [server for server in new if server not in failed]
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    if failed:
        raise ReleaseError(
            f"not all servers that joined have changed: {'; '.join(failed.values())}"
        )
    return joined


def retire(
    repository: Repository, number: int, servers: Sequence[Server], *, say: Say = lambda _: None
) -> None:
    """Remove a version that is not served.

    say: is told what cannot be served again.
    Raises: ReleaseError if it is served or missing; RepositoryError, ConfigError.
    """
    with repository.exclusive():
        if number not in repository.versions():
            raise ReleaseError(f"there is no version {number} in {repository.location}")
        config = _config(repository)
        if number in pinned(config):
            raise ReleaseError(f"version {number} is pinned by config.pbtxt; promote another first")

        def check_idle(server: Server) -> None:
            if number in (serving := server.serving()):
                raise ReleaseError(f"version {number} is still served by {server.url}")
            if not serving:
                raise ReleaseError(
                    f"{server.url} serves no version, and may be loading this one; try again later"
                )

        on_all(check_idle, servers)
        repository.remove(number)
        history = [version for version in _served_before(config) if version != number]
        history = _whole(repository, history, say)
        _write_fallback(repository, history)
        changed = with_release(config, pinned(config), _history_parameter(history))
        repository.write("config.pbtxt", changed.encode())
        if not history:
            repository.delete(FALLBACK)


def check_pins(repository: Repository) -> list[int]:
    """Check that the pinned versions exist and config.pbtxt describes the highest to clients.

    Returns: the pinned versions, ascending. Raises: ReleaseError, ConfigError.
    """
    config = _config(repository)
    pins, present = pinned(config), repository.versions()
    if missing := [number for number in pins if not present.get(number)]:
        raise ReleaseError(
            f"config.pbtxt pins version {missing[0]}, which is not in {repository.location}"
        )
    found, expected = parameters(config), _client_parameters(repository, pins[-1])
    if wrong := [key for key, value in expected.items() if found.get(key) != value]:
        raise ReleaseError(
            f"config.pbtxt does not tell clients {', '.join(wrong)} of version {pins[-1]};"
            " promote it again"
        )
    return pins


def check_server(repository: Repository, server: Server) -> dict[int, float]:
    """Check that a server serves the pinned versions, describes them, and embeds their golden sets.

    Returns: the largest distance of each pinned version's golden set, see ``Server.check``.
    Raises: ReleaseError, ConfigError.
    """
    pins, serving = check_pins(repository), server.serving()
    if serving != pins:
        raise ReleaseError(
            f"{server.url} serves {serving or 'no version'}, and config.pbtxt pins {pins};"
            " promote again"
        )
    found, expected = server.parameters(), parameters(_config(repository))
    keys = ("manifest_version", "manifest_sha256")
    if any(found.get(key) != expected.get(key) for key in keys):
        raise ReleaseError(
            f"{server.url} tells clients of another manifest than config.pbtxt;"
            f" promote version {pins[-1]} again"
        )
    distances = {}
    for number in pins:
        with repository.version(number) as folder:
            distances[number] = server.check(folder)
    return distances


def client_parameters(text: bytes) -> dict[str, str | None]:
    """Return the parameters of config.pbtxt that describe a version to clients.

    They are its number, its manifest's hash and its thresholds; None for those that it lacks.
    text: the content of its manifest.json.
    Raises: ValueError if that is damaged.
    """
    manifest = Manifest.parse(text)
    number = str(manifest.version)
    thresholds = {
        f"threshold_{name}": f"{cosine:.4f}"
        for name, cosine in (manifest.thresholds or {}).items()
        if cosine is not None
    }
    if thresholds:
        thresholds["thresholds_version"] = number
    return {
        "manifest_version": number,
        "manifest_sha256": hashlib.sha256(text).hexdigest(),
        **{key: thresholds.get(key) for key in THRESHOLD_PARAMETERS},
    }


def _serve(
    repository: Repository,
    number: int,
    servers: Sequence[Server],
    *,
    keep: int | None,
    history: Sequence[int],
    say: Say,
) -> None:
    """Serve a version, or restore the previous state and raise."""
    config, present = _config(repository), repository.versions()
    fallback = _read_if_there(repository, FALLBACK)
    values = _history_parameter(history)
    values |= {key: None for key in parameters(config) if key.startswith("manifest_sha256_")}
    served = [version for version in (keep, number) if version is not None]
    if missing := [version for version in served if not present.get(version)]:
        raise ReleaseError(f"there is no version {missing[0]} in {repository.location}")
    with contextlib.ExitStack() as stack:
        for version in served:
            folder = stack.enter_context(repository.version(version))  # in the end, number's
            verify(folder, number=version)
            described = _client_parameters(repository, version)
            if version == number:
                values |= described
            else:
                values[f"manifest_sha256_{version}"] = described["manifest_sha256"]
        changed = with_release(config, served, values)
        on_all(lambda server: server.reach(), servers)
        try:
            _write_fallback(repository, history)
            repository.write("config.pbtxt", changed.encode())
            on_all(lambda server: server.load(), servers)
            on_all(lambda server: server.check(folder), servers)
            if not history:
                repository.delete(FALLBACK)
        except BaseException as error:
            with _uninterrupted():
                with contextlib.suppress(OSError):  # the reader of stderr may have left
                    say(f"putting version {pinned(config)[-1]} back ...")
                restored = _restore(repository, config, fallback, servers, refused=number)
            kind = ReleaseError if isinstance(error, Exception) else type(error)
            reason = str(error) or kind.__name__
            raise kind(f"version {number} is not served, and {restored}: {reason}") from error


def _load_pinned(repository: Repository, servers: Sequence[Server]) -> dict[Server, str]:
    """Load and check what config.pbtxt pins. Returns: the reason for each server that failed."""

    def load(server: Server) -> None:
        server.load()
        server.check(folder)

    with repository.exclusive(), repository.version(pinned(_config(repository))[-1]) as folder:
        return try_all(load, servers)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore further interrupts: a second Ctrl-C must not end the way back halfway."""
    if threading.current_thread() is not threading.main_thread():  # no interrupt reaches others
        yield
        return
    interrupts = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in interrupts}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _restore(
    repository: Repository,
    config: str,
    fallback: bytes | None,
    servers: Sequence[Server],
    *,
    refused: int,
) -> str:
    """Restore files and servers as far as possible. Returns: the outcome, in words.

    refused: the version that some servers may serve by now.
    """
    number, problems = pinned(config)[-1], list[str]()
    for path, content in (("config.pbtxt", config.encode()), (FALLBACK, fallback)):
        try:
            _put_back(repository, path, content)
        except Exception as error:
            problems.append(f"{path} could not be put back ({error})")
    loaded: dict[Server, int] = {}

    def load(server: Server) -> None:
        try:
            # If config.pbtxt still pins the refused version, the server must not read it.
            server.load(as_json(config) if problems else "")
            loaded[server] = number
        except ReleaseError:
            # It may have found its pinned version damaged when it started, as serve.py says then.
            if fallback is None or refused not in server.serving():
                raise
            server.load(fallback.decode())
            loaded[server] = int(json.loads(fallback)["version_policy"]["specific"]["versions"][-1])

    failures = [*try_all(load, servers).values()]
    back = sorted(set(loaded.values()))
    for version in back:
        try:
            with repository.version(version) as folder:
                there = [server for server in loaded if loaded[server] == version]
                failures += try_all(lambda server: server.check(folder), there).values()
        except Exception as error:
            failures.append(str(error))
    if failures:
        files = "; ".join(problems) or "config.pbtxt is as it was"
        return f"{files}, but going back to version {number} failed as well ({'; '.join(failures)})"
    versions = f"version {', '.join(map(str, back or [number]))}"
    if problems:
        return f"{'; '.join(problems)}; servers that run are back at {versions}"
    return f"all is as it was, with {versions}"


def _put_back(repository: Repository, path: str, content: bytes | None) -> None:
    """Restore a file that has changed. If it has not, a full disk is no problem."""
    if _read_if_there(repository, path) == content:
        return
    if content is None:
        repository.delete(path)
    else:
        repository.write(path, content)


def _write_fallback(repository: Repository, history: Sequence[int]) -> None:
    """Write the configuration of the last version in the history, if there is one."""
    if not history:
        return
    values = _client_parameters(repository, history[-1]) | _history_parameter(history[:-1])
    fallback = with_release(_config(repository), history[-1:], values)
    repository.write(FALLBACK, as_json(fallback).encode())


def _served_before(config: str) -> list[int]:
    """Return the versions served before, the last one at the end."""
    return [
        int(number) for number in parameters(config).get("served_before", "").split(",") if number
    ]


def _whole(repository: Repository, history: Sequence[int], say: Say) -> list[int]:
    """Return the history up to its last version whose files are as published.

    The others are checked when it is their turn: each has to be read, or downloaded.
    """
    kept = list(history)
    while kept:
        try:
            with repository.version(kept[-1]) as folder:
                check_files(folder, read_manifest(folder, kept[-1]))
            break
        except ReleaseError as error:
            say(f"warning: version {kept.pop()} can no longer be served: {error}")
    return kept


def _history_parameter(history: Sequence[int]) -> dict[str, str | None]:
    """Return the parameter of config.pbtxt that ``_served_before`` reads."""
    return {"served_before": ",".join(map(str, history)) or None}


def _config(repository: Repository) -> str:
    return repository.read("config.pbtxt").decode()


def _client_parameters(repository: Repository, number: int) -> dict[str, str | None]:
    """Return ``client_parameters``.

    Raises: ReleaseError if the manifest is missing, damaged or another version's.
    """
    try:
        text = repository.read(f"{number}/{NAME}")
        check_number(Manifest.parse(text), number)
        return client_parameters(text)
    except (OSError, ValueError) as error:
        raise ReleaseError(
            f"version {number} in {repository.location}: manifest.json cannot be read: {error}"
        ) from error


def _read_if_there(repository: Repository, path: str) -> bytes | None:
    try:
        return repository.read(path)
    except FileNotFoundError:
        return None
