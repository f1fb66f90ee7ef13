"""Images in a registry: manifest lists, and the names that people pull.

skopeo and docker buildx do the work, with Docker's credentials.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distribution.project import RefusedError, Version, parse

PROMOTE = Path(__file__).resolve().parents[1] / "promote.sh"
REVISION = "org.opencontainers.image.revision"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class CommandError(Exception):
    """A program that failed. The message has its errors."""


def exit_code(step: Callable[[], object]) -> int:
    """Run a step of a script, and print why it ends badly.

    Returns: 0; 3 if the step is refused; 1 if a program failed.
    """
    try:
        step()
    except RefusedError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 3
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(*command: str | Path, stdin: str | None = None) -> str:
    """Run a command. Returns: what it printed. Raises: CommandError with its errors."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise CommandError(f"{words[0]} is not installed") from None
    if done.returncode != 0:
        raise CommandError(f"{' '.join(words)} failed:\n{done.stderr.strip()}")
    return done.stdout


def tags(repository: str) -> set[str]:
    """List a repository's tags, none if the registry does not know it."""
    try:
        listed = run("skopeo", "list-tags", *_options(repository), f"docker://{repository}")
    except CommandError as error:
        if not re.search(r"name unknown|404 \(Not Found\)", str(error)):
            raise
        return set()
    return set(json.loads(listed)["Tags"])


def digest(image: str) -> str:
    """Get the digest of what a name like REPOSITORY:TAG means now."""
    return str(inspect(image, ".Manifest")["digest"])


def configs(image: str) -> dict[str, dict[str, Any]]:
    """Get an image's configuration for each platform, like linux/amd64."""
    found = inspect(image, ".Image")
    if "architecture" in found:  # of one platform
        found = {f"{found['os']}/{found['architecture']}": found}
    return found


def revisions(image: str) -> set[str]:
    """Get the commits that an image was built from, one for all its platforms if all is well."""
    labels = (config["config"].get("Labels") or {} for config in configs(image).values())
    return {str(label.get(REVISION)) for label in labels}


def join(image: str, parts: dict[str, str]) -> str:
    """Put a manifest list together and give it a name.

    image: REPOSITORY:TAG. parts: the tested digest for each platform; attestations that belong to
    it come along. The same digests make the same list. Returns: the list's digest.
    """
    repository, _, _ = image.rpartition(":")
    for platform, part in parts.items():
        check_digest(part)
        held = set(configs(f"{repository}@{part}"))
        if held != {platform}:
            raise RefusedError(f"{part} is for {', '.join(sorted(held))}, not for {platform} alone")
    sources = [f"{repository}@{part}" for part in parts.values()]
    run("docker", "buildx", "imagetools", "create", "--tag", image, *sources)
    # Another run for the same commit, of main or of a tag, may have taken the name meanwhile.
    made = inspect(image, ".Manifest")
    if _held(made) != {each for source in sources for each in _held(inspect(source, ".Manifest"))}:
        raise RefusedError(
            f"{image} names {made['digest']}, which is not of {', '.join(parts.values())}: "
            "another run took the name. Run this job again"
        )
    return str(made["digest"])


def release_tags(version: Version, existing: set[str]) -> list[str]:
    """Choose the names that a release gets.

    X.Y and X move forward alone: a patch of an older line must not pull them back, and
    pre-releases leave them where they are. The name that is given once comes last: if it is there,
    so are the others.
    """
    chosen = [f"cpu-{version}"]
    if version.final:
        later = [other for other in map(_released, existing) if other and other.final]
        later = [other for other in later if other > version and other.major == version.major]
        if not any(other.minor == version.minor for other in later):
            chosen.insert(0, f"cpu-{version.major}.{version.minor}")
        if not later:
            chosen.insert(0, f"cpu-{version.major}")
    return chosen


def promote_release(repository: str, wanted: str, version: Version) -> list[str]:
    """Name an image after a release. Returns: the names.

    cpu-X.Y.Z is given once: to give it to the same image again changes nothing, and to another
    is refused.
    """
    existing = tags(repository)
    name = f"{repository}:cpu-{version}"
    if f"cpu-{version}" in existing and (released := digest(name)) != wanted:
        raise RefusedError(
            f"{name} is {released}, and a release never changes: not {wanted}. "
            "Release the next version"
        )
    chosen = release_tags(version, existing)
    promote(repository, wanted, chosen)
    return chosen


def promote(repository: str, wanted: str, names: Sequence[str]) -> None:
    """Give an image further names, whatever they named before."""
    check_digest(wanted)
    run(PROMOTE, repository, wanted, *names)


def check_digest(text: str) -> None:
    if not DIGEST.fullmatch(text):
        raise RefusedError(f"{text!r} is no digest: did the job that makes it end well?")


def inspect(image: str, template: str) -> dict[str, Any]:
    """Get a part of what docker buildx imagetools knows of an image, like ".Provenance"."""
    found = run(
        "docker", "buildx", "imagetools", "inspect", "--format", f"{{{{json {template}}}}}", image
    )
    return dict(json.loads(found))


def _held(manifest: dict[str, Any]) -> set[str]:
    """Get the digests in a list of manifests, or that of an image of one platform."""
    return {str(each["digest"]) for each in manifest.get("manifests") or [manifest]}


def _released(tag: str) -> Version | None:
    try:
        return parse(tag.removeprefix("cpu-")) if tag.startswith("cpu-") else None
    except RefusedError:
        return None


def _options(repository: str) -> list[str]:
    # Docker takes loopback registries without TLS by itself, and skopeo does not.
    return ["--tls-verify=false"] if on_loopback(repository) else []


def on_loopback(repository: str) -> bool:
    return repository.startswith(("127.", "localhost:"))
