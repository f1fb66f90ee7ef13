"""The control API of one running server: load the pinned versions, and check what it serves."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from tritonclient.utils import InferenceServerException

from npair.client import HttpTransport, NpairError, environment
from npair.releasing import ReleaseError
from npair.serving.manifest import Manifest

CONTROL_HEADER = "npair-control-secret"


def control_secret() -> str:
    """Read the secret of the control API, as serve.py does.

    Returns: the content of the file NPAIR_CONTROL_SECRET_FILE, else NPAIR_CONTROL_SECRET, else "".
    Raises: ValueError if the file cannot be read, ReleaseError if the secret cannot be a header.
    """
    name, secret = environment.secret("NPAIR_CONTROL_SECRET")
    if secret != secret.strip() or not (secret.isascii() and secret.isprintable()):
        raise ReleaseError(f"{name} must hold one line of printable ASCII")
    return secret


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
            raise ValueError(
                f"releasing needs an HTTP URL such as http://host:8000 (--url, NPAIR_URL),"
                f" got {url!r}"
            )
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

    def load(self, config: str = "") -> None:
        """Load the versions that config.pbtxt pins, or those of a configuration in JSON.

        Raises: ReleaseError, with the reason.
        """
        body = json.dumps({"parameters": {"config": config}}).encode() if config else b""
        self._control(f"models/{self.model}/load", "refused to load", self.timeout, body)

    def reach(self) -> None:
        """Check that the server is reachable and accepts the secret. Raises: ReleaseError."""
        self._control("index", "refused the secret", 10)

    def serving(self) -> list[int]:
        """Return the versions that the server reports, ascending. Raises: ReleaseError."""
        with self._calling("does not say what it serves", 10) as transport:
            try:
                content, _ = transport.request("GET", f"/v2/models/{self.model}")
            except InferenceServerException as error:
                if error.status() in ("400", "404"):  # Triton has not loaded the model
                    return []
                raise
            return sorted(map(int, json.loads(content)["versions"]))

    def parameters(self) -> dict[str, str]:
        """Return the parameters of config.pbtxt that clients see. Raises: ReleaseError."""
        with self._calling("does not say how it is configured", 10) as transport:
            return transport.parameters()

    def check(self, folder: Path) -> float:
        """Embed a version's golden set on the server, waiting for it to come up.

        Returns: the largest Euclidean distance from the published embeddings.
        Raises: ReleaseError if the server does not answer within the timeout, or the distance
        exceeds the tolerance; VersionError if the folder is damaged.
        """
        manifest = Manifest.read(folder)
        photos, expected = manifest.golden.read(folder)
        golden_set = f"the golden set of version {manifest.version}"
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                problem = f"does not answer {golden_set}"
                with self._calling(problem, min(30.0, self.timeout)) as transport:
                    vectors = transport.infer(photos, str(manifest.version), "").vectors
                break
            except ReleaseError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        distance = np.inf
        if np.shape(vectors) == expected.shape:
            distance = float(np.linalg.norm(vectors - expected, axis=1).max())
        if not distance <= manifest.golden.tolerance:
            raise ReleaseError(f"{self.url} answers {golden_set} wrong: off by {distance:.2g}")
        return distance

    def _control(self, path: str, problem: str, timeout: float, body: bytes = b"") -> None:
        if not self.secret:
            raise ReleaseError(
                "the secret is missing: set NPAIR_CONTROL_SECRET (or NPAIR_CONTROL_SECRET_FILE)"
                " here as for the server"
            )
        with self._calling(problem, timeout) as transport:
            transport.request("POST", f"/v2/repository/{path}", body)

    @contextlib.contextmanager
    def _calling(self, problem: str, timeout: float) -> Iterator[HttpTransport]:
        """Connect to this address. Raises: ReleaseError, with the problem, for failed calls."""
        transport = HttpTransport(
            self.parts.geturl(),
            self.model,
            timeout=timeout,
            headers={CONTROL_HEADER: self.secret} if self.secret else {},
            tls=ssl.create_default_context() if self.parts.scheme == "https" else None,
            address=self.address,
        )
        try:
            yield transport
        except InferenceServerException as error:
            reason = f"status {error.status()}: {error.message()[:1000]}"
            raise ReleaseError(f"{self.url} {problem}: {reason}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise ReleaseError(f"{self.url} does not answer: {reason}") from error
        except (NpairError, ValueError, LookupError, TypeError) as error:
            raise ReleaseError(f"{self.url} {problem}: {error}") from error
        finally:
            transport.close()


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
