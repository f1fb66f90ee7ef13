"""Check deploy/ray/bulk.yaml: its pods by Kubernetes' schemas, the rest by KubeRay's fields.

The fields are those of RayJob in KubeRay's API reference, ray.io/v1. Its CRD is not at hand.
"""

from __future__ import annotations

import shlex
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from support.models import ROOT

from npair import cli

FILE = ROOT / "deploy/ray/bulk.yaml"
TEXT, NUMBER, SWITCH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object"}  # Kubernetes' schemas check it


def fields(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": properties,
    }


CLUSTER = fields(
    ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
    rayVersion=TEXT,
    headGroupSpec=fields(
        ("rayStartParams", "template"), rayStartParams=TEXTS, serviceType=TEXT, template=POD
    ),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            ("groupName", "rayStartParams", "template"),
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            rayStartParams=TEXTS,
            template=POD,
        ),
    },
)
SCHEMA = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object"},
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        backoffLimit=NUMBER,
        activeDeadlineSeconds=NUMBER,
        shutdownAfterJobFinishes=SWITCH,
        ttlSecondsAfterFinished=NUMBER,
        runtimeEnvYAML=TEXT,
        suspend=SWITCH,
        rayClusterSpec=CLUSTER,
    ),
)


@pytest.fixture
def job() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


def test_fields(job: dict[str, Any]) -> None:
    jsonschema.validate(job, SCHEMA)
    job["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        jsonschema.validate(job, SCHEMA)


def test_pods(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}}
        kubernetes_validate.validate(pod | group["template"], "1.37", strict=True)


def test_object_stores_fit_into_shared_memory(job: dict[str, Any]) -> None:
    """By default, a store has 30 % of the pod's memory. A larger one lies in a slower folder."""
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (shared,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
        default = 0.3 * gibibytes(pod["containers"][0]["resources"]["limits"]["memory"])
        store = float(group["rayStartParams"].get("object-store-memory", default))
        assert store < gibibytes(shared["sizeLimit"])


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) << 30


def test_entrypoint(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[0] == "npair"
    arguments = cli.parser().parse_args(words[1:])
    assert arguments.address == "auto"


def test_one_release_of_ray(job: dict[str, Any]) -> None:
    release = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"ray[data]=={release}" in (ROOT / "pyproject.toml").read_text()
    assert f"rayproject/ray:{release}-" in (ROOT / "deploy/ray/Dockerfile").read_text()
