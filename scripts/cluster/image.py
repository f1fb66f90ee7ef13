"""The images that the cluster runs: that of make test-image without torch, and npair's commands."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from subprocess import DEVNULL

from image.build import WHEEL_RELEASE, build, stand_in, wheelhouse
from image.commands import ROOT, output, run, step
from image.engine import TOOLS, engine, install_tools

SERVER, PROMOTION, BALANCER = "npair_model_api", "npair_promotion", "npair_balancer"
# In the place of HAProxy's own image.
HAPROXY = """\
FROM {base}
RUN apt-get update && apt-get install -y --no-install-recommends haproxy
USER haproxy
CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
"""


def archive(cache: Path) -> Path:
    """Return an archive of SERVER and BALANCER; build them unless the cache has them."""
    found = cache / f"image-{fingerprint()}.tar"
    if not found.exists():
        install_tools(*TOOLS)
        with (
            tempfile.TemporaryDirectory(
                prefix="npair-image-", ignore_cleanup_errors=True
            ) as folder,
            engine(scratch := Path(folder)),
        ):
            step("build the images")
            triton, base = stand_in(scratch)
            with wheelhouse(scratch, "api/requirements.txt") as options:
                values = {"TRITON_IMAGE": triton, "BASE_IMAGE": base, "WITH_TORCH": "0"}
                values["TRITON_FLOOR"] = WHEEL_RELEASE
                arguments = (f"--build-arg={name}={value}" for name, value in values.items())
                build(SERVER, "--network", "host", *options, *arguments)
            balancer = ("buildx", "build", "--quiet", "--network", "host", "--tag", BALANCER)
            run("docker", *balancer, "-", stdin=HAPROXY.format(base=base))
            partial = found.with_suffix(".partial")
            run("docker", "save", "--output", partial, SERVER, BALANCER)
            partial.rename(found)
    return found


def fingerprint() -> str:
    """Hash the files that go into the image."""
    digest = hashlib.sha256()
    for name in output("git", "ls-files", "model/api", "model_repository", "scripts/image").split():
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def load(images: Path, engine: str) -> None:
    """Load an archive into the engine at an address, and make PROMOTION there."""
    docker = ("docker", "--host", engine)
    run(*docker, "load", "--quiet", "--input", images, stdout=DEVNULL)
    with tempfile.TemporaryDirectory() as context:
        shutil.copytree(ROOT / "src", context, dirs_exist_ok=True)  # follows links out of src
        build = (*docker, "buildx", "build", "--quiet", "--tag", PROMOTION, "--file", "-", context)
        dockerfile = f"FROM {SERVER}\nCOPY npair /packages/npair\nENV PYTHONPATH=/packages\n"
        run(*build, stdin=dockerfile, stdout=DEVNULL)


def load_program(program: Path, engine: str) -> None:
    """Make an image of a static program alone, with its name."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "archive.tar"
        run("tar", "--create", "--file", archive, "--directory", program.parent, program.name)
        entry = f'--change=ENTRYPOINT ["/{program.name}"]'
        command = ("docker", "--host", engine, "import", entry, archive, program.name)
        run(*command, stdout=DEVNULL)
