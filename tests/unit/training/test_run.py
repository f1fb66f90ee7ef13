"""Check what a run's folder tells, and the commit that it records."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from support.models import SHIPPED

from npair.networks.efficientnet_lite import VARIANTS
from npair.training.run import LITES, TrainConfig, git_commit, read_run


@pytest.mark.parametrize("stages", [None, 5])
def test_runs_from_before_frozen_stages_had_none(stages: int | None, tmp_path: Path) -> None:
    train = asdict(TrainConfig(frozen_stages=stages or 0))
    if stages is None:
        del train["frozen_stages"]
    (tmp_path / "config.json").write_text(json.dumps({"train": train}))
    assert read_run(tmp_path)["train"]["frozen_stages"] == (stages or 0)


def test_a_version_from_before_frozen_stages_had_none(tmp_path: Path) -> None:
    training = json.loads((SHIPPED / "manifest.json").read_text())["training"]
    training["train"].pop("frozen_stages", None)
    (tmp_path / "manifest.json").write_text(json.dumps({"training": training}))
    assert read_run(tmp_path)["train"]["frozen_stages"] == 0


def test_options_of_efficientnet_lite_are_those_of_all_variants() -> None:
    assert tuple(VARIANTS) == LITES


def test_the_commit_is_that_of_a_tracked_file_alone(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=n@example.com")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    module = tmp_path / ".venv/run.py"
    module.parent.mkdir()
    module.touch()
    assert git_commit(module) is None  # outside git
    git("init")
    git("commit", "--allow-empty", "--message", "of the user's own work")
    assert git_commit(module) is None  # installed there, but not tracked
    git("add", "--force", ".venv")
    git("commit", "--message", "the code")
    commit = git_commit(module)
    assert commit
    assert len(commit) == 40
    module.write_text("changed")
    assert git_commit(module) == f"{commit}-dirty"
