"""The chart on a real cluster, with two versions on a volume, and the table of results."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from support.chart import CHART, Service, call, found, kubectl
from support.traffic import HEAD, NEWER, two_versions

SECRET = "a-secret"
SERVER = 1000  # the user that the chart's pods run as
ROWS = pytest.StashKey[list[str]]()
VALUES = {
    "image": {"repository": "npair_model_api", "tag": "latest", "pullPolicy": "Never"},
    "models": {"existingClaim": "models", "subPath": "sound"},
    "control": {"secret": SECRET},
    # Four pods must fit on two nodes, and share the cores of one machine.
    "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"cpu": "1"}},
    "promotion": {"image": "npair_promotion", "package": ""},
}
VOLUME = {
    "apiVersion": "v1",
    "kind": "PersistentVolume",
    "metadata": {"name": "models"},
    "spec": {"accessModes": ["ReadWriteMany"], "capacity": {"storage": "1Gi"}},
}
CLAIM = {
    "apiVersion": "v1",
    "kind": "PersistentVolumeClaim",
    "metadata": {"name": "models"},
    "spec": {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "1Gi"}},
        "storageClassName": "",
        "volumeName": "models",
    },
}


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    if "KUBECONFIG" not in os.environ:
        pytest.fail("these tests need a cluster: make test-kubernetes")
    volume = tmp_path_factory.mktemp("volume")
    models = two_versions(volume / "sound")
    damaged = shutil.copytree(volume / "sound", volume / "damaged") / "npair"
    shutil.rmtree(damaged / str(NEWER))
    (pinned,) = damaged.glob("[0-9]*")
    weights = max(pinned.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(weights, weights.stat().st_size // 2)
    for path in (volume, *volume.rglob("*")):
        os.chown(path, SERVER, SERVER)
    VOLUME["spec"] |= {"hostPath": {"path": str(volume)}}  # type: ignore[operator]
    for item in (VOLUME, CLAIM):
        kubectl("apply", "--filename=-", stdin=json.dumps(item))
    values = volume.with_name("values.json")
    values.write_text(json.dumps(VALUES))
    call("helm", "install", "npair", str(CHART), "--values", str(values))
    address = found("service", "npair")["spec"]["clusterIP"]
    urls = {"http": f"http://{address}:8000", "grpc": f"grpc://{address}:8001"}
    service = Service(models, values, urls)
    service.rolled_out()
    return service


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> list[str]:
    """The rows of the table of results."""
    return request.config.stash.setdefault(ROWS, [*HEAD])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("calls during changes")
    for row in config.stash.get(ROWS, []):
        terminalreporter.write_line(row)
