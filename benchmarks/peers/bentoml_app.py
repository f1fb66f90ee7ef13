"""bentoml serve bentoml_app:Embedding; the photo is the form's file "photo"."""

import os
from pathlib import Path

import bentoml
import network


@bentoml.service(
    workers=int(os.environ["WORKERS"]),
    traffic={"timeout": 60},
    threads=int(os.environ["CONCURRENCY"]),
)
class Embedding:
    def __init__(self):
        self.model = network.load()

    @bentoml.api
    def embed(self, photo: Path) -> list[float]:
        return self.model.embed([self.model.decode(photo.read_bytes())])[0].tolist()
