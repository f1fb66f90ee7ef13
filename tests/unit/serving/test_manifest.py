"""Read, check and write manifests without changing their content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.models import SHIPPED

from npair.serving.manifest import NAME, Manifest, VersionError

CONTENT: dict[str, Any] = json.loads((SHIPPED / NAME).read_bytes())


def test_the_shipped_manifest_is_written_as_it_was_read() -> None:
    manifest = Manifest.read(SHIPPED)
    assert manifest.encode() == (SHIPPED / NAME).read_bytes()
    assert (
        manifest.recall_at_1()["fine"] == CONTENT["metrics"]["val"]["fine"]["recall_at_1"]["value"]
    )
    manifest.check(SHIPPED)


def test_optional_fields_may_be_missing_and_unknown_ones_are_ignored() -> None:
    optional = {"metrics", "thresholds", "compared_with", "engines_measured_on", "git_commit"}
    rest = {key: value for key, value in CONTENT.items() if key not in optional}
    manifest = Manifest.parse(json.dumps(rest | {"later": 1}).encode())
    assert json.loads(manifest.encode()) == rest
    assert manifest.recall_at_1() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "11"}, "version has the wrong type, str"),
        ({"files": {"model.py": 1}}, r"files\.model\.py has the wrong type, int"),
        ({"golden": {"photos": [], "embeddings": "a.npy"}}, r"golden\.tolerance is missing"),
        ({"engines": {"torch": {"library": "torch"}}}, r"engines\.torch\.graph is missing"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest.parse(json.dumps(CONTENT | changes).encode())


def test_what_is_no_manifest_is_refused(tmp_path: Any) -> None:
    for content in ("[]", "{}", "2", "{"):
        (tmp_path / NAME).write_text(content)
        with pytest.raises(VersionError, match=r"manifest\.json cannot be read"):
            Manifest.read(tmp_path)
