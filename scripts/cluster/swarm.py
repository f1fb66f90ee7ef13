"""Docker Swarm on two machines."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from subprocess import DEVNULL

from cluster.image import load
from cluster.machines import Machine, running
from image.commands import output, run, step

MACHINES = 2


def start(stack: contextlib.ExitStack, scratch: Path, images: Path) -> None:
    """Start it; set DOCKER_HOST to its manager's, and SWARM_ENGINES to those of all."""
    step("start a swarm")
    engines: list[str] = []
    for number in range(1, MACHINES + 1):
        machine = Machine(number, scratch / str(number))
        _, engine = stack.enter_context(running(machine))
        load(images, engine)
        address = f"--advertise-addr={machine.address}"
        docker = ("docker", "--host", engine, "swarm")
        if not engines:
            run(*docker, "init", address, stdout=DEVNULL)
            token = output(*docker, "join-token", "--quiet", "worker").strip()
            manager, os.environ["DOCKER_HOST"] = f"{machine.address}:2377", engine
        else:
            run(*docker, "join", address, "--token", token, manager, stdout=DEVNULL)
        engines.append(engine)
    os.environ["SWARM_ENGINES"] = " ".join(engines)
