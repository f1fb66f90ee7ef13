"""Parse serve.py's options: flags, environment variables and defaults."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields

import pytest
from supervisor.options import Options, parse
from support.models import ROOT
from support.supervised import SERVE


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for each in fields(Options):
        monkeypatch.delenv(each.metadata["variable"] or "_", raising=False)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("LOG_FORMAT", "xml", "must be text or json, got xml"),
        ("HTTP_PORT", "http", "must be a whole number from 1 to 65535, got http"),
        ("GRPC_PORT", "0", "must be a whole number from 1 to 65535, got 0"),
        ("METRICS_PORT", "65536", "must be a whole number from 1 to 65535, got 65536"),
        ("TRACE_RATE", "0", "must be a whole number from 1 to 1000000, got 0"),
        ("TRACE_URL", "host:4318", "must be a collector's address, such as http://host:4318/"),
        ("START_SECONDS", "0", "must be a number from 0.1 to 86400, got 0"),
        ("START_SECONDS", "nan", "must be a number from 0.1 to 86400, got nan"),
        ("DRAIN_SECONDS", "-1", "must be a whole number from 0 to 86400, got -1"),
        ("VERBOSE", "very", "must be 1 or 0, got very"),
    ],
)
def test_senseless_settings(name: str, value: str, reason: str) -> None:
    result = subprocess.run(
        [sys.executable, SERVE, "--check"],
        env={name: value},
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert f"{name} {reason}" in result.stderr


def test_a_flag_overrides_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "9000")
    monkeypatch.setenv("VERBOSE", "1")
    assert parse([]).http_port == 9000
    assert parse(["--http-port", "9001"]).http_port == 9001
    assert parse([]).verbose


@pytest.mark.parametrize(("value", "verbose"), [("1", True), ("True", True), ("0", False)])
def test_a_switch(monkeypatch: pytest.MonkeyPatch, value: str, verbose: bool) -> None:
    monkeypatch.setenv("VERBOSE", value)
    assert parse([]).verbose is verbose


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose sets every variable that it passes on, if only to an empty string."""
    defaults = parse([])
    assert defaults.model_repository in ("/models", str(ROOT / "model_repository"))
    for each in fields(Options):
        if each.metadata["variable"]:
            monkeypatch.setenv(each.metadata["variable"], "")
    assert parse([]) == defaults


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [
        ([], 120),
        (["--model-repository", "s3://models"], 900),
        (["--start-timeout", "2.5", "--model-repository", "s3://models"], 2.5),
    ],
)
def test_seconds_to_start_in(arguments: list[str], seconds: float) -> None:
    assert parse(arguments).start_seconds == seconds


def test_help_names_each_variable() -> None:
    command = [sys.executable, str(SERVE), "--help"]
    result = subprocess.run(
        command, env=os.environ | {"COLUMNS": "1000"}, check=True, capture_output=True, text=True
    )
    assert all(each.metadata["variable"] in result.stdout for each in fields(Options))
