"""A stand-in for tritonserver that answers only the requests of serve.py.

STANDIN_FAULT selects a timing fault that cannot be provoked in Triton.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import signal
import sys
import time
from pathlib import Path

FAULT = os.environ["STANDIN_FAULT"]
LIVE, READY = "/v2/health/live", "/v2/models/npair/ready"
STATISTICS = "/v2/models/npair/stats"
FLAGS = ["--model-repository", "--http-port", "--http-restricted-api", "--grpc-restricted-protocol"]
VERSION = next(Path(__file__).parents[2].glob("model_repository/npair/[0-9]*"))
ANSWERS: dict[str, object] = {
    LIVE: {},
    READY: {},
    STATISTICS: {"model_stats": []},
    "/v2/models/npair": {"versions": [VERSION.name]},
    "/v2/models/npair/config": {"instance_group": [{"count": 1}]},
    "/v2/repository/models/npair/unload": {},
    "/v2/repository/index": [{"name": "npair", "state": "UNAVAILABLE"}],
}


class Triton(http.server.BaseHTTPRequestHandler):
    """Answers serve.py, with one of these faults.

    late: the first answer to each of these paths comes after serve.py has given up.
    loading: nothing is answered until the first question whether the model is ready, as in Triton,
    which listens once everything is loaded.
    """

    late = [STATISTICS, READY] if FAULT == "late" else []
    loaded = FAULT != "loading"

    def do_GET(self) -> None:
        if self.path in self.late:
            self.late.remove(self.path)
            with Path(os.environ["STANDIN_LOG"]).open("a") as log:
                print(self.path, file=log)
            time.sleep(6)
        if self.loaded:
            self.answer(200, json.dumps(ANSWERS.get(self.path)).encode())
        Triton.loaded = self.loaded or self.path in (LIVE, READY)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.path.endswith("/infer"):
            self.do_GET()
            return
        embeddings = (VERSION / "golden/embeddings.npy").read_bytes()
        first = 10 + int.from_bytes(embeddings[8:10], "little")
        self.answer(200, embeddings[first : first + 4 * 128])

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Inference-Header-Content-Length", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    if "--help" in sys.argv:
        if FAULT == "stopped":
            os.kill(os.getppid(), signal.SIGTERM)
        print(*FLAGS, sep="\n")
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--http-port", type=int)
    port = parser.parse_known_args()[0].http_port
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Triton).serve_forever()


if __name__ == "__main__":
    main()
