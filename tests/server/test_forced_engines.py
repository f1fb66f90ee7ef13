"""Choose a version's engine on the real server: forced, unknown or passed over."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.models import ROOT, SHIPPED, rewrite_manifest
from support.servers import free_ports, lines_until_ready, running, start
from support.supervised import ended

from npair.client import NpairClient
from npair.serving.manifest import Manifest


class TestEngines:
    """Serve a copy of the shipped model with changed engines."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(ROOT / "model_repository", tmp_path / "models")) / "npair"

    def force(self, model: Path, engine: str) -> None:
        with (model / "config.pbtxt").open("a") as config:
            config.write(f'parameters {{ key: "engine" value: {{ string_value: "{engine}" }} }}\n')

    def golden_distance(self, model: Path, url: str) -> float:
        folder = model / SHIPPED.name / "golden"
        with NpairClient(url) as client:
            vector = client.embed(folder / "photo.jpg").vectors[0]
        return float(np.linalg.norm(vector - np.load(folder / "embeddings.npy")[0]))

    @pytest.mark.parametrize("engine", ["torch", "openvino-fp32"])
    def test_forced(self, model: Path, engine: str) -> None:
        self.force(model, engine)
        tolerance = Manifest.read(model / SHIPPED.name).engines[engine].tolerance
        with running(MODEL_REPOSITORY=str(model.parent)) as (_, urls):
            assert self.golden_distance(model, urls["http"]) < tolerance

    def test_unknown(self, model: Path) -> None:
        self.force(model, "best")
        code, output = ended(**free_ports(), MODEL_REPOSITORY=str(model.parent))
        assert code == 1
        assert "has no engine best, only openvino-int8" in output

    def test_passed_over_and_said(self, model: Path) -> None:
        """The manifest demands more accuracy than the fastest engine has."""
        engines = json.loads((model / SHIPPED.name / "manifest.json").read_bytes())["engines"]
        engines["openvino-int8"]["tolerance"] = 0
        rewrite_manifest(model / SHIPPED.name, engines=engines)
        process = start(**(ports := free_ports()), MODEL_REPOSITORY=str(model.parent))
        try:
            said = [line for line in lines_until_ready(process) if "not by openvino-int8" in line]
            assert len(said) == 2, "by each instance"
            assert re.search(
                rf"version {SHIPPED.name} is served by openvino-(bf16|fp32), "
                "not by openvino-int8: ",
                said[0],
            )
            assert re.search("golden embeddings differ by|this CPU has none of", said[0])
            assert self.golden_distance(model, f"http://127.0.0.1:{ports['HTTP_PORT']}") < 0.05
        finally:
            process.terminate()
            process.wait(timeout=30)
