"""Find a server, its stubs and their shared memory in /proc and /dev/shm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from supervisor.procfs import arguments, children, remove_remains, server_at, shared_regions
from support.servers import eventually, free_ports, lines_until_ready, running, start
from support.supervised import child_of, health, stopped, stubs_of


def test_a_dead_stub_is_seen_where_serve_py_has_the_flag_for_the_port_too() -> None:
    ports = free_ports()
    number = ports.pop("HTTP_PORT")
    process = start(f"--http-port={number}", **ports)
    try:
        lines_until_ready(process)
        assert server_at(int(number)) == child_of(process)
        os.kill(stubs_of(process)[0], signal.SIGKILL)
        told = health(number)
        assert (told.returncode, told.stderr) == (1, "npair: a Python stub of the model died\n")
    finally:
        stopped(process)


def test_children_are_found_while_threads_end() -> None:
    code = """
import os, threading, time

if not os.fork():
    time.sleep(60)
print(flush=True)
while True:
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert all(len(children(process.pid)) == 1 for _ in range(5000))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="No such"):
        children(process.pid)


def test_killed_parent_leaves_no_server() -> None:
    with running() as (process, urls):
        stubs = stubs_of(process)
        process.kill()
        process.wait()  # so that running() does not report its end
        port = int(urls["http"].rsplit(":", 1)[1])
        deadline = time.monotonic() + 5
        while server_at(port):
            assert time.monotonic() < deadline, "the server outlived serve.py"
            time.sleep(0.1)
        remove_remains(port)  # end stubs waiting for a lock that the dead server held
        eventually(lambda: not any(map(arguments, stubs)))


def test_the_next_removes_what_the_killed_left() -> None:
    """In a pod, /dev/shm outlives its containers."""
    ports = free_ports()

    def regions() -> set[Path]:
        return shared_regions(int(ports["HTTP_PORT"]))

    process = start(**ports)
    lines_until_ready(process)
    stubs = stubs_of(process)
    for stub in stubs:
        os.kill(stub, signal.SIGSTOP)
    process.kill()
    process.communicate()
    left = regions()
    assert len(left) == len(stubs)
    eventually(lambda: not server_at(int(ports["HTTP_PORT"])))
    following = start(**ports)
    lines_until_ready(following)
    assert regions()
    assert not regions() & left
    eventually(lambda: not any(map(arguments, stubs)))
    stopped(following)
    assert not regions()
