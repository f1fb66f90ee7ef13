#!/usr/bin/env python3
"""Release a version: the steps that the workflows call, and that make release-dry-run tries.

Standard library only, with git, skopeo, docker buildx and gh. Exit code 3: refused, since the
release would not be what its name says. 1: a program failed, so running it again may help.
docs/ci-cd.md tells the order of the steps.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

from distribution import project, registry
from distribution.project import ROOT, RefusedError
from distribution.registry import CommandError, run


def main() -> int:
    arguments = _parser().parse_args()
    return registry.exit_code(lambda: arguments.run(arguments))


def version(_: argparse.Namespace) -> None:
    """Print the version of this checkout."""
    print(project.current())


def prepare(arguments: argparse.Namespace) -> None:
    """Set the version, and date the changelog's unreleased section. Commit the result."""
    for path in project.prepare(project.parse(arguments.version)):
        print(path)


def check(arguments: argparse.Namespace) -> None:
    """Refuse a tag that cannot be released. Print version= and image=, the digest if it has one.

    After a failure half-way, the image is there already. A release is complete, and refused, once
    it has its page on GitHub.
    """
    tag = arguments.tag
    released = project.of_tag(tag)
    if released != project.current():
        raise RefusedError(
            f"the tag is {tag}, and this checkout is {project.current()}: "
            f"run scripts/release.py prepare {released}, commit, and tag that"
        )
    project.section(released)
    head = _git("rev-parse", "HEAD")
    if _git("rev-parse", f"{tag}^{{commit}}") != head:
        raise RefusedError(f"{tag} is another commit than this checkout, {head}")
    if changes := _git("status", "--porcelain"):
        raise RefusedError(f"this checkout has changes:\n{changes}")
    image = ""
    if f"cpu-{released}" in registry.tags(arguments.image):
        image = registry.digest(name := f"{arguments.image}:cpu-{released}")
        if (built := registry.revisions(name)) != {head}:
            raise RefusedError(
                f"{name} was built from {', '.join(sorted(built))}, and {tag} is {head}: "
                "a tag never moves. Release the next version"
            )
    if _has_page(tag):
        raise RefusedError(f"{released} is released, and a version is released once")
    print(f"version={released}\nimage={image}")


def bases(_: argparse.Namespace) -> None:
    """Print the images that Dockerfile.cpu builds on, by the digests that their tags have now.

    All architectures of a build take the same ones, and a build can be repeated from them.
    """
    for stage in ("nvidia", "ubuntu"):
        line = re.compile(rf"^FROM (\S+) AS {stage}$", re.MULTILINE)
        (image,) = line.findall((ROOT / "model/api/Dockerfile.cpu").read_text())
        print(f"{stage}={image}@{registry.digest(image)}")


def join(arguments: argparse.Namespace) -> None:
    """Make one manifest list of the architectures that were tested. Print digest=."""
    parts = dict(part.partition("=")[::2] for part in arguments.parts)
    print(f"digest={registry.join(arguments.image, parts)}")


def promote(arguments: argparse.Namespace) -> None:
    """Give an image the names that belong to a git ref: cpu, or those of the release."""
    ref, repository, digest = arguments.ref, arguments.repository, arguments.digest
    if ref.startswith("refs/tags/"):
        names = registry.promote_release(
            repository, digest, project.of_tag(ref.removeprefix("refs/tags/"))
        )
    elif ref == "refs/heads/main":
        _check_forward(repository, digest)
        names = ["cpu"]
        registry.promote(repository, digest, names)
    else:
        print(f"{ref} is neither main nor a tag, so no name moves")
        return
    for name in names:
        print(f"{repository}:{name} is {digest}")


def _check_forward(repository: str, digest: str) -> None:
    """Refuse to move cpu to a commit that does not follow its own, as a second run of an old one.

    Without a cpu, anything goes. A commit that this clone does not know is none that precedes.
    """
    if "cpu" not in registry.tags(repository):
        return
    built = registry.revisions(f"{repository}:cpu")
    if not built <= set(_git("rev-list", "HEAD").split()):
        raise RefusedError(
            f"cpu was built from {', '.join(sorted(built))}, which is not in the history of "
            f"{_git('rev-parse', 'HEAD')}, and it only moves forward. To move it all the same: "
            f"scripts/promote.sh {repository} {digest} cpu"
        )


def page(arguments: argparse.Namespace) -> None:
    """Complete a release: its page on GitHub, with notes, files and their checksums."""
    released = project.of_tag(arguments.tag)
    files = sorted(arguments.dist.glob(f"npair-{released}*"))
    if [path.suffix for path in files] != [".whl", ".gz"]:
        raise RefusedError(f"{arguments.dist} does not hold one wheel and one sdist of {released}")
    sums = arguments.dist / "SHA256SUMS"
    sums.write_text(
        "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    )
    notes = arguments.dist / "notes.md"
    notes.write_text(_notes(released, arguments.image, sums.read_text()))
    options = [] if released.final else ["--prerelease"]
    options += ["--verify-tag", "--title", f"npair {released}", "--notes-file", str(notes)]
    print(run("gh", "release", "create", arguments.tag, *options, *files, sums).strip())


def _notes(released: project.Version, image: str, sums: str) -> str:
    name = f"{image.partition('@')[0]}:cpu-{released}"
    digest = registry.digest(name)
    if digest != image.partition("@")[2]:
        raise RefusedError(f"{name} is {digest}, not what was tested, {image}")
    platforms = ", ".join(sorted(registry.configs(name)))
    _, text = project.section(released)
    return (
        f"{text}\n### What was released\n\n"
        f"The image, for {platforms}:\n\n```text\n{name}@{digest}\n```\n\n"
        f"The Python package, SHA-256:\n\n```text\n{sums}```\n\n"
        f"docs/ci-cd.md says how to verify both.\n"
    )


def _has_page(tag: str) -> bool:
    try:
        run("gh", "release", "view", tag, "--json", "tagName")
    except CommandError as error:
        if "release not found" in str(error):
            return False
        raise
    return True


def _git(*arguments: str) -> str:
    return run("git", "-C", ROOT, *arguments).strip()


def _parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    image = "the image's name without a tag, like ghcr.io/OWNER/npair_model_api"
    for run_it in (version, prepare, check, bases, join, promote, page):
        text = (run_it.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(run_it.__name__, help=text, description=text)
        command.set_defaults(run=run_it)
        match run_it.__name__:
            case "prepare":
                command.add_argument("version", help="X.Y.Z, or X.Y.ZrcN")
            case "check":
                command.add_argument("tag", help="vX.Y.Z, or vX.Y.ZrcN")
                command.add_argument("--image", required=True, help=image)
            case "join":
                command.add_argument("image", help="the name and tag of the list")
                command.add_argument("parts", nargs="+", metavar="PLATFORM=DIGEST")
            case "promote":
                command.add_argument("repository", help=image)
                command.add_argument("digest", help="what passed its tests")
                command.add_argument("--ref", required=True, help="like refs/heads/main")
            case "page":
                command.add_argument("tag", help="vX.Y.Z, or vX.Y.ZrcN")
                command.add_argument("--image", required=True, help="its name, @ and its digest")
                command.add_argument("--dist", type=Path, default=ROOT / "dist")
    return whole


if __name__ == "__main__":
    sys.exit(main())
