"""Names of Services for pods and clients: dnsmasq, with records that follow the API server's.

CoreDNS does this elsewhere, which neither Debian nor PyPI has.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.control_plane import Api
from image.commands import background, run

DOMAIN = "cluster.local"


@contextlib.contextmanager
def names(folder: Path, address: str, api: Api) -> Iterator[None]:
    """Answer for SERVICE and SERVICE.NAMESPACE.svc.DOMAIN at an address, and use it here."""
    hosts, resolver = folder / "hosts", folder / "resolv.conf"
    hosts.touch()
    resolver.write_text(f"nameserver {address}\nsearch default.svc.{DOMAIN}\n")
    run("mount", "--bind", resolver, "/etc/resolv.conf")
    command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--user=root"]
    command += ["--pid-file", "--no-hosts", "--no-resolv", f"--local=/{DOMAIN}/"]
    command += [f"--listen-address={address}", "--bind-interfaces", f"--addn-hosts={hosts}"]
    with background(command, folder / "dnsmasq.log") as dnsmasq:
        threading.Thread(target=follow, args=(api, hosts, dnsmasq), daemon=True).start()
        yield


def follow(api: Api, hosts: Path, dnsmasq: subprocess.Popen[bytes]) -> None:
    """Write the records whenever a Service or its endpoints change."""
    while True:
        with contextlib.suppress(OSError, ValueError):
            services, endpoints = (listed(api, kind) for kind in ("services", "endpoints"))
            hosts.write_text("".join(f"{line}\n" for line in records(services, endpoints)))
            dnsmasq.send_signal(signal.SIGHUP)
            version = endpoints["metadata"]["resourceVersion"]
            watch = f"/api/v1/endpoints?watch=1&timeoutSeconds=60&resourceVersion={version}"
            api.get(watch, timeout=None).readline()
        time.sleep(0.2)


def listed(api: Api, kind: str) -> dict[str, Any]:
    return dict(json.load(api.get(f"/api/v1/{kind}")))


def records(services: Mapping[str, Any], endpoints: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a hosts file: a Service's address, or without one all its pods'."""
    pods = {
        (item["metadata"]["namespace"], item["metadata"]["name"]): [
            address["ip"]
            for subset in item.get("subsets") or ()
            for address in subset.get("addresses") or ()
        ]
        for item in endpoints["items"]
    }
    for item in services["items"]:
        name, namespace = item["metadata"]["name"], item["metadata"]["namespace"]
        address = item["spec"]["clusterIP"]
        for each in pods.get((namespace, name), ()) if address == "None" else [address]:
            yield f"{each} {name}.{namespace}.svc.{DOMAIN}"
