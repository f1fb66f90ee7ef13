"""Change the chart's pods on a real cluster under load: no call fails or mixes versions.

    make test-kubernetes
    make test-kubernetes CHANGES=5 ARGS='-k promotion'

CHANGES: number of times for each change (2).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.chart import Service, call, found, kubectl
from support.servers import eventually
from support.traffic import NEWER, OLDER, Traffic, expected_vectors

from npair.client import Vectors
from npair.releasing.release import promote
from npair.releasing.repository import open_repository

CHANGES = int(os.environ.get("CHANGES") or "2")
versions = itertools.cycle([NEWER, OLDER])


@pytest.fixture(scope="module")
def expected(service: Service) -> dict[str, Vectors]:
    return expected_vectors(service.urls["http"])


def restart(service: Service) -> None:
    """Start all pods anew, with the other version."""
    promote(open_repository(service.models), next(versions), [])
    kubectl("rollout", "restart", "deployment/npair")
    service.rolled_out()


def promotion(service: Service) -> None:
    service.release(f"promote {next(versions)}")


def rollback(service: Service) -> None:
    next(versions)
    service.release("rollback")


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

    eventually(fails, 180)
    assert ready(service) == sound
    call("helm", "rollback", "npair")
    service.rolled_out()
    assert ready(service) == sound


def kill(service: Service) -> None:
    """Kill all processes of a pod's container."""
    name, pod = next(iter(service.pods().items()))
    (state,) = pod["status"]["containerStatuses"]
    container = state["containerID"].removeprefix("docker://")
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with suppress(OSError):
            if container in path.read_text():
                os.kill(int(path.parent.name), signal.SIGKILL)

    def recovered() -> bool:
        (now,) = service.pods()[name]["status"]["containerStatuses"]
        return bool(now["restartCount"] > state["restartCount"] and now["ready"])

    eventually(recovered, 120)


def drain(service: Service) -> None:
    """Empty each node in turn."""
    for node in [node["metadata"]["name"] for node in found("nodes")["items"]]:
        kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=5m")
        service.rolled_out()
        assert all(pod["spec"]["nodeName"] != node for pod in service.pods().values())
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
        ("rollback of all", rollback),
        ("damaged version", damaged),
        ("pod killed", kill),
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
    with Traffic(service.urls, expected) as traffic:
        for number in range(CHANGES):
            began = time.monotonic() - traffic.began
            change(service)
            ended = time.monotonic() - traffic.began
            print(f"{name} {number + 1}: {began:.2f} to {ended:.2f} s", file=sys.stderr)
        time.sleep(1)
    rows += traffic.rows(name, CHANGES)
    traffic.check()


@pytest.mark.usefixtures("service")
def test_helm_test_passes() -> None:
    call("helm", "test", "npair")
