"""Interrupt, kill and load promotions on the real server."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from support.releases import SECRET, Standing, golden, pins
from support.servers import eventually

from npair.client import NpairClient
from npair.releasing.release import check_pins, check_server, promote, rollback
from npair.releasing.repository import open_repository


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_interrupted_promotions_go_back(standing: Standing, number: signal.Signals) -> None:
    """Interrupt a slowed-down load, twice. Under nohup, SIGHUP does not interrupt it."""
    models, server, urls = standing
    before = (models / "config.pbtxt").read_bytes()
    code = """
import sys, time
from npair import cli
from npair.releasing.control import Server

load = Server.load
Server.load = lambda self, *config: (time.sleep(3), load(self, *config))
sys.exit(cli.main())
"""
    nohup = ["nohup"] if number == signal.SIGTERM else []
    command = [
        *nohup,
        sys.executable,
        "-c",
        code,
        "promote",
        "2",
        "--repository",
        str(models),
        "--url",
        urls["http"],
    ]
    environment = os.environ | {"NPAIR_CONTROL_SECRET": SECRET}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    eventually(partial(pins, models, 2), 60)
    if nohup:
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert pins(models, 2)
    process.send_signal(number)
    assert process.stderr is not None
    assert "putting version 1 back ..." in process.stderr.readline()
    for again in (number, signal.SIGINT):
        process.send_signal(again)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        "version 2 is not served, and all is as it was, with version 1: KeyboardInterrupt" in said
    )
    assert (models / "config.pbtxt").read_bytes() == before
    assert server.serving() == [1]


@pytest.mark.parametrize("seed", range(2))
def test_killed_promotions_leave_what_serves(standing: Standing, seed: int) -> None:
    """Send SIGKILL at a chosen moment (seed 0) or at random ones.

    benchmarks/promotions.py repeats this many times.
    """
    models, server, urls = standing
    dice, repository = random.Random(seed), open_repository(models)
    for target in (2, 1, 2):
        words = ["promote", str(target), "--repository", str(models), "--url", urls["http"]]
        environment = os.environ | {"NPAIR_CONTROL_SECRET": SECRET}
        process = subprocess.Popen(
            [sys.executable, "-m", "npair", *words], env=environment, stderr=subprocess.DEVNULL
        )
        if seed:
            time.sleep(dice.uniform(0.5, 3))
        else:  # config.pbtxt is written, but the server may not have loaded it
            eventually(partial(pins, models, target), 60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        promote(repository, check_pins(repository)[-1], [server])
        check_server(repository, server)


def test_promotions_under_load(standing: Standing) -> None:
    """No request fails, and each answer comes from a single version.

    benchmarks/promotions.py repeats this many times.
    """
    models, server, urls = standing
    repository, stop, failures = open_repository(models), threading.Event(), list[str]()
    photos, _ = golden(models, 1)
    answered: dict[str, int] = {"1": 0, "2": 0}

    def work(url: str, count: int) -> None:
        with NpairClient(url, retries=0) as client:
            while not stop.is_set():
                try:
                    vectors, version = client.embed(photos[:count])
                    _, expected = golden(models, int(version))
                    assert np.linalg.norm(vectors - expected[:count], axis=1).max() < 0.5
                    answered[version] += 1
                except Exception as error:
                    failures.append(repr(error))

    threads = [
        threading.Thread(target=work, args=(url, count))
        for url in urls.values()
        for count in (1, 4)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            promote(repository, 2, [server])
            rollback(repository, [server])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(answered.values()) > 0
