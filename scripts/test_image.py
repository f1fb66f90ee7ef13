"""Build, test and promote the image as the pipeline does, on this machine alone: make test-image.

Brings its own Docker engine and a registry that answers to ghcr.io, in a mount namespace, so that
nothing is left behind: no container, registry, host entry or login. A stand-in for NVIDIA's image,
which has 15 GB, is put together in the same layout from Debian and the wheel nvidia-pytriton,
unless TRITON_IMAGE and BASE_IMAGE name real ones.

Needs: root on Debian 12 or 13 on x86-64, and the .venv of `make install`. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from image.build import WHEEL_RELEASE, build, stand_in, wheelhouse
from image.checks import check_drain, check_recovery, check_search, check_size, compose_test
from image.commands import ROOT, run, scratch_folder, step
from image.engine import TOOLS, engine, install_tools
from image.registry import REPOSITORY, digest_of, login, promote, push, registry_at_ghcr


def main() -> None:
    if "NPAIR_NAMESPACE" not in os.environ:
        # Changes to /etc/hosts must reach only this process and its children.
        os.environ["NPAIR_NAMESPACE"] = "1"
        os.execvp(
            "unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        )
    with scratch_folder("npair-image-") as (scratch, stack):
        test(scratch, stack)


def test(scratch: Path, stack: contextlib.ExitStack) -> None:
    install_tools(*TOOLS)
    stack.enter_context(engine(scratch))
    registry = stack.enter_context(registry_at_ghcr(scratch))

    triton, base = os.environ.get("TRITON_IMAGE"), os.environ.get("BASE_IMAGE", "ubuntu:24.04")
    options = ["--network", "host"]
    if triton is None:
        step("put a stand-in for NVIDIA's image together")
        triton, base = stand_in(scratch)
        pins = ("api/requirements.txt", "api/requirements-torch.txt", "web/requirements.txt")
        options += stack.enter_context(wheelhouse(scratch, *pins))
    options += ["--build-arg", f"TRITON_IMAGE={triton}", "--build-arg", f"BASE_IMAGE={base}"]

    if "TRITON_IMAGE" not in os.environ:
        step("refuse a Triton with known vulnerabilities")
        refused = build(f"{REPOSITORY}:refused", *options, fails=True)
        assert "have known vulnerabilities" in refused, refused
        options += ["--build-arg", f"TRITON_FLOOR={WHEEL_RELEASE}"]

    step("build the image")
    build(f"{REPOSITORY}:cpu-1", *options)
    step("build it without torch")
    build(f"{REPOSITORY}:no-torch", *options, "--build-arg", "WITH_TORCH=0")
    step("push the candidate")
    login()
    digest = push("cpu-1")
    check_size("torch", "cpu-1", digest)
    check_size("no torch", "no-torch", push("no-torch"))

    step("test exactly what was pushed")
    run("docker", "image", "rm", "--force", f"{REPOSITORY}:cpu-1", stdout=subprocess.DEVNULL)
    compose_test(f"cpu-1@{digest}")
    step("start it alone, hardened")
    run("scripts/start-hardened.sh", f"{REPOSITORY}@{digest}", env={"HEALTHY_WITHIN": "15"})
    step("start the one without torch")
    run("scripts/start-hardened.sh", f"{REPOSITORY}:no-torch", env={"HEALTHY_WITHIN": "15"})
    step("stop it under load, beside idle connections")
    check_drain(f"{REPOSITORY}@{digest}")
    step("kill its Python stub under compose")
    check_recovery(f"cpu-1@{digest}")
    step("search a gallery by the profile search")
    check_search(f"cpu-1@{digest}", scratch, options)
    step("promote it")
    promote(digest)
    assert digest_of("cpu") == digest

    step("break an image: it must not be promoted")
    spoiled = scratch / "spoiled"
    shutil.copytree(ROOT / "model/api", spoiled)
    with (spoiled / "client/__init__.py").open("a") as file:
        file.write("\nraise ImportError('broken on purpose')\n")
    build(f"{REPOSITORY}:cpu-2", *options, context=spoiled)
    broken = push("cpu-2")
    try:
        compose_test(f"cpu-2@{broken}")
    except subprocess.CalledProcessError:
        print("its test failed, so the pipeline ends there")
    else:
        raise SystemExit("the test of a broken image passed")
    assert digest_of("cpu") == digest != broken
    assert registry.poll() is None
    step("done")


if __name__ == "__main__":
    main()
