"""What decides in a cluster: etcd, the API server, the controllers and the scheduler."""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL

from image.commands import background, run, wait_for

SERVICES = "10.97.0.0/16"  # addresses of Services


@dataclass
class Api:
    """The API server, and the token of its only user, who may do everything."""

    address: str
    token: str = field(default_factory=secrets.token_hex)

    def get(self, path: str, timeout: float | None = 10) -> http.client.HTTPResponse:
        """Send a request. Raises: OSError, HTTPException."""
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(
            self.address, 6443, timeout=timeout, context=context
        )
        connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
        return connection.getresponse()

    def healthy(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get("/readyz").status == http.client.OK
        return False

    def write_kubeconfig(self, path: Path) -> Path:
        """Write what kubectl and Kubernetes' own programs need to connect."""
        cluster = {"server": f"https://{self.address}:6443", "insecure-skip-tls-verify": True}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "npair", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "contexts": [{"name": "npair", "context": {"cluster": "npair", "user": "admin"}}],
            "current-context": "npair",
        }
        path.write_text(json.dumps(content))  # JSON is YAML
        return path


@contextlib.contextmanager
def control_plane(folder: Path, address: str) -> Iterator[Api]:
    """Run it, with its state in a folder. address: of this machine, as the nodes reach it."""
    api, key = Api(address), folder / "service-account.key"
    kubeconfig = api.write_kubeconfig(folder / "kubeconfig")
    (folder / "tokens").write_text(f"{api.token},admin,admin,system:masters\n")
    run("openssl", "genrsa", "-out", key, "2048", stderr=DEVNULL)
    commands = {
        "etcd": [f"--data-dir={folder}/etcd", "--unsafe-no-fsync"],
        "kube-apiserver": [
            "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={address}",
            f"--cert-dir={folder}",  # a certificate that it signs itself
            f"--token-auth-file={folder}/tokens",
            "--authorization-mode=RBAC",
            "--service-account-issuer=npair",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            f"--service-cluster-ip-range={SERVICES}",
            "--kubelet-preferred-address-types=InternalIP",
        ],
        "kube-controller-manager": [
            f"--kubeconfig={kubeconfig}",
            f"--service-account-private-key-file={key}",
            f"--cert-dir={folder}",
            "--leader-elect=false",
        ],
        "kube-scheduler": [
            f"--kubeconfig={kubeconfig}",
            f"--cert-dir={folder}",
            "--leader-elect=false",
        ],
    }
    with contextlib.ExitStack() as running:
        for name, options in commands.items():
            running.enter_context(background([name, *options], folder / f"{name}.log"))
            if name == "kube-apiserver":
                wait_for("the API server", api.healthy, 180)
        yield api
