"""The arrows between the pieces, as docs say them: imports point one way, and what is published stands alone."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCE = ROOT / "src/npair"
SERVING = {"numpy", "serving"}

# What each piece may import beyond the standard library; npair's own modules by their own names.
ALLOWED = {
    "cli": {
        *("client", "client_cli", "data", "evaluate", "folds", "gallery", "grocery", "metrics", "pixels", "publish", "release"),
        *("report", "repository"),
        *("run", "serve", "serving", "train", "tune"),
    },
    "publish": {"artifact", "config", "data", "engines", "evaluate", "metrics", "release", "repository", "serving", "numpy"},
    "release": {"client", "config", "repository", "serve", "serving", "numpy", "tritonclient"},
    "repository": {"fsspec"},
    "gallery": {"client", "data", "repository", "lancedb", "pyarrow", "tqdm"},
    "config": {"google", "tritonclient"},
    "artifact": {"data", "drawings", "engines", "network", "pixels", "run", "serving", "numpy", "torch", "PIL"},
    "engines": {"data", "evaluate", "metrics", "pixels", "serving", "numpy", "torch", "openvino", "nncf"},
    "train": {
        *("batches", "data", "efficientnet_lite", "evaluate", "loss", "metrics", "network", "pixels", "processes", "run"),
        *("serving", "numpy", "torch", "kornia", "tqdm", "PIL"),
    },
    "report": {"data", "evaluate", "metrics", "run", "numpy", "PIL", "jinja2", "sklearn"},
    "evaluate": {"client", "client_cli", "data", "metrics", "network", "pixels", "numpy", "PIL", "tqdm"},
    "folds": {"data", "pixels", "numpy", "sklearn"},
    "metrics": {"numpy", "scipy", "sklearn"},
    "efficientnet_lite": {"run", "torch"},
    "network": {"efficientnet_lite", "run", "numpy", "torch", "transformers"},
    "processes": {"torch"},
    "batches": {"numpy"},
    "loss": {"torch"},
    "grocery": {"data", "tqdm"},
    "pixels": {"data", "serving", "numpy"},
    "data": {"serving", "numpy", "tqdm"},
    "run": {"serving"},
    "drawings": {"numpy", "PIL"},
    "tune": {"client", "config", "load", "serve", "serving", "matplotlib"},
    "load": {"numpy"},
    "client": {"numpy", "tritonclient"},
    "client_cli": {"client", "client_files", "numpy"},
    "client_files": {"client", "numpy", "tqdm"},
    "serve": set(),
    "serving/model": SERVING | {"triton_python_backend_utils"},
    "serving/embedder": SERVING,
    "serving/engine": {"numpy", "openvino", "torch"},
    "serving/preprocess": {"numpy", "PIL", "serving"},
    "serving/jpeg": {"numpy", "PIL", "simplejpeg", "cykooz_resizer", "serving"},
    "serving/refusal": set(),
    "serving/text": {"serving"},
    "serving/png": {"serving"},
    "serving/metadata": set(),
    "serving/colour": {"numpy", "PIL", "serving"},
}


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere in it; npair's own modules by their own name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            if node.level:  # in serving, which counts as one piece, or among the client's files
                module = "npair.serving" if path.parent.name == "serving" else "npair"
            modules = [f"npair.{alias.name}" for alias in node.names] if module == "npair" else [module]
        else:
            continue
        for module in modules:
            parts = module.split(".")
            names.add(parts[1] if parts[0] == "npair" and len(parts) > 1 else parts[0])
    return names - set(sys.stdlib_module_names) - {"__future__"}


@pytest.mark.parametrize("piece", ALLOWED)
def test_imports_only_what_it_may(piece: str) -> None:
    assert imported(SOURCE / f"{piece}.py") <= ALLOWED[piece]


def test_every_piece_is_listed() -> None:
    pieces = {str(path.relative_to(SOURCE).with_suffix("")) for path in SOURCE.rglob("*.py")}
    assert {piece for piece in pieces if not piece.endswith("__init__")} == set(ALLOWED)


def test_arrows_have_no_circle() -> None:
    arrows = {piece: {name for name in allowed if name in ALLOWED} for piece, allowed in ALLOWED.items()}
    while arrows:
        free = {piece for piece, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"these import each other: {sorted(arrows)}"
        arrows = {piece: targets for piece, targets in arrows.items() if piece not in free}


def test_docker_context_stands_alone() -> None:
    for path in (ROOT / "model/api").glob("*.py"):
        assert "npair" not in {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    assert imported(ROOT / "model/api/serve.py") == set()
    for name in ("client.py", "client_cli.py", "client_files.py", "serve.py"):
        assert (SOURCE / name).resolve() == ROOT / "model/api" / name
