"""Check Grafana's dashboard against Grafana's own model; tests/faults asks its queries."""

from __future__ import annotations

import json
import re
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from support.models import ROOT

DATA: dict[str, Any] = json.loads((ROOT / "monitoring/grafana/dashboards/npair.json").read_text())
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    """The places whose content is not among what was kept, which may be more."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [
            place
            for key, value in given.items()
            for place in lost(value, kept.get(key), f"{where}/{key}")
        ]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            place
            for index, pair in enumerate(zip(given, kept, strict=True))
            for place in lost(*pair, f"{where}/{index}")
        ]
    return [] if given == kept else [where]


def test_grafana_knows_all_that_the_dashboard_says() -> None:
    kept = json.loads(json.dumps(Dashboard.from_json(DATA), cls=JSONEncoder))
    assert lost(DATA, kept) == []
    assert lost({"panels": [{"tittle": "npair"}]}, {"panels": [{}]}) == ["/panels/0/tittle"]


def test_any_data_source_and_any_server_can_be_chosen() -> None:
    source, *variables = DATA["templating"]["list"]
    assert (source["name"], source["type"]) == ("datasource", "datasource")
    assert [variable["name"] for variable in variables] == ["job", "instance"]
    assert {json.dumps(each["datasource"]) for each in [*variables, *DATA["panels"]]} == {
        json.dumps(SOURCE)
    }
    for panel in DATA["panels"]:
        for target in panel["targets"]:
            selectors = re.findall(r"(?:nv|npair)_\w+(\{[^}]*\})?", target["expr"])
            assert all('job=~"$job", instance=~"$instance"' in each for each in selectors)


def test_panels_neither_overlap_nor_leave_gaps() -> None:
    places = [panel["gridPos"] for panel in DATA["panels"]]
    assert [(place["x"], place["y"]) for place in places] == [
        (12 * (index % 2), 8 * (index // 2)) for index in range(len(places))
    ]
    assert len({panel["id"] for panel in DATA["panels"]}) == len(places)
