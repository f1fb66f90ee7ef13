"""Change the chart's pods on a real cluster under load: no call fails or mixes versions.

    make test-kubernetes
    make test-kubernetes CHANGES=5 ARGS='-k promotion'

CHANGES: number of times for each change (2).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from functools import partial

import pytest
from support.chart import CHART, Service, found, kubectl
from support.containers import call, kill
from support.servers import eventually
from support.traffic import NEWER, OLDER, change_under_load, expected_vectors, two_versions

from npair.client import Vectors
from npair.releasing.release import promote
from npair.releasing.repository import open_repository

CHANGES = int(os.environ.get("CHANGES") or "2")
versions = itertools.cycle([NEWER, OLDER])
SECRET = "a-secret"
SERVER = 1000  # the user that the chart's pods run as
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def expected(service: Service) -> dict[str, Vectors]:
    return expected_vectors(service.urls["http"])


def restart(service: Service) -> None:
    """Start all pods again, with the other version."""
    promote(open_repository(service.models), next(versions), [])
    kubectl("rollout", "restart", "deployment/npair")
    service.rolled_out()


def promotion(service: Service) -> None:
    service.release(f"promote {next(versions)}")


def rollback(service: Service) -> None:
    promotion(service)
    service.release("rollback")
    next(versions)


def damaged(service: Service) -> None:
    """Roll out a version with a truncated file, see that it stalls, and take it back."""
    sound = set(service.pods())
    service.upgrade("--set", "models.subPath=damaged")

    def fails() -> bool:
        return any(
            state["restartCount"] > 0 and not state["ready"]
            for name, pod in service.pods().items()
            if name not in sound
            for state in pod["status"].get("containerStatuses", ())
        )

    try:
        eventually(fails, 180)
        assert ready(service) == sound
    finally:
        call("helm", "rollback", "npair")
        service.rolled_out()
    assert ready(service) == sound


def crash(service: Service) -> None:
    """Kill a pod's container."""
    name, pod = next(iter(service.pods().items()))
    (state,) = pod["status"]["containerStatuses"]
    kill(state["containerID"].removeprefix("docker://"))

    def recovered() -> bool:
        (now,) = service.pods()[name]["status"]["containerStatuses"]
        return bool(now["restartCount"] > state["restartCount"] and now["ready"])

    eventually(recovered, 120)


def drain(service: Service) -> None:
    """Empty each node in turn."""
    for node in [node["metadata"]["name"] for node in found("nodes")["items"]]:
        try:
            kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=5m")
            service.rolled_out()
            assert all(pod["spec"]["nodeName"] != node for pod in service.pods().values())
        finally:
            kubectl("uncordon", node)


def scale(service: Service) -> None:
    for replicas in (4, 2):
        kubectl("scale", "deployment/npair", f"--replicas={replicas}")
        service.rolled_out()
        assert len(ready(service)) == replicas


def ready(service: Service) -> set[str]:
    return {
        name
        for name, pod in service.pods().items()
        if all(state["ready"] for state in pod["status"].get("containerStatuses", [{"ready": 0}]))
    }


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rolling restart", restart),
        ("promotion of all", promotion),
        ("promotion and rollback of all", rollback),
        ("damaged version", damaged),
        ("pod killed", crash),
        ("nodes drained in turn", drain),
        ("scaled 2 to 4 to 2", scale),
    ],
)
def test_no_call_fails(
    service: Service,
    expected: dict[str, Vectors],
    rows: list[str],
    name: str,
    change: Callable[[Service], None],
) -> None:
    change_under_load(
        name, partial(change, service), CHANGES, urls=service.urls, expected=expected, rows=rows
    )


@pytest.mark.usefixtures("service")
def test_helm_test_passes() -> None:
    call("helm", "test", "npair")
