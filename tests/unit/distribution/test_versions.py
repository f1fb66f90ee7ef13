"""A release's version, its names, and what is refused. make release-dry-run does the rest."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import release
import report_scans
import verify_image
from distribution import project, registry
from distribution.project import CHANGELOG, CHART, SOURCE, RefusedError, parse
from support.models import ROOT

import npair

DIGEST = "sha256:" + "a" * 64


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Write a checkout of version 1.2.3, with something unreleased."""
    for path in (SOURCE, CHART):
        (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / SOURCE).write_text('"""npair."""\n\n__version__ = "1.2.3"\n')
    (tmp_path / CHART).write_text('version: 0.4.0\nappVersion: "1.2.3"\n')
    (tmp_path / CHANGELOG).write_text(
        "# Changelog\n\n## Unreleased\n\n- New.\n\n## 1.2.3 - 2026-01-31\n\n### Fixed\n\n- Old.\n"
    )
    return tmp_path


class TestVersion:
    def test_order(self) -> None:
        texts = ["0.9.9", "1.0.0rc2", "1.0.0rc10", "1.0.0", "1.0.1", "1.2.0", "1.10.0"]
        assert [str(version) for version in sorted(map(parse, reversed(texts)))] == texts

    @pytest.mark.parametrize(
        "text", ["1.2", "v1.2.3", "1.2.3.4", "01.2.3", "1.2.3-rc1", "1.2.3rc0", ""]
    )
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(RefusedError, match=re.escape(f"{text!r} is no version")):
            parse(text)

    @pytest.mark.parametrize("tag", ["1.2.3", "latest", "refs/tags/v1.2.3"])
    def test_tags_have_a_v(self, tag: str) -> None:
        with pytest.raises(RefusedError, match=r"these are vX\.Y\.Z"):
            project.of_tag(tag)


class TestOnePlace:
    """The package, the client, the image, the chart and the changelog tell the same version."""

    def test_of_this_checkout(self) -> None:
        version = project.current()
        assert str(version) == npair.__version__
        assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
        workflow = (ROOT / ".github/workflows/docker-publish-model.yml").read_text()
        assert 'echo "VERSION=$(scripts/release.py version)" >> "$GITHUB_ENV"' in workflow
        assert "org.opencontainers.image.version=${{ env.VERSION }}" in workflow
        assert project.chart_version() in (None, npair.__version__)
        if version.final:
            assert project.section(version)[0] <= str(date.today())

    def test_the_program_prints_it(self) -> None:
        command = [str(ROOT / "scripts/release.py"), "version"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"{npair.__version__}\n"


class TestPrepare:
    def test_all_places_change(self, checkout: Path) -> None:
        version = parse("1.3.0")
        assert project.prepare(version, checkout, date(2026, 2, 1)) == [SOURCE, CHART, CHANGELOG]
        assert project.current(checkout) == version
        assert project.chart_version(checkout) == "1.3.0"
        assert project.section(version, checkout) == ("2026-02-01", "- New.\n")
        assert project.section(parse("1.2.3"), checkout) == ("2026-01-31", "### Fixed\n\n- Old.\n")

    def test_candidates_leave_the_changelog(self, checkout: Path) -> None:
        version = parse("1.3.0rc1")
        assert project.prepare(version, checkout) == [SOURCE, CHART]
        assert project.section(version, checkout) == ("", "- New.\n")

    @pytest.mark.parametrize("text", ["1.2.3", "1.2.3rc1", "0.9.0"])
    def test_only_upwards(self, text: str, checkout: Path) -> None:
        with pytest.raises(RefusedError, match=r"is not above .*1\.2\.3"):
            project.prepare(parse(text), checkout)

    def test_nothing_new_is_no_release(self, checkout: Path) -> None:
        project.prepare(parse("1.3.0"), checkout)
        with pytest.raises(RefusedError, match="is empty"):
            project.prepare(parse("1.4.0"), checkout)


class TestSection:
    def test_missing(self, checkout: Path) -> None:
        with pytest.raises(RefusedError, match=r"no section '## 1\.2\.4 - YYYY-MM-DD'"):
            project.section(parse("1.2.4"), checkout)

    def test_without_a_date(self, checkout: Path) -> None:
        path = checkout / CHANGELOG
        path.write_text(path.read_text().replace("2026-01-31", "soon"))
        with pytest.raises(RefusedError, match="'soon' is no date"):
            project.section(parse("1.2.3"), checkout)


class TestNames:
    @pytest.mark.parametrize(
        ("version", "existing", "names"),
        [
            ("1.2.3", "", "cpu-1 cpu-1.2 cpu-1.2.3"),
            ("1.2.3", "cpu cpu-0123abc cpu-1.2.2 cpu-1.2", "cpu-1 cpu-1.2 cpu-1.2.3"),
            ("1.2.3", "cpu-1.2.3 cpu-1.2 cpu-1", "cpu-1 cpu-1.2 cpu-1.2.3"),
            ("1.2.3", "cpu-1.2.10", "cpu-1.2.3"),
            ("1.2.3", "cpu-1.3.0", "cpu-1.2 cpu-1.2.3"),
            ("1.2.3", "cpu-2.0.0", "cpu-1 cpu-1.2 cpu-1.2.3"),
            ("1.2.3", "cpu-1.3.0rc1", "cpu-1 cpu-1.2 cpu-1.2.3"),
            ("1.3.0rc1", "cpu-1.2.3", "cpu-1.3.0rc1"),
        ],
    )  # fmt: skip
    def test_move_forward_alone(self, version: str, existing: str, names: str) -> None:
        assert registry.release_tags(parse(version), set(existing.split())) == names.split()

    @pytest.mark.parametrize("digest", ["", "latest", "sha256:abc", DIGEST.upper()])
    def test_nothing_but_a_digest_is_promoted(self, digest: str) -> None:
        with pytest.raises(RefusedError, match="is no digest"):
            registry.promote("127.0.0.1:9/x", digest, ["cpu"])

    @pytest.mark.parametrize("tag", ["", "cpu-", "cpu 1"])
    def test_nor_to_a_name_that_was_not_filled_in(self, tag: str) -> None:
        command = [str(ROOT / "scripts/promote.sh"), "127.0.0.1:9/x", DIGEST, tag]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"not a tag: '{tag}'\n")


class TestMain:
    """cpu follows main. The registry is a stand-in; make release-dry-run asks a real one."""

    @pytest.fixture
    def commits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Make main of three commits, of which the second is checked out."""

        def git(*arguments: str) -> str:
            who = ("-c", "user.name=tester", "-c", "user.email=tester@example.com")
            return registry.run("git", "-C", tmp_path, *who, *arguments).strip()

        git("init", "--quiet")
        made = []
        for _ in range(3):
            git("commit", "--quiet", "--allow-empty", "--message", "Something")
            made.append(git("rev-parse", "HEAD"))
        git("checkout", "--quiet", made[1])
        monkeypatch.setattr(release, "ROOT", tmp_path)
        return made

    @staticmethod
    def promote(monkeypatch: pytest.MonkeyPatch, *built: str) -> list[str]:
        """Promote what is checked out, where cpu was built from these commits. Returns: names."""
        promoted: list[str] = []
        monkeypatch.setattr(registry, "tags", lambda _: {"cpu"} if built else {"cpu-1"})
        monkeypatch.setattr(registry, "revisions", lambda _: set(built))
        monkeypatch.setattr(registry, "promote", lambda *given: promoted.extend(given[2]))
        main = argparse.Namespace(repository="x", digest=DIGEST, ref="refs/heads/main")
        release.promote(main)
        return promoted

    @pytest.mark.parametrize("built", [[], [0], [1]], ids=["none yet", "before", "the same"])
    def test_forward(
        self, built: list[int], commits: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.promote(monkeypatch, *(commits[index] for index in built)) == ["cpu"]

    @pytest.mark.parametrize("built", [[2], [0, 2], None], ids=["later", "in part", "unknown"])
    def test_not_back(
        self, built: list[int] | None, commits: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources = ["None"] if built is None else [commits[index] for index in built]
        with pytest.raises(RefusedError, match=rf"only moves forward.* x {DIGEST} cpu"):
            self.promote(monkeypatch, *sources)

    def test_the_workflow_knows_the_history(self) -> None:
        workflow = (ROOT / ".github/workflows/docker-publish-model.yml").read_text()
        job = workflow.partition("\n  promote:\n")[2]
        assert "fetch-depth: 0" in job.partition("- uses: actions/download-artifact")[0]


@pytest.mark.parametrize("taken", [False, True])
def test_a_list_is_of_what_was_tested(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a registry in which a run of the same commit may take the list's name."""
    parts = {
        f"linux/{name}": "sha256:" + digit * 64 for name, digit in (("amd64", "8"), ("s390x", "9"))
    }
    first, second = ({"digest": f"sha256:{digit * 64}"} for digit in "12")
    other = {"digest": "sha256:" + "3" * 64}
    found = {
        f"x@{parts['linux/amd64']}": {"digest": parts["linux/amd64"], "manifests": [first]},
        f"x@{parts['linux/s390x']}": {"digest": parts["linux/s390x"], "manifests": [second]},
        "x:cpu-1": {"digest": DIGEST, "manifests": [first, other if taken else second]},
    }
    platforms: dict[str, Any] = {f"x@{part}": {platform: {}} for platform, part in parts.items()}
    monkeypatch.setattr(registry, "configs", platforms.get)
    monkeypatch.setattr(registry, "inspect", lambda image, _: found[image])
    monkeypatch.setattr(registry, "run", lambda *_: "")
    if taken:
        with pytest.raises(RefusedError, match=r"x:cpu-1 names .* another run took the name"):
            registry.join("x:cpu-1", parts)
    else:
        assert registry.join("x:cpu-1", parts) == DIGEST


@pytest.mark.parametrize("step", ["check", "page"])
def test_a_tag_goes_the_way_of_the_dry_run(step: str) -> None:
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    assert f'scripts/release.py {step} "$GITHUB_REF_NAME"' in workflow
    assert f'self.call("{step}", tag' in (ROOT / "scripts/release_dry_run.py").read_text()


def test_uv_has_one_pin() -> None:
    pins = re.findall(r'"(uv==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    locked = re.findall(
        r"^(uv==\S+)", (ROOT / "scripts/requirements.txt").read_text(), re.MULTILINE
    )
    assert pins == locked


class TestAttestations:
    def test_each_platform_needs_its_own(self) -> None:
        found: dict[str, Any] = {"linux/amd64": {"SLSA": {}}, "linux/arm64": {}}
        with pytest.raises(RefusedError, match=r"^linux/arm64: no attestation"):
            verify_image.by_platform(found, "SLSA", {name: {} for name in found})

    @pytest.mark.parametrize("key", ["materials", "resolvedDependencies"])
    def test_both_formats_of_provenance(self, key: str) -> None:
        listed = [{"uri": "pkg:docker/ubuntu@24.04", "digest": {"sha256": "ab"}}, {"uri": "git"}]
        provenance: dict[str, Any] = {key: listed}
        if key != "materials":
            provenance = {"buildDefinition": provenance}
        assert verify_image.sources(provenance) == {"ab": "pkg:docker/ubuntu@24.04"}


class TestScans:
    """gh is a stand-in that writes down how it was called, since there is no GitHub here."""

    @pytest.fixture
    def scans(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "gh").write_text(
            f'#!/bin/sh\n[ "$2" = list ] && exec cat {tmp_path}/open\n'
            f'printf "%s\\n" "$@" > {tmp_path}/called\n'
            f'case "$*" in *"--body-file -") cat > {tmp_path}/body ;; esac\n'
        )
        (tmp_path / "gh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        self.found(tmp_path, "amd64")
        self.found(tmp_path, "arm64")
        self.opened(tmp_path, True)
        return tmp_path

    @staticmethod
    def found(scans: Path, architecture: str, *vulnerabilities: dict[str, str]) -> None:
        path = scans / f"scan-{architecture}/scan.json"
        path.parent.mkdir(exist_ok=True)
        result = {"Target": "ubuntu 24.04", "Vulnerabilities": vulnerabilities}
        path.write_text(json.dumps({"Results": [result]}))

    @staticmethod
    def opened(scans: Path, ours: bool) -> None:
        issues = [{"number": 6, "title": "another"}, {"number": 7, "title": report_scans.TITLE}]
        (scans / "open").write_text(json.dumps(issues[: 2 if ours else 1]))

    @staticmethod
    def vulnerability(number: int, severity: str = "HIGH") -> dict[str, str]:
        return {
            "VulnerabilityID": f"CVE-2026-{number}",
            "PkgName": "openssl",
            "InstalledVersion": "3.0",
            "FixedVersion": "3.1",
            "Severity": severity,
            "PrimaryURL": f"https://avd.aquasec.com/nvd/cve-2026-{number}",
        }

    @staticmethod
    def report(scans: Path, result: str = "success") -> None:
        report_scans.main(scans, result, ["amd64", "arm64"])

    def test_nothing_found_and_nothing_open(self, scans: Path) -> None:
        self.opened(scans, False)
        self.report(scans)
        assert not (scans / "called").exists()

    @pytest.mark.parametrize("opened", [False, True])
    def test_one_issue_lists_what_was_found(self, opened: bool, scans: Path) -> None:
        self.found(scans, "amd64", self.vulnerability(2))
        self.found(scans, "arm64", self.vulnerability(1), self.vulnerability(2))
        self.opened(scans, opened)
        self.report(scans, "failure")
        called = (scans / "called").read_text()
        assert called.startswith("issue\nedit\n7\n" if opened else "issue\ncreate\n--title\n")
        rows = [
            f"| high | openssl | 3.0 | 3.1 | [CVE-2026-{number}](https://avd.aquasec.com/nvd/"
            f"cve-2026-{number}) | ubuntu 24.04 | {names} |\n"
            for number, names in ((1, "arm64"), (2, "amd64, arm64"))
        ]
        assert "".join(rows) in (scans / "body").read_text()

    def test_it_is_closed_once_all_is_well(self, scans: Path) -> None:
        self.report(scans)
        assert (scans / "called").read_text().startswith("issue\nclose\n7\n")

    def test_a_long_list_is_cut(self, scans: Path) -> None:
        """GitHub refuses more than 65,536 characters, and Linux an argument of 128 KiB."""
        many = [self.vulnerability(number) for number in range(2000)]
        self.found(scans, "amd64", *many, self.vulnerability(9999, "CRITICAL"))
        self.report(scans, "failure")
        body = (scans / "body").read_text()
        assert len(body) < 65_536
        assert "CVE-2026-9999" in body
        assert f"\nand {2001 - report_scans.MOST_ROWS} more\n" in body

    def test_one_scan_is_no_good_news(self, scans: Path) -> None:
        (scans / "scan-arm64/scan.json").unlink()
        with pytest.raises(SystemExit, match=r"^arm64 was not scanned"):
            self.report(scans, "failure")
        assert not (scans / "called").exists()
        self.found(scans, "amd64", self.vulnerability(1))
        with pytest.raises(SystemExit, match=r"^arm64 was not scanned"):
            self.report(scans, "failure")
        assert "\nNot scanned: arm64\n" in (scans / "body").read_text()

    def test_nor_is_a_rebuild_that_was_not_promoted(self, scans: Path) -> None:
        with pytest.raises(SystemExit, match="ended with failure"):
            self.report(scans, "failure")
        assert not (scans / "called").exists()

    def test_the_workflow_wants_all_architectures(self) -> None:
        folder = ROOT / ".github/workflows"
        built = re.findall(
            r"- architecture: (\w+)", (folder / "docker-publish-model.yml").read_text()
        )
        command = f'scripts/report_scans.py scans "$RESULT" {" ".join(built)}\n'
        assert command in (folder / "weekly.yml").read_text()
