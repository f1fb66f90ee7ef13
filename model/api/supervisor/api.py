"""Triton's HTTP API, as far as a supervisor needs it."""

from __future__ import annotations

import http.client
import json
from array import array
from typing import Any

from supervisor.options import MODEL

CONTROL_HEADER = "npair-control-secret"
REQUEST_TIMEOUT = 5.0  # seconds
LOAD_TIMEOUT = 120.0  # seconds


class RequestError(Exception):
    """A request that failed. status: of the answer, None if none came; late: none came in time."""

    def __init__(self, reason: str, status: int | None = None, late: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.late = late


def called(host: str) -> str:
    """The address at which this machine calls a listener at ``host``."""
    # A wildcard address cannot be called; loopback reaches the same listener.
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


class Api:
    """One server. All methods raise RequestError."""

    def __init__(self, host: str, port: int) -> None:
        self.host = called(host)
        self.port = port

    def confirms(self, path: str) -> bool | None:
        """Whether the server says yes; None without an answer, for example on a starved machine.

        This tells whether loading has ended, not whether the server embeds.
        """
        try:
            self._request("GET", path)
        except RequestError as error:
            return None if error.status is None else False
        return True

    def newest_version(self) -> str:
        """The number of the highest version that is served."""
        version: str = max(self._json("GET", f"/v2/models/{MODEL}")["versions"], key=int)
        return version

    def instances(self) -> int:
        """The number of Python stubs that each version has."""
        groups = self._json("GET", f"/v2/models/{MODEL}/config")["instance_group"]
        return sum(group["count"] for group in groups)

    def embed(self, photo: bytes, version: str) -> array[float]:
        """The float32 embedding of an encoded photo."""
        raw = {"Inference-Header-Content-Length": "0"}  # the body is one photo, not JSON
        path = f"/v2/models/{MODEL}/versions/{version}/infer"
        headers, body = self._request("POST", path, photo, raw)
        return array("f", body[int(headers["Inference-Header-Content-Length"]) :])

    def requests_answered(self) -> int:
        """The number of requests answered so far, by all versions; refused ones are among them."""
        statistics = self._json("GET", f"/v2/models/{MODEL}/stats")["model_stats"]
        return sum(entry["inference_stats"]["success"]["count"] for entry in statistics)

    def load(self, config: str, secret: str) -> None:
        """Load the model with this configuration, in JSON, in place of config.pbtxt."""
        body = json.dumps({"parameters": {"config": config}}).encode()
        path = f"/v2/repository/models/{MODEL}/load"
        self._request("POST", path, body, {CONTROL_HEADER: secret}, LOAD_TIMEOUT)

    def unload(self, secret: str, seconds: float) -> None:
        """Have the model unloaded: the server refuses new requests and answers accepted ones."""
        path = f"/v2/repository/models/{MODEL}/unload"
        self._request("POST", path, b"{}", {CONTROL_HEADER: secret}, seconds)

    def entries(self, secret: str) -> list[dict[str, str]]:
        """Name, version and state of each version to be loaded, with a reason if UNAVAILABLE."""
        index = self._json("POST", "/v2/repository/index", b"{}", {CONTROL_HEADER: secret})
        # The index lists other folders of the repository as well, without a state. It omits the
        # model while its storage is away.
        return [entry for entry in index if entry["name"] == MODEL]

    def _json(self, *request: Any) -> Any:
        try:
            return json.loads(self._request(*request)[1])
        except ValueError as error:
            raise RequestError(f"{request[1]} answered no JSON: {error}") from error

    def _request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> tuple[http.client.HTTPMessage, bytes]:
        timeout = timeout or REQUEST_TIMEOUT
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            answer = response.read()
        except TimeoutError as error:
            raise RequestError(f"no answer within {timeout:.0f} s", late=True) from error
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(str(error) or type(error).__name__) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            text = answer[:200].decode(errors="replace")
            raise RequestError(f"{path} answered {response.status}: {text}", response.status)
        return response.headers, answer
