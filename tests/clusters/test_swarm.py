"""Change the stack of deploy/swarm on a real swarm under load: no call fails or mixes versions.

    make test-swarm

CHANGES: number of times for each change (2).
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
from support.containers import call, kill
from support.models import ROOT
from support.servers import eventually
from support.traffic import (
    NEWER,
    OLDER,
    change_under_load,
    expected_vectors,
    two_versions,
)

from npair.client import NpairClient, Vectors
from npair.releasing.release import promote
from npair.releasing.repository import open_repository

CHANGES = int(os.environ.get("CHANGES") or "2")
SERVICE = "npair_model_api"
images = itertools.cycle(["newer", "older"])


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Deploy the stack. Returns: the balancer's URLs, by protocol."""
    if "SWARM_ENGINES" not in os.environ:
        pytest.fail("these tests need a swarm: make test-swarm")
    folder = tmp_path_factory.mktemp("images")
    for name, version in (("older", OLDER), ("newer", NEWER), ("broken", OLDER)):
        promote(open_repository(two_versions(folder / name)), version, [])
    broken = folder / f"broken/npair/{OLDER}/model.py"
    broken.write_text(broken.read_text() + "\nraise ImportError('broken on purpose')\n")
    for name, engine in itertools.product(
        ("older", "newer", "broken"), os.environ["SWARM_ENGINES"].split()
    ):
        build = ("docker", "--host", engine, "buildx", "build", "--tag", f"npair:{name}")
        dockerfile = "FROM npair_model_api\nCOPY --chown=1000 . /models\n"
        call(*build, "--file", "-", str(folder / name), stdin=dockerfile)
    os.environ |= {"IMAGE": "npair:older", "BALANCER": "npair_balancer"}
    deploy = ("docker", "stack", "deploy", "--resolve-image", "never")
    call(*deploy, "--compose-file", str(ROOT / "deploy/swarm/stack.yml"), "npair")
    address = call("docker", "node", "inspect", "--format", "{{.Status.Addr}}", "self").strip()
    urls = {"http": f"http://{address}:8000", "grpc": f"grpc://{address}:8001"}
    for url in urls.values():
        with NpairClient(url, retries=0) as client:
            eventually(client.ready, 300)
    return urls


@pytest.fixture(scope="module")
def expected(urls: dict[str, str]) -> dict[str, Vectors]:
    return expected_vectors(urls["http"])


def update(image: str) -> None:
    """Change the image, and wait for the outcome."""
    call("docker", "service", "update", "--no-resolve-image", f"--image=npair:{image}", SERVICE)


def new_version() -> None:
    update(next(images))
    assert state() == "completed"


def broken_version() -> None:
    before = image()
    update("broken")
    assert (state(), image()) == ("rollback_completed", before)


def task_killed() -> None:
    before = running()
    kill(
        call("docker", "inspect", "--format", "{{.Status.ContainerStatus.ContainerID}}", before[0])
    )
    eventually(lambda: len(running()) == 2 and running() != before, 120)


def scaled() -> None:
    for replicas in (4, 2):
        call("docker", "service", "scale", f"{SERVICE}={replicas}")
        assert len(running()) == replicas


def state() -> str:
    return str(inspected()["UpdateStatus"]["State"])


def image() -> str:
    return str(inspected()["Spec"]["TaskTemplate"]["ContainerSpec"]["Image"])


def inspected() -> dict[str, Any]:
    return dict(json.loads(call("docker", "service", "inspect", SERVICE))[0])


def running() -> list[str]:
    """Return the tasks that run, which includes that they are healthy."""
    tasks = call(
        "docker", "service", "ps", "--filter=desired-state=running", "--format=json", SERVICE
    )
    found = map(json.loads, tasks.splitlines())
    return [task["ID"] for task in found if task["CurrentState"].startswith("Running")]


@pytest.mark.parametrize(
    "change", [new_version, broken_version, task_killed, scaled], ids=lambda each: each.__name__
)
def test_no_call_fails(
    urls: dict[str, str],
    expected: dict[str, Vectors],
    rows: list[str],
    change: Callable[[], None],
) -> None:
    name = change.__name__.replace("_", " ")
    change_under_load(name, change, CHANGES, urls=urls, expected=expected, rows=rows)
