"""Check versions and pins without a server."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from npair.releasing import ReleaseError
from npair.releasing.release import check_pins
from npair.releasing.repository import open_repository
from npair.releasing.verify import verify
from npair.releasing.versions import versions


class TestVerify:
    def test_what_was_published(self, published: Path, models: Path) -> None:
        assert set(verify(published / "1")) >= {"torch", "openvino-fp32"}
        assert not list(published.rglob("__pycache__"))
        assert check_pins(open_repository(models)) == [1]

    def test_broken(self, broken: Path) -> None:
        with pytest.raises(ReleaseError, match="2"):
            verify(broken / "2")
        (line,) = (line for line in versions(open_repository(broken), []) if line.name == "2")
        golden_set_tells = (
            json.loads((broken / "2/manifest.json").read_text()).get("engines")
            if line.reason is None
            else None
        )
        assert line.status == ("ready" if golden_set_tells else "broken")

    def test_no_engine_that_runs_here(
        self, published: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        with pytest.raises(
            ReleaseError, match=r"none of its engines runs here .*: torch: .*not installed"
        ):
            verify(published / "1", "torch")

    @pytest.mark.parametrize("content", ["[]", "{}", "2"])
    def test_strange_manifests_are_told(self, models: Path, content: str) -> None:
        (models / "1/manifest.json").write_text(content)
        line = versions(open_repository(models), [])[0]
        assert (line.name, line.status) == ("1", "broken")
        with pytest.raises(ReleaseError, match=r"version 1 in .*: manifest\.json cannot be read"):
            check_pins(open_repository(models))

    def test_files_that_were_not_published(self, models: Path) -> None:
        (models / "2/extra.py").write_text("")
        with pytest.raises(ReleaseError, match=r"extra\.py was not published"):
            verify(models / "2")

    def test_pins(self, models: Path) -> None:
        config = models / "config.pbtxt"
        config.write_text(config.read_text().replace("versions: [ 1 ]", "versions: [ 2 ]"))
        with pytest.raises(
            ReleaseError, match="does not tell clients manifest_version, manifest_sha256"
        ):
            check_pins(open_repository(models))
        shutil.rmtree(models / "2")
        with pytest.raises(ReleaseError, match="pins version 2, which is not in"):
            check_pins(open_repository(models))
