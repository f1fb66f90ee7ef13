"""Kubernetes, built from Debian's source with all its dependencies, and helm as it is released."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from image.commands import ROOT, run, step
from image.packages import apt_get, install

# Debian 12 is the last release that has the source of the servers.
SUITE, VERSION = "bookworm", "v1.20.2"
BUILD = ("dpkg-dev", "gcc", "golang-go", "jq", "libc6-dev", "make", "rsync")
PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-scheduler",
    "kubectl",
    "kubelet",
)
PAUSE = "pause"  # what keeps a pod's namespaces


def binaries(cache: Path) -> Path:
    """Return a folder of PROGRAMS, PAUSE and helm; build it unless the cache has it."""
    found = cache / VERSION
    if not found.exists():
        with tempfile.TemporaryDirectory(prefix="npair-kubernetes-") as scratch:
            partial, tools = found.with_name("partial"), Path(scratch) / "tools"
            partial.mkdir(exist_ok=True)
            step("download helm")
            run(sys.executable, "scripts/kubernetes_tools.py", tools)
            shutil.copy(tools / "helm", partial)
            step("build Kubernetes: 11 minutes on two cores")
            compile_into(partial, Path(scratch))
        partial.rename(found)
    return found


def compile_into(folder: Path, scratch: Path) -> None:
    """Compile PROGRAMS and PAUSE."""
    install(*BUILD)
    source = scratch / "kubernetes"
    download = (*apt_get(scratch / "apt", SUITE, "deb-src"), "--download-only", "source")
    run(*download, "kubernetes", cwd=scratch)
    run("dpkg-source", "--extract", *scratch.glob("*.dsc"), source, cwd=scratch)
    names = " ".join(f"cmd/{name}" for name in PROGRAMS)
    # The module cache must not be the user's: without modules, HOME and GOPATH decide.
    environment = {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-tags=providerless",  # without the clouds' libraries, a third of the work
        "GOPATH": str(scratch / "go"),
        "HOME": str(scratch),
        "KUBE_GIT_TREE_STATE": "clean",
        "KUBE_GIT_VERSION": VERSION,
    }
    run("make", f"WHAT={names}", cwd=source, env=environment)
    for name in PROGRAMS:
        shutil.copy(source / "_output/bin" / name, folder)
    pause = source / "build/pause/linux/pause.c"
    run("gcc", "-Os", "-static", f"-DVERSION={VERSION}", "-o", folder / PAUSE, pause, cwd=ROOT)
