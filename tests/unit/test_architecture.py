"""Check that imports follow the documented arrows and that published code stands alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor.api import CONTROL_HEADER
from supervisor.launch import METRICS_ADDRESS
from supervisor.watch import FALLBACK
from support.models import ROOT

from npair.releasing import control, release, tune
from npair.serving import overload

SOURCE = ROOT / "src/npair"

# The packages that each package may import, including imports inside functions.
ARROWS = {
    "cli": {
        "data",
        "networks",
        "training",
        "scoring",
        "publishing",
        "releasing",
        "gallery",
        "web",
        "bulk",
        "serving",
        "client",
    },
    "publishing": {"training", "networks", "scoring", "releasing", "serving", "data"},
    "releasing": {"serving", "client", "objects"},
    "gallery": {"client", "data", "objects"},
    "bulk": {"releasing", "serving", "data", "client"},
    "web": {"gallery", "serving", "client"},
    "training": {"networks", "scoring", "data"},
    "scoring": {"data"},
    "networks": set(),
    "data": {"serving"},
    "serving": set(),
    "client": set(),
    "objects": set(),
}

# The libraries that served code may import, since the image holds no others.
LIBRARIES = {
    "serving/model": {"numpy", "triton_python_backend_utils"},
    "serving/embedder": {"numpy"},
    "serving/manifest": {"numpy"},
    "serving/engine": {"numpy", "openvino", "torch"},
    "serving/preprocess": {"numpy", "PIL"},
    "serving/metadata": {"PIL"},
    "serving/jpeg": {"numpy", "PIL", "simplejpeg"},
    "serving/scaling": {"numpy", "PIL", "cykooz_resizer"},
    "serving/colour": {"numpy", "PIL"},
    "client/__init__": set(),
    "client/client": {"numpy"},
    "client/environment": set(),
    "client/errors": {"tritonclient"},
    "client/pool": set(),
    "client/results": {"numpy"},
    "client/stream": set(),
    "client/transports": {"numpy", "tritonclient"},
    "client/__main__": set(),
    "client/cli": {"numpy"},
    "client/formats": {"PIL", "pillow_heif"},
    "client/photos": set(),
    "client/rows": {"numpy"},
}


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the dotted name of each module that a file imports, split into parts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            # Served code and the client use relative imports.
            yield from (("npair", path.parent.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = tuple(str(node.module).split("."))
            yield from (
                ((*module, alias.name) for alias in node.names)
                if module == ("npair",)
                else (module,)
            )


def packages(path: Path) -> set[str]:
    """Return the packages of npair that a file imports."""
    return {parts[1] for parts in imports(path) if parts[0] == "npair" and len(parts) > 1}


def libraries(path: Path) -> set[str]:
    """Return the third-party libraries that a file imports."""
    return (
        {parts[0] for parts in imports(path)}
        - {"npair", "__future__"}
        - set(sys.stdlib_module_names)
    )


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    module = SOURCE / f"{package}.py"
    files = [module] if module.exists() else list((SOURCE / package).rglob("*.py"))
    assert files
    assert set().union(*map(packages, files)) <= ARROWS[package] | {package}


def test_publishing_needs_only_verify_of_releasing() -> None:
    """This module knows neither repositories nor servers."""
    found = {parts for path in (SOURCE / "publishing").rglob("*.py") for parts in imports(path)}
    assert {parts for parts in found if "releasing" in parts} == {("npair", "releasing", "verify")}


@pytest.mark.parametrize("module", LIBRARIES)
def test_a_module_that_travels_imports_only_what_its_readers_have(module: str) -> None:
    assert libraries(SOURCE / f"{module}.py") <= LIBRARIES[module]


def test_every_package_is_listed() -> None:
    found = {path.stem for path in SOURCE.iterdir()}
    assert found - {"__init__", "__main__", "__pycache__"} == set(ARROWS)


def test_arrows_have_no_circle() -> None:
    arrows = dict(ARROWS)
    while arrows:
        free = {package for package, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"these import each other: {sorted(arrows)}"
        arrows = {package: targets for package, targets in arrows.items() if package not in free}


def test_docker_context_stands_alone() -> None:
    api = ROOT / "model/api"
    assert all(packages(path) == set() for path in api.glob("*.py"))
    assert all(packages(path) <= {"client"} for path in api.glob("client/*.py"))
    for path in (api / "serve.py", *api.glob("supervisor/*.py")):
        assert libraries(path) <= {"supervisor"}
    assert (SOURCE / "client").resolve() == api / "client"


@pytest.mark.parametrize(
    "ignored",
    [ROOT / "model/web/Dockerfile.dockerignore", ROOT / "deploy/ray/Dockerfile.dockerignore"],
)
def test_contexts_that_hold_the_source_hold_what_it_links_to(ignored: Path) -> None:
    links = [path for path in SOURCE.iterdir() if path.is_symlink()]
    assert links
    lines = ignored.read_text().splitlines()
    assert all(f"!{link.resolve().relative_to(ROOT)}" in lines for link in links)


def test_both_sides_agree_on_names() -> None:
    """Compare constants that each side defines, since neither may import the other."""
    assert control.CONTROL_HEADER == CONTROL_HEADER
    assert release.FALLBACK == FALLBACK
    assert overload.ADDRESS == METRICS_ADDRESS
    assert (ROOT / "model/api/serve.py").samefile(tune.SERVE)
