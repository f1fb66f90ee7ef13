"""Check what no schema tells of the Helm chart and deploy/kserve.yaml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from supervisor import options
from supervisor.supervise import EXIT_GRACE
from support.models import ROOT

import npair

CHART = ROOT / "deploy/helm/npair"
IMAGE = "--set=image.repository=ghcr.io/owner/npair_model_api"
VOLUME = ("--set=models.existingClaim=models", "--set=control.existingSecret=control")
PROXY = ("--set=proxy.enabled=true,proxy.tlsSecret=tls", "--set=networkPolicy.enabled=true")
EVERYTHING = (
    *VOLUME,
    *PROXY,
    "--set=proxy.keysSecret=keys,promotion.command=rollback",
    "--set=monitoring.serviceMonitor=true,monitoring.alerts=true,autoscaling.enabled=true",
)

Resource = dict[str, Any]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("helm", path=f"{ROOT}/.venv/kubernetes:{os.environ['PATH']}")
    assert program, "helm is missing: make .venv/kubernetes"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def rendered(*settings: str, release: str = "shop") -> list[Resource]:
    done = helm("template", release, CHART, IMAGE, *settings)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


def refusal(*settings: str, release: str = "shop") -> str:
    done = helm("template", release, CHART, *settings)
    assert done.returncode != 0
    return done.stderr


def only(resources: list[Resource], kind: str, name: str = "") -> Resource:
    (found,) = (
        resource
        for resource in resources
        if resource["kind"] == kind and name in ("", resource["metadata"]["name"])
    )
    return found


def pods(resources: list[Resource]) -> dict[str, Resource]:
    """Return what has containers: labels and spec of pods, by the kind of what makes them."""
    templates = {
        resource["kind"]: resource if resource["kind"] == "Pod" else resource["spec"]["template"]
        for resource in resources
        if resource["kind"] in ("Deployment", "Job", "Pod")
    }
    return {
        kind: {"labels": template["metadata"]["labels"], **template["spec"]}
        for kind, template in templates.items()
    }


def server(*settings: str) -> tuple[Resource, Resource]:
    """Return the server's pod and its container."""
    pod = pods(rendered(*settings))["Deployment"]
    return pod, pod["containers"][0]


def selects(selector: Resource, labels: Resource) -> bool:
    return selector.items() <= labels.items()


@pytest.mark.parametrize(
    ("settings", "patience"),
    [
        ("", f"{options.START_TIMEOUT + 60:.0f}s"),
        (",models.store=s3://bucket/models", f"{options.DOWNLOAD_TIMEOUT + 60:.0f}s"),
        (",server.startSeconds=31", "91s"),
    ],
)
def test_alerts_are_those_of_monitoring_and_let_pods_start(settings: str, patience: str) -> None:
    rule = only(rendered(f"--set=monitoring.alerts=true{settings}"), "PrometheusRule")
    spec = yaml.safe_load((ROOT / "monitoring/alerts.yml").read_text())
    down = spec["groups"][0]["rules"][0]
    assert down["alert"] == "NpairDown"
    assert rule["spec"] != spec
    down["for"] = patience
    assert rule["spec"] == spec


def test_proxy_is_that_of_the_docs() -> None:
    text = only(rendered(*PROXY, "--set=proxy.keysSecret=k"), "ConfigMap")["data"]["npair.conf"]
    shown = (ROOT / "docs/proxy/npair.conf").read_text().splitlines()
    changed = [(was, now) for was, now in zip(shown, text.splitlines(), strict=True) if was != now]
    assert changed == [
        ("    listen 443 ssl http2;", "    listen 8443 ssl http2;"),
        (
            "    access_log /var/log/nginx/npair.log npair;",
            "    access_log /dev/stdout npair;",
        ),
    ]
    (proxy,) = (c for c in server(*PROXY, "--set=proxy.keysSecret=k")[0]["containers"][1:])
    mounted = {mount["mountPath"] for mount in proxy["volumeMounts"]}
    needed = set(re.findall(r"/etc/nginx/[\w.-]+(?=;)", text))
    assert needed == mounted - {"/tmp", "/etc/nginx/conf.d"}


def test_a_package_holds_files_in_place_of_links(tmp_path: Path) -> None:
    assert helm("package", CHART, "--destination", tmp_path).returncode == 0
    with tarfile.open(next(tmp_path.iterdir())) as package:
        for name, source in {
            "npair/alerts.yml": "monitoring/alerts.yml",
            "npair/npair.conf": "docs/proxy/npair.conf",
        }.items():
            file = package.extractfile(name)
            assert file is not None
            assert file.read() == (ROOT / source).read_bytes()
        assert not any(name.startswith("npair/ci/") for name in package.getnames())


def test_secrets_are_in_secrets_alone() -> None:
    key = "0123456789abcdef" * 2
    everything = rendered(
        *PROXY,
        "--set=models.existingClaim=m,promotion.command=rollback,control.secret=only-for-trials",
        f'--set=proxy.keys="Bearer {key}" shop;',
    )
    for secret, name in (("only-for-trials", "shop-control"), (key, "shop-keys")):
        holders = [resource for resource in everything if secret in str(resource)]
        assert [(r["kind"], r["metadata"]["name"]) for r in holders] == [("Secret", name)]
    assert not any(r["kind"] == "Secret" for r in rendered(*EVERYTHING))


def test_pods_have_the_rights_and_limits_of_compose() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.prod.yml").read_text())["services"][
        "model_api"
    ]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    made = pods(rendered(*EVERYTHING))
    assert made.keys() == {"Deployment", "Job", "Pod"}
    for pod in made.values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    pod, container = server()
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert service["tmpfs"] == ["/tmp:size=64m,mode=1777"]
    assert volumes["tmp"] == {"medium": "Memory", "sizeLimit": "64Mi"}
    check, probe = service["healthcheck"], container["readinessProbe"]
    assert (check["interval"], check["timeout"]) == ("5s", "8s")
    assert (probe["periodSeconds"], probe["timeoutSeconds"]) == (5, 8)
    assert check["retries"] == probe["failureThreshold"]
    assert service["shm_size"] == "256m"
    assert volumes["shm"] == {"medium": "Memory", "sizeLimit": "256Mi"}
    assert service["mem_limit"] == "${MEMORY:-3g}"
    assert service["cpus"] == "${CPUS:-2.0}"
    assert container["resources"]["limits"] == {"cpu": "2", "memory": "3Gi"}


@pytest.mark.parametrize("drain", [7, 600])
def test_pods_get_the_time_that_serve_py_takes(drain: int) -> None:
    assert options.Options().drain == 7
    seconds = f"--set=server.drainSeconds={drain},preStopSeconds=4"
    for settings, start in (
        ((), options.START_TIMEOUT),
        (("--set=models.store=s3://bucket/models",), options.DOWNLOAD_TIMEOUT),
        (("--set=server.startSeconds=31",), 31),
    ):
        pod, container = server(*settings, *([seconds] if drain != 7 else []))
        variables = {each["name"]: each["value"] for each in container["env"]}
        assert variables["DRAIN_SECONDS"] == str(drain)
        assert float(variables["START_SECONDS"]) == start
        probe = container["startupProbe"]
        assert probe["failureThreshold"] * probe["periodSeconds"] > start
        (command, pause) = container["lifecycle"]["preStop"]["exec"]["command"]
        assert (command, pause) == ("sleep", "5" if drain == 7 else "4")
        grace = pod["terminationGracePeriodSeconds"]
        assert grace > int(pause) + drain + EXIT_GRACE
        assert "livenessProbe" not in container


def test_variables_are_options_of_serve_py() -> None:
    known = {field.metadata["variable"] for field in fields(options.Options)}
    for settings in (EVERYTHING, ("--set=models.store=gs://b,server.traceUrl=http://c",)):
        given = {each["name"] for each in server(*settings)[1]["env"]}
        assert given <= known | {"NPAIR_CONTROL_SECRET_FILE"}


def test_services_reach_the_servers_alone() -> None:
    resources = rendered(*EVERYTHING)
    labels = {kind: pod["labels"] for kind, pod in pods(resources).items()}
    for name in ("shop", "shop-pods"):
        selector = only(resources, "Service", name)["spec"]["selector"]
        assert [kind for kind in labels if selects(selector, labels[kind])] == ["Deployment"]
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = only(resources, kind)["spec"]
        selector = spec.get("selector", spec.get("podSelector"))["matchLabels"]
        assert [kind for kind in labels if selects(selector, labels[kind])] == ["Deployment"]
    _, own, _ = only(resources, "NetworkPolicy")["spec"]["ingress"]
    selector = own["from"][0]["podSelector"]["matchLabels"]
    assert all(selects(selector, each) for each in labels.values()), "promotions and tests"


@pytest.mark.parametrize(
    ("nobody", "ports"),
    [
        ("callers", [["http", "grpc"], ["metrics"]]),
        ("monitors", [["http", "grpc"], ["http", "grpc"]]),
    ],
)
def test_a_network_policy_can_let_nobody_in(nobody: str, ports: list[list[str]]) -> None:
    """A rule whose "from" is empty is for everyone."""
    resources = rendered(
        "--set=networkPolicy.enabled=true", f"--set-json=networkPolicy.{nobody}=[]"
    )
    rules = only(resources, "NetworkPolicy")["spec"]["ingress"]
    assert all(rule["from"] for rule in rules)
    assert [[port["port"] for port in rule["ports"]] for rule in rules] == ports


def test_ports_name_their_protocol() -> None:
    """Without it, Kubernetes 1.20 refuses what Helm 4 applies on the server."""
    resources = rendered(*EVERYTHING)
    ports = [port for r in resources if r["kind"] == "Service" for port in r["spec"]["ports"]]
    for container in pods(resources)["Deployment"]["containers"]:
        ports += container["ports"]
    assert {port["protocol"] for port in ports} == {"TCP"}


def test_prometheus_reads_each_pod_once_as_the_job_of_the_alerts() -> None:
    resources = rendered("--set=monitoring.serviceMonitor=true,fullnameOverride=other")
    monitor = only(resources, "ServiceMonitor")["spec"]
    services = [r for r in resources if r["kind"] == "Service"]
    read = [
        service
        for service in services
        if selects(monitor["selector"]["matchLabels"], service["metadata"]["labels"])
    ]
    assert [service["metadata"]["name"] for service in read] == ["other-pods"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in read[0]["spec"]["ports"]}
    assert read[0]["metadata"]["labels"][monitor["jobLabel"]] == "npair"
    assert 'up{job="npair"}' in (ROOT / "monitoring/alerts.yml").read_text()


def test_kserve_runs_the_same_container() -> None:
    runtime, service = yaml.safe_load_all((ROOT / "deploy/kserve.yaml").read_text())
    (container,), (pod, own) = runtime["spec"]["containers"], server()
    same = ("startupProbe", "readinessProbe", "lifecycle", "resources", "volumeMounts")
    assert {key: container[key] for key in same} == {key: own[key] for key in same}
    assert runtime["spec"]["volumes"] == pod["volumes"]
    assert own["securityContext"].items() <= container["securityContext"].items()
    predictor = service["spec"]["predictor"]
    seconds = "terminationGracePeriodSeconds"
    assert predictor[seconds] == pod[seconds]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    formats = [each["name"] for each in runtime["spec"]["supportedModelFormats"]]
    assert predictor["model"]["modelFormat"]["name"] in formats


def test_versions_come_from_the_image_a_volume_or_a_store() -> None:
    _, container = server()
    assert "/models" not in {mount["mountPath"] for mount in container["volumeMounts"]}
    _, container = server(*VOLUME, "--set=models.subPath=npair")
    (mount,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/models")
    assert (mount["readOnly"], mount["subPath"]) == (True, "npair")
    store = "--set=models.store=s3://bucket/models,models.storeSecret=keys"
    pod, container = server(store)
    assert {"name": "MODEL_REPOSITORY", "value": "s3://bucket/models"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
    (scratch,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "tmp")
    assert "medium" not in scratch, "copies of all versions do not belong in memory"
    assert "not both" in refusal(IMAGE, store, *VOLUME)


def test_a_job_changes_all_pods() -> None:
    resources = rendered(*VOLUME, "--set=promotion.command=promote 16 --keep 15")
    job = only(resources, "Job")
    assert job["metadata"]["name"] == "shop-promote-16-keep-15"
    (container,) = pods(resources)["Job"]["containers"]
    assert "exec python -m npair promote 16 --keep 15 " in container["args"][0]
    keeping = "promotion.command=promote 16 --keep 15"
    long = rendered(*VOLUME, f"--set=fullnameOverride={'x' * 50},{keeping}")
    assert only(long, "Job")["metadata"]["name"] == "x" * 44 + "-promote-16-keep-15"
    (url,) = re.findall(r"--url http://(\S+):8000", container["args"][0])
    assert only(resources, "Service", url)["spec"]["clusterIP"] == "None"
    (models,) = (m for m in container["volumeMounts"] if m["mountPath"] == "/models")
    assert "readOnly" not in models
    pip = f"'npair[release,s3,gs]=={npair.__version__}'"
    assert pip in container["args"][0], "appVersion in Chart.yaml is the version of npair"
    own = rendered(*VOLUME, "--set=promotion.command=rollback,promotion.package=")
    (container,) = pods(own)["Job"]["containers"]
    assert container["args"][0].startswith("exec python -m npair rollback ")
    assert "PYTHONPATH" not in {each["name"] for each in container["env"]}, "the image has its own"
    assert "need models.existingClaim or models.store" in refusal(
        IMAGE, "--set=control.secret=s,promotion.command=rollback"
    )
    assert "promotions need control.existingSecret" in refusal(
        IMAGE, "--set=models.existingClaim=m,promotion.command=rollback"
    )
    assert "/promotion/command" in refusal(IMAGE, *VOLUME, "--set=promotion.command=rm -rf /")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("replica=3", "additional properties 'replica' not allowed"),
        ("image.tags=cpu", "additional properties 'tags' not allowed"),
        ("image.digest=sha256:1", "/image/digest"),
        ("server.drainSeconds=soon", "/server/drainSeconds"),
        ("autoscaling.enabled=true,autoscaling.cpuPercent=0", "cpuPercent or queueLength"),
        ("autoscaling.enabled=true,autoscaling.maxReplicas=1", "maxReplicas is below"),
        ("proxy.enabled=true", "the proxy needs proxy.tlsSecret"),
        ("image.repository=", "set image.repository, for example"),
    ],
)
def test_wrong_values_are_refused(setting: str, reason: str) -> None:
    assert reason in refusal(IMAGE, f"--set={setting}")


@pytest.mark.parametrize("release", ["1shop", "shop.a", "7"])
def test_a_release_may_be_called_what_a_service_may_not(release: str) -> None:
    assert f"{release} cannot name a Service: set fullnameOverride" in refusal(
        IMAGE, release=release
    )
    service = only(rendered("--set=fullnameOverride=shop", release=release), "Service", "shop")
    assert service["spec"]["selector"]["app.kubernetes.io/instance"] == release


def test_the_schema_knows_each_value_and_no_other() -> None:
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())["properties"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema.keys() == values.keys() | {"global"}
    for key, value in values.items():
        if "properties" in schema[key]:
            assert schema[key]["additionalProperties"] is False, key
            optional = {"claims"} if key == "resources" else set()
            assert schema[key]["properties"].keys() == value.keys() | optional, key


@pytest.mark.parametrize(
    ("release", "versions"),
    [
        ("1.20.2", {"policy/v1beta1", "autoscaling/v2beta2"}),
        ("v1.37.1-gke.5", {"policy/v1", "autoscaling/v2"}),
    ],
)
def test_old_clusters_get_the_versions_that_they_know(release: str, versions: set[str]) -> None:
    resources = rendered("--set=autoscaling.enabled=true", f"--kube-version={release}")
    kinds = ("PodDisruptionBudget", "HorizontalPodAutoscaler")
    assert {only(resources, kind)["apiVersion"] for kind in kinds} == versions
    assert "replicas" not in only(resources, "Deployment")["spec"]


def test_an_image_by_digest_is_not_pulled_again() -> None:
    digest = "sha256:" + "0" * 64
    _, container = server(f"--set=image.digest={digest}")
    assert container["image"] == f"ghcr.io/owner/npair_model_api:cpu@{digest}"
    assert container["imagePullPolicy"] == "IfNotPresent"
    assert server()[1]["imagePullPolicy"] == "Always"
