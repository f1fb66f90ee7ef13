"""Build the image twice on this machine alone, and compare every layer: make test-reproducible.

The first build comes with attestations, as the workflow's does, and goes to a registry. Then
scripts/verify_image.py checks these, builds the image again without a cache, and compares. NVIDIA's
image, its base and the scanner that lists packages are stand-ins, in the registry, by digest.

Needs: root on Debian 12 or 13 on x86-64, and the .venv of `make install`. Standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from distribution import registry
from image.build import WHEEL_RELEASE, build, stand_in, wheelhouse
from image.commands import ROOT, output, run, scratch_folder, step
from image.engine import engine, install_tools
from image.registry import open_registry

# BuildKit's protocol for scanners: an in-toto statement about what is at the source.
SCAN = r"""#!/bin/sh
packages=$(dpkg-query --admindir="$BUILDKIT_SCAN_SOURCE/var/lib/dpkg" --show \
  --showformat '{"name": "${Package}", "versionInfo": "${Version}"},')
cat > "$BUILDKIT_SCAN_DESTINATION/sbom.spdx.json" <<END
{"_type": "https://in-toto.io/Statement/v0.1", "subject": [],
 "predicateType": "https://spdx.dev/Document",
 "predicate": {"spdxVersion": "SPDX-2.3", "packages": [${packages%,}]}}
END
"""


def main() -> None:
    with scratch_folder("npair-twice-") as (scratch, stack):
        install_tools("runc", "skopeo", "debootstrap", "iproute2")
        stack.enter_context(engine(scratch, containerd=True))
        address = stack.enter_context(open_registry(scratch))
        step("put stand-ins together")
        triton, base = stand_in(scratch)
        scanner = scanner_on(base, scratch)
        bases = [_in_registry(name, address) for name in (triton, base, scanner)]
        options = ["--network", "host", *stack.enter_context(wheelhouse(scratch))]
        options += ["--build-arg", f"TRITON_FLOOR={WHEEL_RELEASE}"]
        check(f"{address}/tester/npair_model_api:cpu-1", bases, options, scratch)


def scanner_on(base: str, scratch: Path) -> str:
    """Build an image that lists Debian's packages for an SBOM. Returns: its name."""
    name, context = "npair-standin/scanner", scratch / "scanner"
    context.mkdir()
    (context / "scan").write_text(SCAN)
    (context / "Dockerfile").write_text(f'FROM {base}\nCOPY --chmod=755 scan /\nCMD ["/scan"]\n')
    command = ("docker", "buildx", "build", "--quiet", "--tag", name, context)
    run(*command, stdout=subprocess.DEVNULL)
    return name


def check(image: str, bases: Sequence[str], network: list[str], scratch: Path) -> None:
    """Push the image, once as it must not be, and build it again.

    bases: NVIDIA's image, the final image's base, and the scanner, by digest.
    """
    triton, base, scanner = bases
    commit = output("git", "rev-parse", "HEAD").strip()
    labels = {
        "org.opencontainers.image.revision": commit,
        "npair.triton-image": triton,
        "npair.base-image": base,
    }
    options = [*network, *(f"--label={name}={value}" for name, value in labels.items())]
    options += [f"--build-arg=TRITON_IMAGE={triton}", f"--build-arg=BASE_IMAGE={base}"]
    attest = ["--attest=type=provenance,mode=max", f"--attest=type=sbom,generator={scanner}"]

    step("build and push the image without attestations: refused")
    _push(image, scratch, *options, "--provenance=false")
    _verify("attested", image, refused="no attestation of the kind SLSA")

    step("push it with attestations")
    _push(image, scratch, *options, *attest)
    _verify("attested", image, "--commit", commit)
    _verify("attested", image, "--commit", "0" * 40, refused="was built from")
    joined, part = f"{image}-joined", f"linux/amd64={registry.digest(image)}"
    run(sys.executable, "scripts/release.py", "join", joined, part)
    _verify("attested", joined, "--commit", commit)

    step("build it again, and compare")
    _verify("reproduced", image, "--", *network)

    step("change a file: refused")
    spoiled = scratch / "spoiled"
    shutil.copytree(ROOT / "model/api", spoiled)
    with (spoiled / "client.py").open("a") as file:
        file.write("\n")
    _push(image, scratch, *options, *attest, context=spoiled)
    _verify("reproduced", image, "--", *network, refused="other layers")
    step("done")


def _push(image: str, scratch: Path, *options: str, context: Path = ROOT / "model/api") -> None:
    """Build and push, by way of an archive: Docker's own builder pushes no files of a set time."""
    archive = scratch / "image.tar"
    exported = f"type=oci,dest={archive},rewrite-timestamp=true,compression=uncompressed"
    build(image, *options, "--output", exported, context=context)
    copy = ("skopeo", "copy", "--quiet", "--all", "--preserve-digests", "--dest-tls-verify=false")
    run(*copy, f"oci-archive:{archive}", f"docker://{image}")


def _in_registry(name: str, address: str) -> str:
    """Push a local image. Returns: its name there, with its digest."""
    there = f"{address}/{name}"
    run("docker", "tag", name, there)
    run("docker", "push", "--quiet", there, stdout=subprocess.DEVNULL)
    return f"{there}:latest@{registry.digest(there)}"


def _verify(*arguments: str, refused: str = "") -> None:
    command = [sys.executable, "scripts/verify_image.py", *arguments]
    if not refused:
        run(*command)
        return
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stderr.strip())
    assert (done.returncode, refused in done.stderr) == (3, True), done


if __name__ == "__main__":
    main()
