"""Change settings of config.pbtxt without touching anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.models import ROOT
from support.releases import digest

from npair.releasing.config import ConfigError, parameters, pinned, with_release
from npair.releasing.release import client_parameters

CONFIG = (ROOT / "model_repository/npair/config.pbtxt").read_text()


class TestConfig:
    def test_changes_nothing_else(self) -> None:
        changed = with_release(
            CONFIG,
            [7, 6],
            {"manifest_sha256": "abc", "threshold_far_1_percent": None, "new": 'a "b"'},
        )
        assert pinned(changed) == [6, 7]
        assert "threshold_far_1_percent" not in parameters(changed)
        assert parameters(changed)["new"] == 'a "b"'
        before, after = CONFIG.splitlines(), changed.splitlines()
        assert len([line for line in before if line not in after]) == 3
        back = {
            key: parameters(CONFIG).get(key)
            for key in ("manifest_sha256", "threshold_far_1_percent", "new")
        }
        assert parameters(with_release(changed, pinned(CONFIG), back)) == parameters(CONFIG)

    def test_the_last_line_needs_no_end(self) -> None:
        config = with_release(CONFIG, [7], {"served_before": "6"})
        last = 'parameters { key: "served_before" value: { string_value: "6" } }'
        cut = config.replace(f"{last}\n", "") + last
        assert parameters(with_release(cut, [7], {"served_before": "5"}))["served_before"] == "5"
        assert "served_before" not in parameters(with_release(cut, [7], {"served_before": None}))

    @pytest.mark.parametrize(
        ("before", "after", "reason"),
        [
            ("version_policy: {", "version_policy: {\n", "one line of its own"),
            (
                'parameters { key: "manifest_sha256"',
                'parameters { # its hash\nkey: "manifest_sha256"',
                "one line of its own",
            ),
            ("max_batch_size: 64", "max_batch_size: many", "cannot be read"),
        ],
    )
    def test_what_it_cannot_change_is_refused(self, before: str, after: str, reason: str) -> None:
        with pytest.raises(ConfigError, match=reason):
            with_release(CONFIG.replace(before, after), [7], {"manifest_sha256": None})

    def test_client_parameters_are_the_manifest_s(self, version: Path) -> None:
        manifest = json.loads((version / "manifest.json").read_text())
        manifest["thresholds"] = {"far_1_percent": 0.66284, "far_01_percent": None}
        (version / "manifest.json").write_text(json.dumps(manifest))
        parameters = client_parameters((version / "manifest.json").read_bytes())
        assert parameters.pop("manifest_sha256") == digest(version)
        thresholds = {"threshold_far_1_percent": "0.6628", "threshold_far_01_percent": None}
        assert parameters == {"manifest_version": "1", "thresholds_version": "1", **thresholds}
