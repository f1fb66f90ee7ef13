"""The control API of one running server: load the pinned versions, and check what it serves."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.message import Message
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import numpy as np
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from npair.client import Vectors
from npair.releasing import ReleaseError
from npair.serving.embedder import read_manifest

SECRET_HEADER = "npair-control-secret"


def control_secret() -> str:
    """Read the secret of the control API, as serve.py does.

    Returns: the content of the file NPAIR_CONTROL_SECRET_FILE, else NPAIR_CONTROL_SECRET, else "".
    Raises: OSError if the file cannot be read, ReleaseError if the secret cannot be a header.
    """
    name = "NPAIR_CONTROL_SECRET_FILE"
    if path := os.environ.get(name):
        secret = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    else:
        name = "NPAIR_CONTROL_SECRET"
        secret = os.environ.get(name, "")
    if secret != secret.strip() or not (secret.isascii() and secret.isprintable()):
        raise ReleaseError(f"{name} must hold one line of printable ASCII")
    return secret


class _Connection(http.client.HTTPConnection):
    """A connection to one of a host's addresses; the Host header and TLS use the host's name."""

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
    """One running server, by its HTTP URL and, if the host has several addresses, its address.

    Every call ends within ``timeout`` seconds, because a bad version can hang Triton.
    """

    def __init__(
        self, url: str, model: str, *, address: str = "", secret: str = "", timeout: float = 120.0
    ) -> None:
        """Raises: ValueError if the URL is not http:// or https://."""
        self.parts = urlsplit(url)
        known = self.parts.scheme in ("http", "https")
        if not known or not self.parts.hostname or self.parts.port == 0:
            raise ValueError(f"expected an HTTP URL such as http://host:8000, got {url!r}")
        self.address = address or self.parts.hostname
        self.url = url if self.address == self.parts.hostname else f"{url} ({self.address})"
        self.model, self.secret, self.timeout = model, secret, timeout

    @classmethod
    def all_of(
        cls, url: str, model: str, *, secret: str = "", timeout: float = 120.0
    ) -> list[Server]:
        """Return a server for each address of the host, such as the pods of a headless Service.

        Only IPv4 addresses count if there are any, so that a dual-stack server appears once;
        localhost is one server.
        Raises: ValueError as the class does, ReleaseError if the host cannot be resolved.
        """
        host = cls(url, model).address
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ReleaseError(f"{url}: the host cannot be found: {error}") from error
        family = min((info[0] for info in found), key=lambda family: family != socket.AF_INET)
        addresses = sorted({str(info[4][0]) for info in found if info[0] == family})
        if host == "localhost":
            addresses = addresses[:1]
        return [
            cls(url, model, address=address, secret=secret, timeout=timeout)
            for address in addresses
        ]

    def load(self) -> None:
        """Load the versions that config.pbtxt pins. Raises: ReleaseError, with the reason."""
        self._control(f"models/{self.model}/load", "refused to load", self.timeout)

    def reach(self) -> None:
        """Check that the server is reachable and accepts the secret. Raises: ReleaseError."""
        self._control("index", "refused the secret", 10)

    def serving(self) -> list[int]:
        """Return the versions that the server reports, ascending.

        Raises: ReleaseError if it does not answer.
        """
        status, answer = self._ask("GET", f"/v2/models/{self.model}", 10)
        if status in (http.client.BAD_REQUEST, http.client.NOT_FOUND):  # Triton has no such model
            return []
        with self._readable("what it serves", status, answer):
            return sorted(map(int, json.loads(answer)["versions"]))

    def parameters(self) -> dict[str, str]:
        """Return the parameters of config.pbtxt that clients see. Raises: ReleaseError."""
        status, answer = self._ask("GET", f"/v2/models/{self.model}/config", 10)
        with self._readable("how it is configured", status, answer):
            found = json.loads(answer).get("parameters", {})
            return {key: value["string_value"] for key, value in found.items()}

    def check(self, folder: Path) -> float:
        """Embed a version's golden set on the server, waiting for it to come up.

        Returns: the largest Euclidean distance from the published embeddings.
        Raises: ReleaseError if the server does not answer within the timeout, or the distance
        exceeds the tolerance.
        """
        manifest = read_manifest(folder)
        golden, number = manifest["golden"], manifest["version"]
        expected = np.load(folder / golden["embeddings"], allow_pickle=False)
        photos = [(folder / photo).read_bytes() for photo in golden["photos"]]
        wrong = f"{self.url} does not answer the golden set of version {number}"
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                vectors = self._embed(photos, number)
                break
            except ReleaseError as error:
                if time.monotonic() > deadline:
                    raise ReleaseError(f"{wrong}: {error}") from error
                time.sleep(0.1)
        distance = np.inf
        if vectors.shape == expected.shape:
            distance = float(np.linalg.norm(vectors - expected, axis=1).max())
        if not distance <= golden["tolerance"]:
            raise ReleaseError(f"{wrong} as published: off by {distance:.2g}")
        return distance

    def _control(self, path: str, refused: str, timeout: float) -> None:
        if not self.secret:
            raise ReleaseError(
                "the secret is missing: set NPAIR_CONTROL_SECRET (or NPAIR_CONTROL_SECRET_FILE)"
                " here as for the server"
            )
        status, answer = self._ask("POST", f"/v2/repository/{path}", timeout)
        if status != http.client.OK:
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a proxy's error page
                answer = json.loads(answer)["error"]
            raise ReleaseError(f"{self.url} {refused}: {answer[:1000] or f'status {status}'}")

    @contextlib.contextmanager
    def _readable(self, what: str, status: int, answer: str) -> Iterator[None]:
        failed = f"{self.url} does not say {what}"
        if status != http.client.OK:
            raise ReleaseError(f"{failed}: status {status}: {answer[:200]}")
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ReleaseError(f"{failed}: {answer[:200]}") from error

    def _embed(self, photos: Sequence[bytes], number: int) -> Vectors:
        """Embed photos at this address, as a client does. Raises: ReleaseError."""
        tensor = InferInput("IMAGE", [len(photos), 1], "BYTES")
        tensor.set_data_from_numpy(np.array(photos, dtype=np.object_).reshape(-1, 1))
        body, length = InferenceServerClient.generate_request_body([tensor])
        path = f"/v2/models/{self.model}/versions/{number}/infer"
        headers = {"Inference-Header-Content-Length": str(length)}
        status, answer, received = self._request(
            "POST", path, min(30.0, self.timeout), body, headers
        )
        if status != http.client.OK:
            raise ReleaseError(f"status {status}: {answer[:1000].decode(errors='replace')}")
        try:
            length = int(received.get("Inference-Header-Content-Length", len(answer)))
            parsed = InferenceServerClient.parse_response_body(answer, header_length=length)
            vectors: Vectors | None = parsed.as_numpy("EMBEDDING")
        except (ValueError, LookupError, TypeError, InferenceServerException) as error:
            raise ReleaseError(f"the answer cannot be read: {error}") from error
        if vectors is None:
            raise ReleaseError("the answer has no EMBEDDING")
        return vectors

    def _ask(self, method: str, path: str, timeout: float) -> tuple[int, str]:
        status, answer, _ = self._request(method, path, timeout)
        return status, answer.decode(errors="replace")

    def _request(
        self,
        method: str,
        path: str,
        timeout: float,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
    ) -> tuple[int, bytes, Message]:
        """Return status, body and headers. Raises: ReleaseError if there is no answer."""
        connection = _Connection(self.parts, self.address, timeout)
        secret = {SECRET_HEADER: self.secret} if self.secret else {}
        try:
            path = self.parts.path.rstrip("/") + path
            connection.request(method, path, body, {**headers, **secret})
            response = connection.getresponse()
            return response.status, response.read(), response.headers
        except (OSError, http.client.HTTPException) as error:
            reason = error or type(error).__name__
            raise ReleaseError(f"{self.url} does not answer {path}: {reason}") from error
        finally:
            connection.close()


def try_all(step: Callable[[Server], object], servers: Sequence[Server]) -> dict[Server, str]:
    """Run a step on all servers at once. Returns: the reason for each server that failed.

    The threads are daemons, so that an interrupted promotion does not wait for pending calls.
    """
    errors: dict[Server, str] = {}

    def run(server: Server) -> None:
        try:
            step(server)
        except Exception as error:  # one server's failure must not hide another's
            errors[server] = str(error) or type(error).__name__

    threads = [threading.Thread(target=run, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {server: errors[server] for server in servers if server in errors}


def on_all(step: Callable[[Server], object], servers: Sequence[Server]) -> None:
    """Run a step on all servers at once. Raises: ReleaseError that names each failure."""
    if failed := try_all(step, servers):
        raise ReleaseError("; ".join(failed.values()))
