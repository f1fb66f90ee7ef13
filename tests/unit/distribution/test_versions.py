"""A release's version, its names, and what is refused. make release-dry-run does the rest."""

from __future__ import annotations

import json
import re
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pytest
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
            f'#!/bin/sh\n[ "$2" = list ] && cat {tmp_path}/open ||'
            f' printf "%s\\n" "$@" > {tmp_path}/called\n'
        )
        (tmp_path / "gh").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        self.found(tmp_path, "amd64", {})
        self.found(tmp_path, "arm64", {})
        (tmp_path / "open").write_text("[]")
        return tmp_path

    @staticmethod
    def found(scans: Path, architecture: str, result: dict[str, Any]) -> None:
        path = scans / f"scan-{architecture}/scan.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"Results": [{"Target": "ubuntu 24.04"} | result]}))

    def test_nothing_found_and_nothing_open(self, scans: Path) -> None:
        report_scans.main(scans)
        assert not (scans / "called").exists()

    @pytest.mark.parametrize("opened", [False, True])
    def test_one_issue_lists_what_was_found(self, opened: bool, scans: Path) -> None:
        vulnerability = {
            "VulnerabilityID": "CVE-2026-1",
            "PkgName": "openssl",
            "InstalledVersion": "3.0",
            "FixedVersion": "3.1",
            "Severity": "HIGH",
            "PrimaryURL": "https://avd.aquasec.com/nvd/cve-2026-1",
        }
        self.found(scans, "arm64", {"Vulnerabilities": [vulnerability]})
        issues = [{"number": 6, "title": "another"}, {"number": 7, "title": report_scans.TITLE}]
        (scans / "open").write_text(json.dumps(issues[: 2 if opened else 1]))
        report_scans.main(scans)
        called = (scans / "called").read_text()
        assert called.startswith("issue\nedit\n7\n" if opened else "issue\ncreate\n--title\n")
        row = (
            "| openssl | 3.0 | 3.1 | [CVE-2026-1](https://avd.aquasec.com/nvd/cve-2026-1) | high |"
        )
        assert f"{row} ubuntu 24.04 | arm64 |" in called

    def test_it_is_closed_once_all_is_well(self, scans: Path) -> None:
        (scans / "open").write_text(json.dumps([{"number": 7, "title": report_scans.TITLE}]))
        report_scans.main(scans)
        assert (scans / "called").read_text().startswith("issue\nclose\n7\n")

    def test_no_scan_is_no_good_news(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match="was not scanned"):
            report_scans.main(tmp_path)
