#!/usr/bin/env python3
"""Check what an image says of itself: attested, what it is made of; reproduced, from what source.

    scripts/verify_image.py attested ghcr.io/OWNER/npair_model_api:cpu
    scripts/verify_image.py reproduced ghcr.io/OWNER/npair_model_api:cpu-1.2.3

Standard library only, with skopeo and docker buildx. Exit code 3: it is not so. 1: a program
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from distribution import registry
from distribution.project import ROOT, RefusedError
from distribution.registry import REVISION, run

BASES = {"TRITON_IMAGE": "npair.triton-image", "BASE_IMAGE": "npair.base-image"}
MACHINES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}


def main() -> int:
    whole = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for check in (attested, reproduced):
        text = (check.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(check.__name__, help=text, description=text)
        command.set_defaults(check=check)
        command.add_argument("image", help="with a tag, or @ and a digest")
        if check is attested:
            command.add_argument("--commit", help="what it must be built from")
        else:
            command.add_argument("options", nargs="*", help="for docker buildx build, after --")
    arguments = whole.parse_args()
    return registry.exit_code(lambda: arguments.check(arguments))


def attested(arguments: argparse.Namespace) -> None:
    """Check that each architecture comes with an SBOM and a provenance that agree with it."""
    image, configs = arguments.image, registry.configs(arguments.image)
    provenances = by_platform(registry.inspect(image, ".Provenance"), "SLSA", configs)
    sboms = by_platform(registry.inspect(image, ".SBOM"), "SPDX", configs)
    for name, config in configs.items():
        labels = config["config"].get("Labels") or {}
        commit = labels.get(REVISION)
        if arguments.commit not in (None, commit):
            raise RefusedError(f"{name} was built from {commit}, not from {arguments.commit}")
        packages = sboms[name].get("packages", [])
        if not packages:
            raise RefusedError(f"{name}: its SBOM lists no package")
        origins = sources(provenances[name])
        for label in BASES.values():
            digest = str(labels.get(label)).rpartition("@sha256:")[2]
            if digest not in origins:
                raise RefusedError(
                    f"{name} says {label} {labels.get(label)}; its provenance does not"
                )
        print(f"{name}: commit {commit}, {len(packages)} packages, {len(origins)} sources:")
        for digest, source in origins.items():
            print(f"  {source} sha256:{digest}")


def reproduced(arguments: argparse.Namespace) -> None:
    """Build this checkout again from the same base images, and compare every layer.

    Layers are compared as they are unpacked, since how they are compressed depends on BuildKit.
    """
    here = MACHINES[platform.machine()]
    config = registry.configs(arguments.image).get(here)
    if config is None:
        raise RefusedError(f"{arguments.image} is not for this machine, {here}")
    labels = config["config"].get("Labels") or {}
    head = run("git", "-C", ROOT, "rev-parse", "HEAD").strip()
    if labels.get(REVISION) != head:
        raise RefusedError(
            f"it was built from {labels.get(REVISION)}, and this checkout is {head}: "
            f"git checkout {labels.get(REVISION)}"
        )
    options = list(arguments.options)
    for argument, label in BASES.items():
        if label not in labels:
            raise RefusedError(f"it has no label {label}, so its base images are unknown")
        options += ["--build-arg", f"{argument}={labels[label]}"]
    with tempfile.TemporaryDirectory() as folder:
        layers = _build(Path(folder) / "image.tar", here, options)
    found = config["rootfs"]["diff_ids"]
    for number, (first, second) in enumerate(zip(found, layers, strict=False)):
        print(f"{number:2} {first} {'again' if first == second else 'is now ' + second}")
    if found != layers:
        raise RefusedError(
            "another build has other layers: does Ubuntu have newer packages, or did a cache of an "
            "earlier commit give some of these?"
        )
    print(f"all {len(layers)} layers are the same")


def _build(archive: Path, here: str, options: list[str]) -> list[str]:
    """Build the image without any cache. Returns: its layers."""
    os.environ["SOURCE_DATE_EPOCH"] = run("git", "-C", ROOT, "log", "-1", "--pretty=%ct").strip()
    context = ROOT / "model/api"
    command = ["docker", "buildx", "build", "--no-cache", "--platform", here, "--provenance=false"]
    command += ["--build-context", f"model_repository={ROOT / 'model_repository'}"]
    exported = f"type=oci,dest={archive},rewrite-timestamp=true,compression=uncompressed"
    command += ["--output", exported]
    run(*command, "--file", context / "Dockerfile.cpu", *options, context)
    config = json.loads(run("skopeo", "inspect", "--config", "--raw", f"oci-archive:{archive}"))
    return list(config["rootfs"]["diff_ids"])


def by_platform(
    found: dict[str, Any], kind: str, configs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Get the attestations of one kind for each platform, of which all must have one."""
    if kind in found:  # of one platform
        found = dict.fromkeys(configs, found)
    missing = [name for name in configs if kind not in found.get(name, {})]
    if missing:
        raise RefusedError(f"{', '.join(missing)}: no attestation of the kind {kind} came along")
    return {name: found[name][kind] for name in configs}


def sources(provenance: dict[str, Any]) -> dict[str, str]:
    """Get what a build took in, by SHA-256. SLSA 0.2 and 1.0 have other names for it."""
    found = provenance.get("materials")
    found = found or provenance.get("buildDefinition", {}).get("resolvedDependencies", [])
    return {source["digest"]["sha256"]: source["uri"] for source in found if "digest" in source}


if __name__ == "__main__":
    sys.exit(main())
