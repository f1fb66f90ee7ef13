"""The images that the cluster runs: that of make test-image without torch, and npair's commands."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from image.build import WHEEL_RELEASE, build, stand_in, wheelhouse
from image.commands import ROOT, output, run, step
from image.engine import engine, install_tools

SERVER, PROMOTION = "npair_model_api", "npair_promotion"


def archive(cache: Path) -> Path:
    """Return an archive of the image SERVER; build it unless the cache has it."""
    found = cache / f"image-{fingerprint()}.tar"
    if not found.exists():
        install_tools()
        with (
            tempfile.TemporaryDirectory(
                prefix="npair-image-", ignore_cleanup_errors=True
            ) as folder,
            engine(scratch := Path(folder)),
        ):
            step("build the image")
            triton, base = stand_in(scratch)
            with wheelhouse(scratch, "api/requirements.txt") as options:
                values = {"TRITON_IMAGE": triton, "BASE_IMAGE": base, "WITH_TORCH": "0"}
                values["TRITON_FLOOR"] = WHEEL_RELEASE
                arguments = (f"--build-arg={name}={value}" for name, value in values.items())
                build(SERVER, "--network", "host", *options, *arguments)
            partial = found.with_suffix(".partial")
            run("docker", "save", "--output", partial, SERVER)
            partial.rename(found)
    return found


def fingerprint() -> str:
    """Hash the files that go into the image."""
    digest = hashlib.sha256()
    for name in output("git", "ls-files", "model/api", "model_repository", "scripts/image").split():
        digest.update(name.encode() + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def load(images: Path, pause: Path, engine: str) -> None:
    """Load an archive into an engine; make the images PROMOTION, and of a static program, there."""
    docker = ("docker", "--host", engine)
    run(*docker, "load", "--quiet", "--input", images, stdout=-3)
    build = (*docker, "buildx", "build", "--quiet", "--tag", PROMOTION, "--file", "-", "src")
    run(*build, stdin=f"FROM {SERVER}\nCOPY npair /packages/npair\nENV PYTHONPATH=/packages\n")
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "archive.tar"
        run("tar", "--create", "--file", archive, "--directory", pause.parent, pause.name)
        change = f'--change=ENTRYPOINT ["/{pause.name}"]'
        run(*docker, "import", change, archive, pause.name, stdout=-3)
