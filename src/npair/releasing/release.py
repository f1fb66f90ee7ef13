"""What becomes of a published version: verified, promoted, rolled back, retired. No step leaves a server without one to serve.

A promotion changes one file, config.pbtxt, in one step, once the version is verified, and puts it back where a server does not
answer the version's golden set. What was served before stands in its parameter ``served_before``, for the way back, and whole in
fallback.json, which serve.py loads where a server starts and the pinned version is broken.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from npair.client import THRESHOLD_PARAMETERS, Vectors
from npair.releasing import ReleaseError
from npair.releasing.config import as_json, parameters, pinned, with_release
from npair.releasing.repository import Repository
from npair.releasing.verify import check_files, verify
from npair.serve import CONTROL_HEADER, FALLBACK
from npair.serving.manifest import Manifest, VersionError

REMEMBERED = 10  # versions served before


@dataclass(frozen=True)
class Version:
    """A line of ``npair versions``.

    status: serving, where a server says so; ready; staged, while it is being published or was not to the end; broken.
    recall_at_1: on val, of fine labels. size: in bytes.
    """

    name: str
    status: str
    pinned: bool
    recall_at_1: float | None = None
    created: str | None = None
    git_commit: str | None = None
    size: int | None = None
    reason: str | None = None


class _Connection(http.client.HTTPConnection):
    """To one of the addresses that a URL's host stands for. The Host header, and the name that a certificate must bear, are the
    URL's."""

    def __init__(self, parts: SplitResult, address: str, timeout: float) -> None:
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self.default_port = 443 if self._context else 80
        super().__init__(parts.netloc, timeout=timeout)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context:
            self.sock = self._context.wrap_socket(self.sock, server_hostname=self.host)


class Server:
    """A running server: its HTTP URL, and its address if the host has several. Every call ends within ``timeout`` seconds: a bad
    load can hang Triton."""

    def __init__(self, url: str, model: str, *, address: str = "", secret: str = "", timeout: float = 120.0) -> None:
        """Raises: ValueError for a URL that is not http:// or https://."""
        self.parts = urlsplit(url)
        if self.parts.scheme not in ("http", "https") or not self.parts.hostname or self.parts.port == 0:
            raise ValueError(f"releasing goes over HTTP: the URL must be like http://host:8000, got {url!r}")
        self.address = address or self.parts.hostname
        self.url = url if self.address == self.parts.hostname else f"{url} ({self.address})"
        self.model, self.secret, self.timeout = model, secret, timeout

    @classmethod
    def all_of(cls, url: str, model: str, *, secret: str = "", timeout: float = 120.0) -> list[Server]:
        """One for each address that the URL's host stands for, such as the pods behind a headless Kubernetes Service.

        Of IPv4's, or where there are none of IPv6's, so that a server with both is there once. Raises: ValueError as the class,
        ReleaseError for a host that stands for none.
        """
        host = cls(url, model).address
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ReleaseError(f"{url}: the host cannot be found: {error}") from error
        family = min((family for family, *_ in found), key=lambda family: family != socket.AF_INET)
        addresses = sorted({str(where[0]) for of, *_, where in found if of == family})
        if host == "localhost":
            addresses = addresses[:1]
        return [cls(url, model, address=address, secret=secret, timeout=timeout) for address in addresses]

    def load(self) -> None:
        """Have it serve what config.pbtxt says. Raises: ReleaseError with the server's reason."""
        self._control(f"models/{self.model}/load", "refused to load", self.timeout)

    def reach(self) -> None:
        """Ask for what the secret opens, and change nothing. Raises: ReleaseError where no load could come to its end either."""
        self._control("index", "refused the secret", 10)

    def serving(self) -> list[int]:
        """The versions that it says it serves. Raises: ReleaseError where it does not answer."""
        status, answer = self._ask("GET", f"/v2/models/{self.model}", 10)
        try:
            if status == http.client.OK:
                return sorted(map(int, json.loads(answer)["versions"]))
        except (ValueError, LookupError, TypeError) as error:
            raise ReleaseError(f"{self.url} does not say what it serves: {answer[:200]}") from error
        if status in (http.client.BAD_REQUEST, http.client.NOT_FOUND):  # Triton has no such model
            return []
        raise ReleaseError(f"{self.url} does not say what it serves: status {status}: {answer[:200]}")

    def _control(self, path: str, refused: str, timeout: float) -> None:
        if not self.secret:
            raise ReleaseError(
                "the secret is missing that lets a server load: start it with NPAIR_CONTROL_SECRET (or NPAIR_CONTROL_SECRET_FILE),"
                " and set that here, too"
            )
        status, answer = self._ask("POST", f"/v2/repository/{path}", timeout)
        if status != http.client.OK:
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a proxy's is no JSON
                answer = json.loads(answer)["error"]
            raise ReleaseError(f"{self.url} {refused}: {answer[:1000] or f'status {status}'}")

    def parameters(self) -> dict[str, str]:
        """What it tells clients, see ``client_parameters``. Raises: ReleaseError where it does not."""
        status, answer = self._ask("GET", f"/v2/models/{self.model}/config", 10)
        try:
            if status == http.client.OK:
                return {key: value["string_value"] for key, value in json.loads(answer).get("parameters", {}).items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ReleaseError(f"{self.url} does not say how it is configured: {answer[:200]}") from error
        raise ReleaseError(f"{self.url} does not say how it is configured: status {status}: {answer[:200]}")

    def check(self, folder: Path) -> float:
        """The largest Euclidean distance between what it answers for a version's golden set and what was published.

        Raises: ReleaseError where it does not answer within the timeout, or the distance is beyond the tolerance.
        """
        manifest, deadline = Manifest.read(folder), time.monotonic() + self.timeout
        number, (photos, expected) = manifest.version, manifest.golden.read(folder)
        while True:
            try:
                vectors = self._embed(photos, number)
                break
            except ReleaseError as error:
                if time.monotonic() > deadline:
                    raise ReleaseError(f"{self.url} does not answer the golden set of version {number}: {error}") from error
                time.sleep(0.1)
        distance = float(np.linalg.norm(vectors - expected, axis=1).max()) if vectors.shape == expected.shape else np.inf
        if not distance <= manifest.golden.tolerance:
            raise ReleaseError(f"{self.url} answers the golden set of version {number} wrong: off by {distance:.2g}")
        return distance

    def _embed(self, photos: Sequence[bytes], number: int) -> Vectors:
        """As a client would, but at this very address. Raises: ReleaseError."""
        tensor = InferInput("IMAGE", [len(photos), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(photos, dtype=np.object_).reshape(-1, 1))
        body, length = InferenceServerClient.generate_request_body([tensor])
        path, headers = f"/v2/models/{self.model}/versions/{number}/infer", {"Inference-Header-Content-Length": str(length)}
        status, answer, received = self._request("POST", path, min(30.0, self.timeout), body, headers)
        if status != http.client.OK:
            raise ReleaseError(f"status {status}: {answer[:1000].decode(errors='replace')}")
        try:
            length = int(received.get("Inference-Header-Content-Length", len(answer)))
            vectors: Vectors | None = InferenceServerClient.parse_response_body(answer, header_length=length).as_numpy("EMBEDDING")
        except (ValueError, LookupError, TypeError, InferenceServerException) as error:
            raise ReleaseError(f"what it answers cannot be read: {error}") from error
        if vectors is None:
            raise ReleaseError("its answer has no EMBEDDING")
        return vectors

    def _ask(self, method: str, path: str, timeout: float) -> tuple[int, str]:
        status, answer, _ = self._request(method, path, timeout)
        return status, answer.decode(errors="replace")

    def _request(
        self, method: str, path: str, timeout: float, body: bytes = b"", headers: Mapping[str, str] = {}
    ) -> tuple[int, bytes, Message]:
        """Status, body and headers. Raises: ReleaseError."""
        connection = _Connection(self.parts, self.address, timeout)
        secret = {CONTROL_HEADER: self.secret} if self.secret else {}
        try:
            connection.request(method, self.parts.path.rstrip("/") + path, body, {**headers, **secret})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        except (OSError, http.client.HTTPException) as error:
            raise ReleaseError(f"{self.url} does not answer {path}: {error or type(error).__name__}") from error
        finally:
            connection.close()


def _at_once(step: Callable[[Server], object], servers: Sequence[Server]) -> dict[Server, str]:
    """Take a step with all servers at the same time. Returns: why, by server that failed.

    By daemon threads: whoever interrupts a promotion does not wait for calls that are under way.
    """
    errors: dict[Server, str] = {}

    def take(server: Server) -> None:
        try:
            step(server)
        except Exception as error:  # whatever it is, the others go on
            errors[server] = str(error) or type(error).__name__

    threads = [threading.Thread(target=take, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {server: errors[server] for server in servers if server in errors}


def _all(step: Callable[[Server], object], servers: Sequence[Server]) -> None:
    """Take a step with all servers at the same time. Raises: ReleaseError that names each server that failed."""
    if failed := _at_once(step, servers):
        raise ReleaseError("; ".join(failed.values()))


def client_parameters(text: bytes) -> dict[str, str | None]:
    """What clients must know of a version, as parameters of config.pbtxt: its number, its manifest's hash, and its thresholds, of
    which those that it has not are None.

    text: its manifest.json.
    """
    manifest = Manifest.parse(text)
    thresholds = {name: cosine for name, cosine in (manifest.thresholds or {}).items() if cosine is not None}
    version = {"thresholds_version": str(manifest.version)} if thresholds else {}
    values = version | {f"threshold_{name}": f"{cosine:.4f}" for name, cosine in thresholds.items()}
    of_manifest = {"manifest_version": str(manifest.version), "manifest_sha256": hashlib.sha256(text).hexdigest()}
    return of_manifest | {key: values.get(key) for key in THRESHOLD_PARAMETERS}


def promote(repository: Repository, number: int, servers: Sequence[Server], *, keep: int | None = None) -> None:
    """Serve a version, and for a while another beside it, so that an index can be rebuilt.

    keep: a lower one, which stays for requests that name it; requests that name none go to the highest.
    Raises: ReleaseError where it must not be served or a server does not serve it; then all is as it was. RepositoryError,
    ConfigError.
    """
    if keep is not None and keep >= number:
        raise ReleaseError(f"--keep must be a version below {number}: requests that name none go to the highest")
    with repository.exclusive():
        present = pinned(_config(repository))[-1]
        history = [version for version in _served_before(repository, [present]) if version != number]
        _serve(repository, number, servers, keep=keep, history=history[-REMEMBERED:])


def rollback(repository: Repository, servers: Sequence[Server]) -> int:
    """Serve the version that was served before, and no other. Returns: it. Raises: as promote."""
    with repository.exclusive():
        history = _served_before(repository)
        if not history:
            raise ReleaseError("nothing was served before that is still there; promote the version that you want")
        _serve(repository, history[-1], servers, keep=None, history=history[:-1])
        return history[-1]


def retire(repository: Repository, number: int, servers: Sequence[Server]) -> None:
    """Remove a version that is not served. Raises: ReleaseError where it is, or is not there; RepositoryError, ConfigError."""
    with repository.exclusive():
        if number not in repository.versions():
            raise ReleaseError(f"there is no version {number} in {repository.location}")
        config = _config(repository)
        if number in pinned(config):
            raise ReleaseError(f"version {number} is the one that config.pbtxt pins; promote another first")

        def check_idle(server: Server) -> None:
            if number in (serving := server.serving()):
                raise ReleaseError(f"version {number} is still served by {server.url}")
            if not serving:
                raise ReleaseError(f"{server.url} serves no version, and may be loading this one; try again when it does")

        _all(check_idle, servers)
        history = [version for version in _served_before(repository) if version != number]
        _write_fallback(repository, history)
        repository.write("config.pbtxt", with_release(config, pinned(config), _served_before_as(history)).encode())
        if not history:
            repository.delete(FALLBACK)
        repository.remove(number)


def versions(repository: Repository, servers: Sequence[Server]) -> list[Version]:
    """All that is in the repository, ascending. Hashes are checked; golden sets are what ``verify`` embeds."""
    serving: set[int] = set()
    _at_once(lambda server: serving.update(server.serving()), servers)
    pins = pinned(_config(repository))
    lines = []
    for number, complete in repository.versions().items():
        if not complete:
            lines.append(Version(str(number), "staged", number in pins))
            continue
        with repository.version(number) as folder:
            reason, manifest = None, None
            try:
                manifest = Manifest.read(folder)
                check_files(folder, manifest)
            except (ReleaseError, VersionError) as error:
                reason = str(error)
        lines.append(
            Version(
                str(number),
                "broken" if reason else "serving" if number in serving else "ready",
                number in pins,
                manifest.recall_at_1().get("fine") if manifest else None,
                manifest.created if manifest else None,
                manifest.git_commit if manifest else None,
                repository.size(number),
                reason,
            )
        )
    return lines + [Version(name, "staged", False) for name in repository.unfinished()]


def check_pins(repository: Repository) -> list[int]:
    """The versions that config.pbtxt pins. Raises: ReleaseError where one is not there, or what it tells clients is not of the
    highest; ConfigError."""
    config = _config(repository)
    pins, there = pinned(config), repository.versions()
    if missing := [number for number in pins if not there.get(number)]:
        raise ReleaseError(f"config.pbtxt pins version {missing[0]}, which is not in {repository.location}")
    told, right = parameters(config), _client_parameters(repository, pins[-1])
    if wrong := [key for key, value in right.items() if told.get(key) != value]:
        raise ReleaseError(f"config.pbtxt does not tell clients {', '.join(wrong)} of version {pins[-1]}; promote it again")
    return pins


def check_server(repository: Repository, server: Server) -> dict[int, float]:
    """What only a server can tell: that it serves what is pinned, tells clients so, and answers every golden set right.

    Returns: how far each pinned version's golden set is off. Raises: ReleaseError.
    """
    pins, serving = check_pins(repository), server.serving()
    if serving != pins:
        raise ReleaseError(f"{server.url} serves {serving or 'no version'}, and config.pbtxt pins {pins}; promote again")
    told, right = server.parameters(), parameters(_config(repository))
    if any(told.get(key) != right.get(key) for key in ("manifest_version", "manifest_sha256")):
        raise ReleaseError(f"{server.url} tells clients of another manifest than config.pbtxt; promote version {pins[-1]} again")
    distances = {}
    for number in pins:
        with repository.version(number) as folder:
            distances[number] = server.check(folder)
    return distances


def table(lines: Sequence[Version]) -> str:
    """For a terminal."""
    head = ("version", "status", "recall@1", "published", "commit", "MB")
    rows = [
        (
            f"{line.name}{' *' if line.pinned else ''}",
            line.status,
            "" if line.recall_at_1 is None else f"{line.recall_at_1:.3f}",
            (line.created or "")[:16].replace("T", " "),
            (line.git_commit or "")[:9],
            "" if line.size is None else f"{line.size / 1e6:.1f}",
        )
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join([*text, *(f"version {line.name}: {line.reason}" for line in lines if line.reason), "* pinned by config.pbtxt"])


def as_dicts(lines: Sequence[Version]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]


def _serve(repository: Repository, number: int, servers: Sequence[Server], *, keep: int | None, history: Sequence[int]) -> None:
    config, there = _config(repository), repository.versions()
    fallback = _read_if_there(repository, FALLBACK)
    values = _served_before_as(history)
    for old in parameters(config):
        if old.startswith("manifest_sha256_"):
            values[old] = None
    served = [version for version in (keep, number) if version is not None]
    if missing := [version for version in served if not there.get(version)]:
        raise ReleaseError(f"there is no version {missing[0]} in {repository.location}")
    with contextlib.ExitStack() as stack:
        for version in served:
            folder = stack.enter_context(repository.version(version))  # number's, in the end
            verify(folder)
            told = _client_parameters(repository, version)
            values |= told if version == number else {f"manifest_sha256_{version}": told["manifest_sha256"]}
        after = with_release(config, served, values)
        _all(lambda server: server.reach(), servers)
        try:
            _write_fallback(repository, history)
            repository.write("config.pbtxt", after.encode())
            _all(lambda server: server.load(), servers)
            _all(lambda server: server.check(folder), servers)
            if not history:
                repository.delete(FALLBACK)
        except BaseException as error:
            reason = _put_back(repository, config, fallback, servers)
            kind = ReleaseError if isinstance(error, Exception) else type(error)
            raise kind(f"version {number} is not served, and {reason}: {str(error) or kind.__name__}") from error


def _put_back(repository: Repository, config: str, fallback: bytes | None, servers: Sequence[Server]) -> str:
    """Whatever fails meanwhile. Returns: what became of it."""
    number = pinned(config)[-1]
    try:
        repository.write("config.pbtxt", config.encode())
        if fallback is None:
            repository.delete(FALLBACK)
        else:
            repository.write(FALLBACK, fallback)
    except Exception as error:
        return f"config.pbtxt could not be put back to version {number} ({error})"
    failed = _at_once(lambda server: server.load(), servers)
    failures = [*failed.values()]
    try:
        with repository.version(number) as folder:
            back = [server for server in servers if server not in failed]
            failures += _at_once(lambda server: server.check(folder), back).values()
    except Exception as error:
        failures.append(str(error))
    if failures:
        return f"config.pbtxt is as it was, but going back to version {number} failed, too ({'; '.join(failures)})"
    return f"all is as it was, with version {number}"


def _write_fallback(repository: Repository, history: Sequence[int]) -> None:
    """The configuration of the version that was served last of these, for servers that start and find the pinned one broken."""
    if not history:
        return
    values = _client_parameters(repository, history[-1]) | _served_before_as(history[:-1])
    repository.write(FALLBACK, as_json(with_release(_config(repository), history[-1:], values)).encode())


def _served_before(repository: Repository, present: Sequence[int] = ()) -> list[int]:
    """And these: of all, those that can be served again."""
    history = parameters(_config(repository)).get("served_before", "")
    found = []
    for number in (*map(int, filter(None, history.split(","))), *present):
        with contextlib.suppress(ReleaseError):
            _client_parameters(repository, number)
            found.append(number)
    return found


def _served_before_as(history: Sequence[int]) -> dict[str, str | None]:
    """The parameter of config.pbtxt that _served_before reads."""
    return {"served_before": ",".join(map(str, history)) or None}


def _config(repository: Repository) -> str:
    return repository.read("config.pbtxt").decode()


def _client_parameters(repository: Repository, number: int) -> dict[str, str | None]:
    """Of a version. Raises: ReleaseError where it is not there, or its manifest is damaged."""
    try:
        return client_parameters(repository.read(f"{number}/manifest.json"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ReleaseError(f"version {number} in {repository.location}: manifest.json cannot be read: {error}") from error


def _read_if_there(repository: Repository, path: str) -> bytes | None:
    try:
        return repository.read(path)
    except FileNotFoundError:
        return None
