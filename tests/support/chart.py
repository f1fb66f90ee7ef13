"""The chart on a cluster, as helm and kubectl handle it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.containers import call
from support.models import ROOT

CHART = ROOT / "deploy/helm/npair"


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    return call("kubectl", *arguments, stdin=stdin)


def found(*arguments: str) -> dict[str, Any]:
    """Return what kubectl get finds."""
    return dict(json.loads(kubectl("get", *arguments, "--output", "json")))


@dataclass
class Service:
    """The chart, installed as "npair". models: the folder of its model.

    values: a file of its values. urls: its Service's, by protocol.
    """

    models: Path
    values: Path
    urls: dict[str, str]

    def upgrade(self, *options: str) -> None:
        call("helm", "upgrade", "npair", str(CHART), "--values", str(self.values), *options)

    def rolled_out(self) -> None:
        """Wait until all pods are of the newest template and ready, and no other is left."""
        kubectl("rollout", "status", "deployment/npair", "--timeout=5m")
        pods = self.pods()
        gone = [name for name, pod in pods.items() if "deletionTimestamp" in pod["metadata"]]
        if gone:
            kubectl("wait", "--for=delete", "--timeout=2m", *(f"pod/{name}" for name in gone))

    def pods(self) -> dict[str, Any]:
        items = found("pods", "--selector=app.kubernetes.io/component=server")["items"]
        return {pod["metadata"]["name"]: pod for pod in items}

    def release(self, command: str) -> None:
        """Run ``npair promote N`` or ``rollback`` by the chart's Job, on the pods of npair-pods."""
        template = ("helm", "template", "npair", str(CHART), "--values", str(self.values))
        only = ("--show-only", "templates/promotion.yaml", "--set", f"promotion.command={command}")
        job = kubectl("create", "--output=name", "--filename=-", stdin=call(*template, *only))
        name = job.strip()
        try:
            kubectl("wait", "--for=condition=complete", "--timeout=2m", name)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{kubectl('logs', name)}") from error
        kubectl("delete", name)
