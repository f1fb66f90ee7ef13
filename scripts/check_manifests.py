"""Check the Helm chart and deploy/kserve.yaml offline: check_manifests.py TOOLS.

The chart is rendered with each file in its folder ci/, for a present cluster and for the oldest
that it supports. Kubernetes' own schemas, without unknown fields, check what it renders; promtool
checks the alerts. Fields of KServe's resources are those of its package for Python.

TOOLS: the folder that kubernetes_tools.py fills.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/npair"
RELEASE = "1.37"
CLUSTERS = (RELEASE, "1.20")
OLD = {"policy/v1beta1": "policy/v1", "autoscaling/v2beta2": "autoscaling/v2"}  # of the same fields
PLAIN: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {},
    "ResourceQuantity": {"type": ["string", "number"]},
    "datetime": {"type": "string"},
}


class KServe:
    """JSON schemas of KServe's resources, from its package, which is only read."""

    def __init__(self, wheel: Path) -> None:
        self.fields: dict[str, dict[str, str]] = {}  # types by their names in YAML, by class
        self.schemas: dict[str, dict[str, Any]] = {}
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                if re.fullmatch(r"kserve/models/[a-z].*\.py", name):
                    self._read(ast.parse(files.read(name)))
        folder = f"kubernetes-json-schema/v{RELEASE}.0-local-strict"
        kubernetes = schema_contents(f"{folder}/_definitions.json", RELEASE)
        self.registry: Any = Resource.from_contents(kubernetes) @ Registry()
        self.base = kubernetes["$id"]
        # KServe names a type of Kubernetes by its version and name alone, as V1Container.
        self.kubernetes = {
            re.sub(r".*\.(v[^.]+)\.", lambda match: match[1].capitalize(), name): name
            for name in sorted(kubernetes["$defs"], key=lambda name: ".core." in name)
        }

    def check(self, resource: dict[str, Any]) -> None:
        """Raises: jsonschema.ValidationError."""
        version = resource["apiVersion"].rpartition("/")[2].capitalize()
        schema = self._type(version + resource["kind"]) | {"$defs": self.schemas}
        jsonschema.Draft202012Validator(schema, registry=self.registry).validate(resource)

    def _read(self, module: ast.Module) -> None:
        for model in (node for node in module.body if isinstance(node, ast.ClassDef)):
            tables = {
                node.targets[0].id: ast.literal_eval(node.value)
                for node in model.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            }
            names = tables["attribute_map"]
            self.fields[model.name] = {
                names[key]: kind for key, kind in tables["openapi_types"].items()
            }

    def _type(self, kind: str) -> dict[str, Any]:
        if match := re.fullmatch(r"list\[(.*)\]", kind):
            return {"type": "array", "items": self._type(match[1])}
        if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
            return {"type": "object", "additionalProperties": self._type(match[1])}
        if kind in PLAIN:
            return PLAIN[kind]
        if kind in self.fields:
            if kind not in self.schemas:
                self.schemas[kind] = schema = {"type": "object", "additionalProperties": False}
                fields = self.fields[kind].items()
                schema["properties"] = {key: self._type(of) for key, of in fields}
            return {"$ref": f"#/$defs/{kind}"}
        name = self.kubernetes.get(re.sub("^K8sIoApi(Apps|Core)", "", kind))
        # The package lacks a few of KServe's own, such as V1alpha1WorkerSpec.
        return {"$ref": f"{self.base}#/$defs/{name}"} if name else {}


def main(tools: Path) -> int:
    kserve = KServe(next(tools.glob("kserve-*.whl")))
    problems = []
    checked: set[str] = set()
    for source, resource in resources(tools / "helm"):
        text = json.dumps(resource)
        if text in checked:
            continue
        checked.add(text)
        if reason := problem(resource, kserve):
            name = f"{resource['kind']} {resource['metadata']['name']}"
            problems.append(f"{source}: {name}: {reason}")
    print(*problems, f"{len(checked)} resources, {len(problems)} wrong", sep="\n")
    return 1 if problems else 0


def resources(helm: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield all resources of deploy/, and for each where it comes from."""
    for values in sorted(CHART.glob("ci/*.yaml")):
        run([helm, "lint", "--strict", CHART, "--values", values])
        for cluster in CLUSTERS:
            version = f"--kube-version={cluster}.0"
            rendered = run([helm, "template", "npair", CHART, "--values", values, version])
            for resource in yaml.safe_load_all(rendered):
                yield f"{values.name}, Kubernetes {cluster}", resource
    for resource in yaml.safe_load_all((ROOT / "deploy/kserve.yaml").read_bytes()):
        yield "deploy/kserve.yaml", resource


def problem(resource: dict[str, Any], kserve: KServe) -> str:
    """Return the first thing wrong with a resource, or an empty string."""
    kind, version = resource["kind"], resource["apiVersion"]
    try:
        if version.startswith("serving.kserve.io/"):
            kserve.check(resource)
        elif kind == "PrometheusRule":
            rules = json.dumps(resource["spec"])  # JSON is YAML
            run(["promtool", "check", "rules", "/dev/stdin"], rules)
        elif kind != "ServiceMonitor":  # tests/unit/test_chart.py knows more of it
            present = resource | {"apiVersion": OLD.get(version, version)}
            kubernetes_validate.validate(present, RELEASE, strict=True)
    except jsonschema.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    except subprocess.CalledProcessError as error:
        return str(error.stderr)
    return ""


def run(command: Sequence[str | Path], content: str = "") -> str:
    """Run a command. Returns: its output. Raises: CalledProcessError with its messages."""
    done = subprocess.run(command, input=content, check=True, capture_output=True, text=True)
    return done.stdout


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.stdout}{error.stderr}")
