"""Monitor a real server by this repository's configuration: what people are told and shown.

    make test-faults

Needs: apt-get install --no-install-recommends prometheus prometheus-alertmanager
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest
from support.models import SHIPPED
from support.monitors import MONITORING, RULES, Prometheus, alertmanager, shortened, webhook
from support.servers import eventually
from support.service import Service

from npair.client import NpairClient, NpairError
from npair.releasing.traffic import Measurement, closed

DASHBOARD = json.loads((MONITORING / "grafana/dashboards/npair.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SELECTORS = sorted(set(re.findall(r"\b(?:(?:nv|npair)_\w+|up)(?:\{[^}]*\})?", RULES)) - {"npair_"})


class Monitored(NamedTuple):
    """instances: two names of one server. messages: what the chat got, in order."""

    server: Service
    instances: list[str]
    prometheus: Prometheus
    messages: list[dict[str, Any]]
    load: Measurement

    def shown(self, query: str, instance: str = ".*") -> list[dict[str, Any]]:
        """What a panel shows for the servers whose name matches."""
        for variable, value in {
            "job": "npair",
            "instance": instance,
            "__rate_interval": "5m",
        }.items():
            query = query.replace(f"${variable}", value)
        return self.prometheus.query(shortened(query))


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    """Monitor a server that is away, start it, and load it."""
    folder = tmp_path_factory.mktemp("monitored")
    server = Service(folder)
    instances = [f"{host}:{server.ports['METRICS_PORT']}" for host in ("127.0.0.1", "localhost")]
    with (
        webhook() as (url, messages),
        alertmanager(folder, url) as address,
        Prometheus(folder, instances, address).running() as prometheus,
    ):
        eventually(lambda: messages, 60)
        with server:
            photo = (SHIPPED / "golden/photo.jpg").read_bytes()
            with NpairClient(server.urls["http"]) as client, pytest.raises(NpairError):
                client.embed(b"no photo")
            load = closed(server.urls["http"], [photo], connections=4, seconds=6)
            eventually(lambda: messages[-1]["attachments"][0]["title"].startswith("RESOLVED"), 60)
            yield Monitored(server, instances, prometheus, messages, load)


def test_chat_is_told_once_of_all_servers_that_are_away_and_when_they_are_back(
    monitored: Monitored,
) -> None:
    # A message may fall between the moments at which the two are seen to be back.
    away, *_, back = posted = [message["attachments"][0] for message in monitored.messages]
    assert len(posted) <= 3
    assert away["title"] == "FIRING NpairDown: npair is not served"
    assert back["title"] == "RESOLVED NpairDown: npair is not served"
    for instance in monitored.instances:
        assert f"{instance} serves no version of npair" in away["text"]
        assert f"{instance} is well again" in "".join(each["text"] for each in posted[1:])


def test_alerts_that_another_explains_are_not_sent(monitored: Monitored) -> None:
    """Post alerts of a second server; one of them must be inhibited."""
    with webhook() as (url, messages), alertmanager(monitored.server.folder, url) as address:
        ends = datetime.now(timezone.utc) + timedelta(minutes=5)
        alerts = [
            {
                "labels": {"alertname": name, "severity": severity, "instance": "a:8002"},
                "annotations": {"summary": name, "description": name},
                "endsAt": ends.isoformat(),
            }
            for name, severity in (
                ("NpairQueueFull", "critical"),
                ("NpairQueueGrows", "warning"),
                ("NpairSlow", "warning"),
                ("NpairPhotosRefused", "warning"),
            )
        ]
        posted = Request(f"http://{address}/api/v2/alerts", json.dumps(alerts).encode())
        posted.add_header("Content-Type", "application/json")
        urlopen(posted, timeout=10).close()
        eventually(lambda: len(messages) == 2)
        time.sleep(1)
        titles = [message["attachments"][0]["title"] for message in messages]
        assert sorted(titles) == [
            "FIRING NpairPhotosRefused: NpairPhotosRefused",
            "FIRING NpairQueueFull: NpairQueueFull",
        ]


@pytest.mark.parametrize("query", QUERIES)
def test_panel_shows_the_server(monitored: Monitored, query: str) -> None:
    def numbers() -> bool:
        found = monitored.shown(query)
        return bool(found) and all(sample["value"][1] != "NaN" for sample in found)

    if query.startswith("sum by (alertname"):  # nothing fires
        assert monitored.shown(query) == []
        return
    eventually(numbers)
    assert monitored.shown(query, "another:8002") == []


@pytest.mark.parametrize("selector", SELECTORS)
def test_alerts_read_series_that_exist(monitored: Monitored, selector: str) -> None:
    eventually(lambda: monitored.prometheus.query(selector))


def test_percentiles_are_those_that_clients_measure(monitored: Monitored) -> None:
    """Golden photos, one a second, are among the requests, and the way to the client is not."""
    half, most, nearly_all = (
        float(monitored.shown(query)[0]["value"][1]) / 1e3
        for query in QUERIES
        if "nv_inference_request_summary_us" in query
    )
    assert 0.5 * monitored.load.p50 < half < 1.1 * monitored.load.p50
    assert half <= most <= nearly_all < 1.1 * monitored.load.p99
