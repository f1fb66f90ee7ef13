"""Check the pipeline's documentation; scripts/test_image.py runs the pipeline itself."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.request import urlopen

import pytest
from support.models import ROOT
from support.servers import free_ports, lines_until_ready, start

from npair.releasing.config import with_release

PUBLISH = (ROOT / ".github/workflows/docker-publish-model.yml").read_text()
PAGE = (ROOT / "docs/ci-cd.md").read_text()


def test_the_page_quotes_the_workflow() -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        assert block in PUBLISH, f"docs/ci-cd.md quotes, out of date:\n{block}"


@pytest.mark.parametrize(
    "workflow", sorted((ROOT / ".github/workflows").iterdir()), ids=lambda path: path.name
)
def test_workflows_run_scripts_that_exist_and_pin_their_actions(workflow: Path) -> None:
    text = workflow.read_text()
    for script in re.findall(r"scripts/[\w.-]+", text):
        assert os.access(ROOT / script, os.X_OK), script
    for action in re.findall(r"uses: (?!\$/)(\S+)", text):  # but for this repository's own
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action), action


def test_pull_requests_see_no_secret() -> None:
    assert "secrets." not in (ROOT / ".github/workflows/pull-request.yml").read_text()


@pytest.mark.parametrize("digest", ["", "cpu", "sha256:12", "latest@sha256:" + 64 * "0"])
def test_promotion_takes_a_digest_alone(digest: str) -> None:
    command: list[str | Path] = [ROOT / "scripts/promote.sh", "ghcr.io/owner/image", digest, "cpu"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "not a digest" in result.stderr


def test_dashboard_and_alerts_read_metrics_that_the_server_has(
    published: Path, tmp_path: Path
) -> None:
    dashboard = json.loads((ROOT / "monitoring/grafana/dashboards/npair.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    wanted = set(
        re.findall(
            r"(?:nv|npair)_\w+",
            " ".join(expressions) + (ROOT / "monitoring/alerts.yml").read_text(),
        )
    )
    assert len(wanted) > 12
    models = shutil.copytree(published, tmp_path / "models/npair")
    (models / "config.pbtxt").write_text(
        with_release((models / "config.pbtxt").read_text(), [1], {})
    )
    ports = free_ports()
    server = start(**ports, MODEL_REPOSITORY=str(models.parent))
    try:
        lines_until_ready(server)
        metrics = urlopen(f"http://127.0.0.1:{ports['METRICS_PORT']}/metrics").read().decode()
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert {name for name in wanted if f"\n{name}" not in metrics} == set()


def test_the_docs_explain_each_variable_of_compose() -> None:
    variables = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.prod.yml").read_text()))
    assert "ALERT_WEBHOOK_FILE" in variables
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert {name for name in variables if f"`{name}`" not in pages} == set()


def test_the_docs_tell_what_to_do_about_each_alert() -> None:
    page = (ROOT / "docs/monitoring.md").read_text()
    alerts = re.findall(r"alert: (\w+)", (ROOT / "monitoring/alerts.yml").read_text())
    assert re.findall(r"^\| (Npair\w+) \|", page, re.MULTILINE) == alerts
