"""Build the image for Arm, and test it emulated by QEMU: make test-arm64.

On a stand-in for NVIDIA's image, as scripts/test_image.py, and without torch. A Debian for Arm, the
emulator and the wheels are kept in the user's cache folder. An emulated start takes minutes.

Needs: root on Debian 12 or 13, and the .venv of `make install`. Standard library only.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from image.arm64 import debian_root, emulation, unpacked_server, wheels_for_arm
from image.build import WHEEL_RELEASE, build, served, stand_in_of
from image.checks import embed
from image.commands import ROOT, output, run, scratch_folder, step, wait_for
from image.engine import TOOLS, engine, install_tools

MODEL = ROOT / "model_repository/npair"
IMAGE = "npair-arm64"
HTTP, GRPC = 18430, 18431
READY_WITHIN = 3600  # seconds
PROCESSOR = "neoverse-n1"  # as in Graviton 2 and Ampere Altra
# Of model/api/test_model_api.py; the others send thousands of photos, or many megapixels.
TESTS = (
    "TestContract and not (phones_size or many_batches or largest_batch)"
    " or (twin or index_and_reason) and not megapixels"
)


def main() -> None:
    with scratch_folder("npair-arm64-") as (scratch, stack):
        test(scratch, stack)


def test(scratch: Path, stack: contextlib.ExitStack) -> None:
    install_tools(*TOOLS)
    stack.enter_context(emulation())
    step("install Debian for Arm")
    root = debian_root()
    step("download the wheels")
    wheels = wheels_for_arm()
    site = unpacked_server(wheels)
    stack.enter_context(engine(scratch))
    step("put a stand-in for NVIDIA's image together")
    triton, base = stand_in_of(scratch, root, site / "pytriton", "arm64")

    step("build the image, without torch")
    options = stack.enter_context(served(wheels, scratch))
    arguments = {
        "TRITON_IMAGE": triton,
        "BASE_IMAGE": base,
        "TRITON_FLOOR": WHEEL_RELEASE,
        "WITH_TORCH": "0",
    }
    options += [f"--build-arg={name}={value}" for name, value in arguments.items()]
    build(IMAGE, "--platform=linux/arm64", "--network=host", "--load", *options)
    print(output("docker", "image", "inspect", "--format", "{{.Os}}/{{.Architecture}}", IMAGE))

    step("build the client's wheel, and install it alone")
    tools = Path(sys.executable).parent
    run(tools / "uv", "build", "--quiet", "--wheel", "--out-dir", scratch / "dist")
    run(sys.executable, "-m", "venv", scratch / "client")
    python = scratch / "client/bin/python"
    (wheel,) = (scratch / "dist").glob("npair-*.whl")
    run(python, "-m", "pip", "--quiet", "install", wheel)

    step("start it, hardened")
    with server("image"):
        print(output("docker", "exec", "image", "uname", "-m").strip())
        step("embed the golden photos by the wheel's client")
        for url in (f"http://127.0.0.1:{HTTP}", f"grpc://127.0.0.1:{GRPC}"):
            run(python, ROOT / "scripts/check_golden.py", url, MODEL)
        step("test it as a black box")
        urls = {
            "NPAIR_URL": f"http://127.0.0.1:{HTTP}",
            "NPAIR_GRPC_URL": f"grpc://127.0.0.1:{GRPC}",
            "NPAIR_TIMEOUT": "600",
        }
        run(sys.executable, "-m", "pytest", "-q", "model/api/test_model_api.py", "-k", TESTS,
            env=urls)  # fmt: skip

    step("start the wheel's server, as make serve does")
    # Hidden, the image's own is not found.
    with server("wheel", "--tmpfs", "/opt/tritonserver", "--volume", f"{site}:/wheel:ro",
                "--env", "PYTHONPATH=/wheel"):  # fmt: skip
        url = f"http://127.0.0.1:{HTTP}"
        run(python, ROOT / "scripts/check_golden.py", url, MODEL)
    step("tell what OpenVINO makes of the graphs")
    (version,) = (path.parent.name for path in MODEL.glob("*/manifest.json"))
    run("docker", "run", "--rm", "--platform", "linux/arm64", "--env", f"QEMU_CPU={PROCESSOR}",
        "--volume", f"{ROOT}/benchmarks/precisions.py:/precisions.py:ro", IMAGE,
        "python", "/precisions.py", f"/models/npair/{version}")  # fmt: skip
    step("done")


@contextlib.contextmanager
def server(name: str, *options: str) -> Iterator[None]:
    """Run the image until the end of the block; print which engine serves.

    It must stop in order.
    """
    environment = {"START_SECONDS": READY_WITHIN, "QEMU_CPU": PROCESSOR}
    run("docker", "run", "--detach", "--name", name, "--platform", "linux/arm64", "--read-only",
        "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
        "--no-healthcheck",  # it starts a Python every 5 s, which takes as long when emulated
        *(f"--env={variable}={value}" for variable, value in environment.items()),
        f"--publish=127.0.0.1:{HTTP}:8000", f"--publish=127.0.0.1:{GRPC}:8001",
        *options, IMAGE, stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        began = time.monotonic()
        wait_for(f"the server {name}", lambda: embed(HTTP) == 200, READY_WITHIN)
        print(f"embeds after {time.monotonic() - began:.0f} s")
        found = re.findall(r"version \d+ is served by .*", log(name))
        print(*sorted(set(found)), sep="\n")
        assert any("served by openvino-fp32" in line for line in found), found
        yield
        run("docker", "stop", "--time", "60", name, stdout=subprocess.DEVNULL)
        code = output("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip()
        assert code == "0", f"it stopped with exit code {code}"
    except BaseException:
        print(log(name)[-4000:])
        raise
    finally:
        run("docker", "rm", "--force", name, stdout=subprocess.DEVNULL)


def log(name: str) -> str:
    return subprocess.run(
        ["docker", "logs", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    ).stdout


if __name__ == "__main__":
    main()
