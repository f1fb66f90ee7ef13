"""Release to a registry and a package index on this machine alone: make release-dry-run.

In a clone of this commit, tags go the way of release.yml: check, manifest list, wheel, names,
index, page. Then what must be refused is tried, and what must go on after a failure half-way.
The images are empty stand-ins for two architectures, since make test-image covers what is inside
the real one, and a stand-in for gh keeps the page in a folder, since there is no GitHub here.

Needs: Debian, apt-get, and the .venv of `make install`. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from distribution.project import parse
from image.commands import ROOT, background, output, run, scratch_folder, status, step, wait_for
from image.engine import install_tools, unpack, use
from image.registry import open_registry

PLATFORMS = ("linux/amd64", "linux/arm64")
REFUSED = 3  # release.py's exit code
GH = """#!/bin/sh
# gh release view|create TAG ...: the page is a folder.
page="{pages}/$3"
case $2 in
  view) [ -d "$page" ] || {{ echo "release not found" >&2; exit 1; }} ;;
  create) mkdir "$page"; for file; do [ ! -f "$file" ] || cp "$file" "$page"; done ;;
esac
"""


def main() -> None:
    with scratch_folder("npair-release-") as (scratch, stack):
        DryRun(scratch, stack).run()


class DryRun:
    def __init__(self, scratch: Path, stack: contextlib.ExitStack) -> None:
        self.scratch, self.clone, self.pages = scratch, scratch / "clone", scratch / "pages"
        install_tools("skopeo")
        unpack(scratch, "docker-cli", "docker-buildx", "docker-registry")
        use(scratch, scratch / "docker")
        step("start a registry and an index")
        packages, programs = scratch / "index", scratch / "bin"
        for folder in (packages, programs, self.pages):
            folder.mkdir()
        (programs / "gh").write_text(GH.format(pages=self.pages))
        (programs / "gh").chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.index = f"http://127.0.0.1:{port}"
        serve = [sys.executable, "-m", "pypiserver", "run", "--interface", "127.0.0.1"]
        serve += ["--port", port, "--passwords", ".", "--authenticate", ".", "--disable-fallback"]
        stack.enter_context(background([*serve, packages], scratch / "index.log"))
        wait_for("the index", lambda: status("127.0.0.1", port, "GET", "/simple/") == 200)
        self.image = f"{stack.enter_context(open_registry(scratch))}/tester/npair_model_api"
        os.environ |= {
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "UV": "uv",
            "PUBLISH_URL": f"{self.index}/",
            "CHECK_URL": f"{self.index}/simple/",
            "UV_PUBLISH_USERNAME": "tester",
            "UV_PUBLISH_PASSWORD": "none",
            "GIT_AUTHOR_NAME": "tester",
            "GIT_AUTHOR_EMAIL": "tester@example.com",
            "GIT_COMMITTER_NAME": "tester",
            "GIT_COMMITTER_EMAIL": "tester@example.com",
        }

    def run(self) -> None:
        run("git", "clone", "--quiet", ROOT, self.clone)
        version = parse(self.call("version").strip())
        major, minor, patch = version.major, version.minor, version.patch
        first = f"{major}.{minor}.{patch}"
        step(f"release {first}")
        if version.final:
            self.git("tag", f"v{first}")
        else:
            self.next(first)
        self.release(f"v{first}")
        self.show(first)
        assert self.names() == {first: {f"cpu-{first}", f"cpu-{major}.{minor}", f"cpu-{major}"}}

        step("release it again: refused")
        self.refused("is released once", "check", f"v{first}", "--image", self.image)

        step("release the next one, and then a patch of the one before")
        second, older = f"{major}.{minor + 1}.0", f"{major}.{minor}.{patch + 1}"
        self.next(second)
        self.release(f"v{second}")
        self.git("checkout", "--quiet", f"v{first}")
        self.next(older)
        self.release(f"v{older}")
        assert self.names() == {
            first: {f"cpu-{first}"},
            older: {f"cpu-{older}", f"cpu-{major}.{minor}"},
            second: {f"cpu-{second}", f"cpu-{major}.{minor + 1}", f"cpu-{major}"},
        }

        step("release a candidate: no other name moves")
        before = self.names()
        self.git("checkout", "--quiet", f"v{second}")
        candidate = f"{major}.{minor + 2}.0rc1"
        self.next(candidate)
        self.release(f"v{candidate}")
        assert self.names() == before | {candidate: {f"cpu-{candidate}"}}

        step("lose the index half-way, and run the release again")
        third = f"{major}.{minor + 2}.0"
        self.next(third)
        try:
            self.release(
                f"v{third}",
                CHECK_URL=f"{self.index}/none/",
                PUBLISH_URL="http://127.0.0.1:9/",
            )
        except subprocess.CalledProcessError:
            promoted = self.names()[third]
        else:
            raise SystemExit("a release without an index ended well")
        built = len(list((self.scratch / "images").iterdir()))
        self.release(f"v{third}")
        assert built == len(list((self.scratch / "images").iterdir())), "it was built again"
        assert self.names()[third] == promoted

        step("give a released name to another image: refused")
        other = self.build(f"{third}-other")
        ref = f"refs/tags/v{third}"
        self.refused("never changes", "promote", self.image, other, "--ref", ref)
        assert self.names()[third] == promoted

        step("move a tag: refused")
        shutil.rmtree(self.pages / f"v{third}")
        self.git("commit", "--quiet", "--allow-empty", "--message", "Something else")
        self.git("tag", "--force", f"v{third}")
        self.refused("a tag never moves", "check", f"v{third}", "--image", self.image)

        step("publish two commits of main, and run the first again: refused")
        main = ("--ref", "refs/heads/main")
        for name in ("main", "newer"):
            self.git("commit", "--quiet", "--allow-empty", "--message", name)
            newest = self.build(name)
            self.call("promote", self.image, newest, *main)
            assert self.digest("cpu") == newest
        self.git("checkout", "--quiet", "HEAD~1")
        self.refused("only moves forward", "promote", self.image, self.build("again"), *main)
        assert self.digest("cpu") == newest

        step("publish other files under a released version: refused")
        run("scripts/build-dist.sh", cwd=self.clone)  # the commit's time is another one
        refused = subprocess.run(
            ["scripts/publish.sh"], cwd=self.clone, capture_output=True, text=True, check=False
        )
        assert refused.returncode != 0, "PyPI's files were replaced"
        assert "do not match" in refused.stderr, refused.stderr
        step("done")

    def release(self, tag: str, **variables: str) -> None:
        """Do what release.yml does, in its order."""
        checked = _outputs(self.call("check", tag, "--image", self.image))
        digest = checked["image"] or self.build(tag)
        run("scripts/build-dist.sh", cwd=self.clone, stdout=subprocess.DEVNULL)
        self.call("promote", self.image, digest, "--ref", f"refs/tags/{tag}")
        run("scripts/publish.sh", cwd=self.clone, env=variables, stderr=subprocess.DEVNULL)
        self.call("page", tag, "--image", f"{self.image}@{digest}")

    def build(self, name: str) -> str:
        """Push an image for each architecture, and join them. Returns: the list's digest."""
        commit = self.git("rev-parse", "HEAD")
        parts = []
        for platform in PLATFORMS:
            folder = self.scratch / "images" / f"{name}-{platform.partition('/')[2]}"
            digest = _write_image(folder, platform, commit, name)
            options = ("--quiet", "--dest-tls-verify=false")
            target = f"docker://{self.image}:cpu-{commit}-{platform.partition('/')[2]}"
            run("skopeo", "copy", *options, "--preserve-digests", f"oci:{folder}", target)
            parts.append(f"{platform}={digest}")
        return _outputs(self.call("join", f"{self.image}:cpu-{commit}", *parts))["digest"]

    def next(self, version: str) -> None:
        """Prepare, commit and tag a version with a change."""
        changelog = self.clone / "CHANGELOG.md"
        text = changelog.read_text().replace("## Unreleased\n", "## Unreleased\n\n- News.\n", 1)
        changelog.write_text(text)
        self.call("prepare", version)
        self.git("commit", "--quiet", "--all", "--message", f"Release {version}")
        self.git("tag", f"v{version}")

    def names(self) -> dict[str, set[str]]:
        """List what each release is called in the registry now."""
        listed = json.loads(
            output("skopeo", "list-tags", "--tls-verify=false", f"docker://{self.image}")
        )["Tags"]
        names = [name for name in listed if len(name) < 40]  # the others are of commits
        digests = {name: self.digest(name) for name in names}
        return {
            name.removeprefix("cpu-"): {other for other in names if digests[other] == digest}
            for name, digest in digests.items()
            if name.count(".") == 2
        }

    def digest(self, name: str) -> str:
        return "sha256:" + hashlib.sha256(self.manifest(name).encode()).hexdigest()

    def manifest(self, name: str) -> str:
        return output(
            "skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{self.image}:{name}"
        )

    def show(self, version: str) -> None:
        """Print what a release left, and check that it installs from the index."""
        held = json.loads(self.manifest(f"cpu-{version}"))["manifests"]
        platforms = [f"{m['platform']['os']}/{m['platform']['architecture']}" for m in held]
        assert platforms == list(PLATFORMS), platforms
        print(f"cpu-{version} is {self.digest(f'cpu-{version}')}, for {', '.join(platforms)}")
        folder = self.scratch / "downloaded"
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--dest", folder]
        run(*pip, "--index-url", f"{self.index}/simple/", f"npair=={version}")
        page = self.pages / f"v{version}"
        run("sha256sum", "--check", "--quiet", "SHA256SUMS", cwd=page)
        for path in (*folder.iterdir(), *sorted(page.iterdir())):
            print(path.relative_to(self.scratch))
        print((page / "notes.md").read_text()[-900:])

    def git(self, *arguments: str) -> str:
        return output("git", "-C", self.clone, *arguments).strip()

    def call(self, *arguments: str) -> str:
        return output(sys.executable, self.clone / "scripts/release.py", *arguments)

    def refused(self, why: str, *arguments: str) -> None:
        command = [sys.executable, str(self.clone / "scripts/release.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(done.stderr.strip())
        assert (done.returncode, why in done.stderr) == (REFUSED, True), done


def _write_image(folder: Path, platform: str, commit: str, name: str) -> str:
    """Write an image without layers, in the OCI layout. Returns: its digest."""
    system, _, architecture = platform.partition("/")
    kind = "application/vnd.oci.image"
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: object, media: str) -> dict[str, object]:
        data = json.dumps(content).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

    labels = {"org.opencontainers.image.revision": commit, "name": name}
    config = blob(
        {
            "os": system,
            "architecture": architecture,
            "config": {"Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": []},
        },
        f"{kind}.config.v1+json",
    )
    media = f"{kind}.manifest.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": media, "config": config, "layers": []}
    described = blob(manifest, media)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [described]}))
    return str(described["digest"])


def _outputs(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines())


if __name__ == "__main__":
    main()
