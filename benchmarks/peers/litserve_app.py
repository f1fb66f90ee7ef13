"""python litserve_app.py PORT; the photo is the form's file "request"."""

import os
import sys

import litserve
import network
from fastapi import UploadFile

BATCH = int(os.environ["BATCH"])


class Embedding(litserve.LitAPI):
    def setup(self, device):
        self.model = network.load()

    def decode_request(self, request: UploadFile):
        return self.model.decode(request.file.read())

    def predict(self, pixels):
        return self.model.embed(pixels if BATCH > 1 else [pixels])

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"embedding": output.reshape(-1).tolist()}


if __name__ == "__main__":
    api = Embedding(max_batch_size=BATCH, batch_timeout=0.005 if BATCH > 1 else 0)
    server = litserve.LitServer(
        api, accelerator="cpu", workers_per_device=int(os.environ["WORKERS"]), timeout=60
    )
    server.run(
        port=int(sys.argv[1]), generate_client_file=False, num_api_servers=1, log_level="error"
    )
