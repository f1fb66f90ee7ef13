"""serve.py on the real server: what stops it from starting, how it stops, and what it does when the model dies."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import serve
import tritonclient.grpc
from conftest import PORTS, ROOT, SHIPPED, eventually, free_ports, lines_until_ready, rewrite_manifest, running, start
from PIL import Image
from tritonclient.utils import InferenceServerException

from npair.client import InvalidPhotoError, NpairClient, UnavailableError
from npair.publishing.drawings import draw, encode


def ended(**environment: str) -> tuple[int, str]:
    """Exit code and stderr of a server that is expected to end by itself."""
    process = start(**environment)
    _, output = process.communicate(timeout=120)
    return process.returncode, output


def changed(code: str) -> tuple[int, str]:
    """Exit code and last words of a serve.py that this code changes and runs, which is stopped once it is ready."""
    environment = os.environ | free_ports() | {"PYTHONPATH": str(ROOT / "model/api")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        lines_until_ready(process)
    finally:
        process.terminate()
        _, output = process.communicate(timeout=30)
    return process.returncode, output


def child_of(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def stubs_of(process: subprocess.Popen[str]) -> list[int]:
    return serve.children(child_of(process))


def control(url: str, action: str) -> int:
    """Have the model loaded or unloaded; returns the status."""
    request = urllib.request.Request(f"{url}/v2/repository/models/npair/{action}", b"{}", {serve.CONTROL_HEADER: "s"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.status)


def listening(pid: int, ports: dict[str, str]) -> set[str]:
    """The addresses on which this network namespace listens at these ports, as URLs have them."""
    found = set()
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{file}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, port = local.split(":")
            if state == "0A" and str(int(port, 16)) in ports.values():
                words = bytes.fromhex(address)
                packed = b"".join(words[start : start + 4][::-1] for start in range(0, len(words), 4))
                found.add(serve.in_url(socket.inet_ntop(family, packed).removeprefix("::ffff:")))
    return found


def computed(process: subprocess.Popen[str]) -> float:
    """Seconds of CPU that the stubs have used so far."""
    return sum(map(serve.cpu_seconds, stubs_of(process)))


def form_status(url: str, size: int) -> int:
    """The HTTP status of a golden photo that is sent as curl sends it by default, with bytes behind its end up to this size."""
    photo = (SHIPPED / "golden/photo.jpg").read_bytes()
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Inference-Header-Content-Length": "0"}
    request = urllib.request.Request(url, photo.ljust(size, b"x"), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


class TestStack:
    """Triton's HTTP library copies a form-encoded body to a thread's stack, whatever the path."""

    def test_the_largest_form_encoded_bodies_do_not_end_the_server(self) -> None:
        ports = free_ports()
        process = start(**ports)
        urls = [
            f"http://127.0.0.1:{ports['HTTP_PORT']}{path}" for path in ("/v2/models/npair/infer", "/nope", "/v2/repository/index")
        ]
        urls += [f"http://127.0.0.1:{ports['METRICS_PORT']}{path}" for path in ("/metrics", "/nope")]
        try:
            lines_until_ready(process)
            server = child_of(process)
            statuses = {size: [form_status(url, size) for url in urls] for size in (1_000, 5_000_000, 20_000_000, 64 << 20)}
            assert statuses[5_000_000] == [200, 404, 403, 405, 405], "the photo is embedded"
            assert statuses[20_000_000] == statuses[1_000] == statuses[5_000_000]
            assert statuses[64 << 20] == [400, 404, 403, 405, 405], "more bytes than a photo may have"
            assert form_status(urls[0], 0) == 200
            assert child_of(process) == server
        finally:
            process.terminate()
            process.communicate(timeout=30)

    @pytest.mark.parametrize(
        ("before", "given"),
        [
            ((8 << 20, resource.RLIM_INFINITY), 256 << 20),
            ((8 << 20, 256 << 20), 256 << 20),
            ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 256 << 20),
            ((512 << 20, resource.RLIM_INFINITY), 512 << 20),
        ],
    )
    def test_of_each_limit(self, before: tuple[int, int], given: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: before)
        assert serve.stack_bytes() == given

    def test_too_small_a_hard_limit_is_said(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (8 << 20, 64 << 20))
        assert serve.stack_bytes() == 64 << 20
        said = capsys.readouterr().err
        assert "WARNING: the stack's hard limit is 64 MiB: form-encoded requests of more than about 32 MiB" in said
        assert "docker run --ulimit stack=268435456" in said


class TestRefusals:
    @pytest.mark.parametrize("name", PORTS)
    def test_taken_port(self, name: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            code, output = ended(**free_ports() | {name: str(listener.getsockname()[1])})
        assert code == 1
        assert re.fullmatch(rf"npair: cannot listen on 127\.0\.0\.1:\d+: .*in use; set {name} to a free port\n", output)

    def test_one_port_for_two(self) -> None:
        ports = free_ports()
        code, output = ended(**ports | {"GRPC_PORT": ports["HTTP_PORT"]})
        assert code == 1
        assert "GRPC_PORT" in output

    @pytest.mark.parametrize("address", ["203.0.113.1", "nowhere.invalid"])
    def test_address_of_another_machine(self, address: str) -> None:
        code, output = ended(**free_ports(), BIND_ADDRESS=address)
        assert code == 1
        assert output.endswith("; set BIND_ADDRESS to an address of this machine\n")

    def test_missing_repository(self, tmp_path: Path) -> None:
        code, output = ended(MODEL_REPOSITORY=str(tmp_path / "nowhere"))
        assert code == 1
        assert output == f"npair: no model repository at {tmp_path}/nowhere: it has no npair/config.pbtxt\n"

    def test_unreadable_secret(self, tmp_path: Path) -> None:
        code, output = ended(**free_ports(), NPAIR_CONTROL_SECRET_FILE=str(tmp_path / "nowhere"))
        assert code == 1
        assert "NPAIR_CONTROL_SECRET_FILE cannot be read" in output

    def test_changed_version(self, tmp_path: Path) -> None:
        shutil.copytree(ROOT / "model_repository", tmp_path / "models")
        with (tmp_path / "models/npair" / SHIPPED.name / "network.pt2").open("r+b") as file:
            file.truncate(100_000)
        code, output = ended(**free_ports(), MODEL_REPOSITORY=str(tmp_path / "models"))
        assert code == 1
        assert "network.pt2 has changed since it was published" in output
        assert output.splitlines()[-1].endswith("was refused, for the reasons above, and no other was served before")

    @pytest.mark.parametrize(("parameter", "value"), [("max_bytes", "lots"), ("max_pixels", "0")])
    def test_senseless_limits(self, tmp_path: Path, parameter: str, value: str) -> None:
        shutil.copytree(ROOT / "model_repository", tmp_path / "models")
        config = tmp_path / "models/npair/config.pbtxt"
        config.write_text(re.sub(rf'("{parameter}" value: {{ string_value: )"\d+"', rf'\1"{value}"', config.read_text()))
        code, output = ended(**free_ports(), MODEL_REPOSITORY=str(tmp_path / "models"))
        assert code == 1
        assert f'parameter "{parameter}" must be a positive whole number, found "{value}"' in output.replace('\\"', '"')

    @pytest.mark.parametrize(
        ("name", "value", "reason"),
        [
            ("machine", "aarch64", "needs Linux on x86-64, and this is Linux on aarch64"),
            ("libc_ver", ("glibc", "2.31"), "needs glibc 2.35 or newer, and this is glibc 2.31"),
            ("libc_ver", ("", ""), "this is another libc"),
        ],
    )
    def test_platform(self, monkeypatch: pytest.MonkeyPatch, name: str, value: object, reason: str) -> None:
        """This machine is a supported one, so another is pretended."""
        monkeypatch.setattr(platform, name, lambda: value)
        with pytest.raises(serve.ServeError, match=reason):
            serve.check_platform()

    @pytest.mark.parametrize("version", [(3, 9, 0), (3, 13, 0)])
    def test_python(self, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]) -> None:
        monkeypatch.setattr(sys, "version_info", version)
        with pytest.raises(serve.ServeError, match=r"needs Python 3.10 to 3.12"):
            serve.check_platform()


class TestPaths:
    """Triton starts its stubs by a bash command line, without quotes."""

    @pytest.mark.parametrize("name", ["my clone", "O'Brien", "npair (1)", "a&b;c", "a$b:c", "Téléchargements"])
    def test_no_character_of_a_path_matters(self, tmp_path: Path, name: str) -> None:
        repository = shutil.copytree(ROOT / "model_repository", tmp_path / name / "models")
        with running(MODEL_REPOSITORY=str(repository), TMPDIR=str(tmp_path / name), NPAIR_CONTROL_SECRET="s") as (_, urls):
            config = repository / "npair/config.pbtxt"
            config.write_text(config.read_text().replace('"20000000"', '"10"'))
            assert control(urls["http"], "load") == 200
            with NpairClient(urls["http"]) as client, pytest.raises(InvalidPhotoError, match="the limit of 10;"):
                client.embed(SHIPPED / "golden/photo.jpg")

    def test_python_in_such_a_folder(self, tmp_path: Path) -> None:
        """As where the clone has its .venv in it; with a link in place of one."""
        venv = tmp_path / "my clone" / "l'été:1"
        venv.parent.mkdir()
        venv.symlink_to(sys.prefix)
        ports = free_ports()
        process = subprocess.Popen(
            [venv / "bin/python", ROOT / "model/api/serve.py"], env=os.environ | ports, stderr=subprocess.PIPE, text=True
        )
        try:
            lines_until_ready(process)
        finally:
            process.terminate()
            process.communicate(timeout=30)

    def test_no_folder_for_links(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
        monkeypatch.setattr(serve, "SCRATCH_PARENTS", ("/proc",))
        with pytest.raises(serve.ServeError, match="/proc cannot be written; set TMPDIR to a folder"):
            serve.scratch_folder()
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        with serve.scratch_folder() as scratch:
            assert Path(scratch).parent == tmp_path


class TestAddresses:
    @pytest.mark.parametrize(
        ("host", "called", "listens"),
        [
            ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
            ("0.0.0.0", "127.0.0.1", "0.0.0.0"),
            ("localhost", "127.0.0.1", "127.0.0.1"),
            ("::1", "[::1]", "[::1]"),
            ("[::1]", "[::1]", "[::1]"),
            ("::", "[::1]", "[::]"),
        ],
    )
    def test_on_all_ports(self, host: str, called: str, listens: str) -> None:
        if ":" in host:
            try:
                socket.create_server(("::1", 0), family=socket.AF_INET6).close()
            except OSError as error:
                pytest.skip(f"this machine has no ::1: {error}")
        ports = free_ports()
        http_port, grpc_port, metrics_port = (ports[name] for name in PORTS)
        process = start(**ports, BIND_ADDRESS=host)
        try:
            line = lines_until_ready(process)[-1]
            assert (
                f"at http://{listens}:{http_port} and grpc://{listens}:{grpc_port}, metrics at http://{listens}:{metrics_port}/"
                in line
            )
            everywhere = {"0.0.0.0", "[::]"}  # as gRPC's server takes either
            assert listening(child_of(process), ports) <= (everywhere if listens in everywhere else {listens})
            for url in (f"http://{called}:{http_port}", f"grpc://{called}:{grpc_port}"):
                with NpairClient(url) as client:
                    assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
            with urllib.request.urlopen(f"http://{called}:{metrics_port}/metrics", timeout=10) as answer:
                assert answer.status == 200
            health = [sys.executable, str(ROOT / "model/api/serve.py"), "--health"]
            assert subprocess.run(health, env=os.environ | ports | {"BIND_ADDRESS": host}, check=False).returncode == 0
        finally:
            process.terminate()
            process.communicate(timeout=30)

    def test_a_name_with_both_kinds_stands_for_ipv4(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine's own names may have none, so one is made up."""
        found = [(socket.AF_INET6, 1, 6, "", ("fd00::7", 0, 0, 0)), (socket.AF_INET, 1, 6, "", ("10.0.0.7", 0))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert serve.address_of("host") == "10.0.0.7"
        found.pop()
        assert serve.address_of("host") == "fd00::7"


class TestControl:
    """What the control API is told to do is no fault, and a dead model is still one."""

    def test_unloaded_and_never_loaded(self) -> None:
        with running(NPAIR_CONTROL_SECRET="s") as (process, urls):
            assert control(urls["http"], "unload") == 200
            time.sleep(serve.UNHEALTHY_AFTER + 3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            _, output = process.communicate(timeout=30)
            unloaded = "npair: WARNING: the model was unloaded through the control API; waiting for it to be loaded\n"
            assert (process.returncode, output) == (0, f"{unloaded}npair: stopped\n")

    def test_unloaded_loaded_wrong_and_loaded_right(self) -> None:
        with running(NPAIR_CONTROL_SECRET="s") as (process, urls), NpairClient(urls["http"]) as client:
            health = [sys.executable, str(ROOT / "model/api/serve.py"), "--health", f"--http-port={urls['http'].rsplit(':', 1)[1]}"]
            server = child_of(process)
            grpc = tritonclient.grpc.InferenceServerClient(urls["grpc"].removeprefix("grpc://"))
            secret = {f"triton-grpc-protocol-{serve.CONTROL_HEADER}": "s"}
            grpc.unload_model("npair", headers=secret)
            time.sleep(5)
            assert subprocess.run(health, check=False, stderr=subprocess.DEVNULL).returncode == 1, "it serves nobody"
            wrong = {"backend": "python", "max_batch_size": 64, "version_policy": {"specific": {"versions": [int(SHIPPED.name)]}}}
            with pytest.raises(InferenceServerException, match="load failed"):
                grpc.load_model("npair", headers=secret, config=json.dumps(wrong))
            time.sleep(serve.UNHEALTHY_AFTER + 3)
            grpc.load_model("npair", headers=secret)
            grpc.close()
            assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
            eventually(lambda: subprocess.run(health, check=False, stderr=subprocess.DEVNULL).returncode == 0)
            time.sleep(2 * serve.WATCH_INTERVAL)
            assert child_of(process) == server
            process.send_signal(signal.SIGTERM)
            _, output = process.communicate(timeout=30)
            assert [line for line in output.splitlines() if line.startswith("npair: ")] == [
                "npair: WARNING: the model was unloaded through the control API; waiting for it to be loaded",
                "npair: WARNING: the model could not be loaded, for the reasons above; waiting for it to be loaded",
                f"npair: the model is loaded again, version {SHIPPED.name}",
                "npair: stopped",
            ]

    def test_loaded_again_while_photos_come(self) -> None:
        with running(NPAIR_CONTROL_SECRET="s") as (process, urls), NpairClient(urls["http"]) as client:
            with ThreadPoolExecutor(1) as threads:
                loading = threads.submit(lambda: [control(urls["http"], "load") for _ in range(3)])
                while not loading.done():
                    assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
            assert loading.result() == [200] * 3
            process.send_signal(signal.SIGTERM)
            _, output = process.communicate(timeout=30)
            assert (process.returncode, output) == (0, "npair: stopped\n")

    def test_unloaded_beside_a_dead_stub(self) -> None:
        """Where the unload ends before the dead stub is seen, all stubs are gone, and a load begins new ones."""
        with running(NPAIR_CONTROL_SECRET="s") as (process, urls), NpairClient(urls["http"]) as client:
            os.kill(stubs_of(process)[0], signal.SIGKILL)
            control(urls["http"], "unload")
            time.sleep(4 * serve.WATCH_INTERVAL)
            if process.poll() is None:
                assert control(urls["http"], "load") == 200
                assert len(client.embed(SHIPPED / "golden/photo.jpg").vectors) == 1
                assert not serve.dead_stubs(child_of(process))
            else:
                assert process.stderr is not None
                assert "npair: a Python stub of the model died" in process.stderr.read()


def test_a_start_that_hangs_ends_with_the_reason() -> None:
    """A stub that gets no CPU for two seconds while it loads: Triton has given it up, and waits for it for ever."""
    ports = free_ports()
    process = start(**ports, START_SECONDS="15")

    def stub() -> int | None:
        server = serve.server_at(int(ports["HTTP_PORT"]))
        return next((pid for pid in serve.children(server) if serve.cpu_seconds(pid) > 0.3), None) if server else None

    eventually(stub)
    stopped = stub()
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(4)
    os.kill(stopped, signal.SIGCONT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "loading: npair" in output, "what the server logged"
    reason = "npair: the model was not ready within START_SECONDS=15, with the last log lines above; the server was ended"
    assert output.splitlines()[-1] == reason


def test_stops_in_order_although_an_idle_client_holds_its_connection() -> None:
    with running() as (process, urls):
        idle = http.client.HTTPConnection(urls["http"].removeprefix("http://"))
        idle.request("GET", "/v2/health/live")
        idle.getresponse().read()
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=30)
        assert process.returncode == 0, output
        assert time.monotonic() - began < 10
        assert output == "npair: stopped\n"
        idle.close()


def test_stops_in_order_although_the_repository_has_other_folders(tmp_path: Path) -> None:
    """As the root of a Kubernetes volume has."""
    shutil.copytree(ROOT / "model_repository", tmp_path / "models")
    (tmp_path / "models/lost+found").mkdir()
    with running(MODEL_REPOSITORY=str(tmp_path / "models")) as (process, _):
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=30)
        assert (process.returncode, output) == (0, "npair: stopped\n")


def test_storage_that_goes_away_does_not_end_a_server_that_runs(tmp_path: Path) -> None:
    """As an unmount would; all is in memory."""
    model = Path(shutil.copytree(ROOT / "model_repository", tmp_path / "models")) / "npair"
    with running(MODEL_REPOSITORY=str(model.parent)) as (process, urls), NpairClient(urls["http"]) as client:
        photo = (model / SHIPPED.name / "golden/photo.jpg").read_bytes()
        model.rename(tmp_path / "away")
        time.sleep(serve.UNHEALTHY_AFTER + 3)
        assert process.poll() is None
        assert len(client.embed(photo).vectors) == 1
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=30)
        assert (process.returncode, output) == (0, "npair: stopped\n")


def test_log_lines_that_cannot_be_written_do_not_end_the_server() -> None:
    """As where the disk behind stderr is full. A pipe that nobody reads takes 64 KiB before it blocks whoever writes."""
    ports = free_ports()
    url = f"http://127.0.0.1:{ports['HTTP_PORT']}"
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [sys.executable, ROOT / "model/api/serve.py", "--verbose"],
            env=os.environ | ports | {"NPAIR_CONTROL_SECRET": "s"},
            stderr=full,
        )
    try:
        with NpairClient(url) as client:
            eventually(client.ready)
            connection = http.client.HTTPConnection(url.removeprefix("http://"))
            connection.request("POST", "/v2/logging", '{"log_verbose_level": 1}', {serve.CONTROL_HEADER: "s"})
            assert connection.getresponse().status == 200
            connection.close()
            end = time.monotonic() + 5
            while time.monotonic() < end:
                client.embed(SHIPPED / "golden/photo.jpg")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_what_it_accepted_before_it_stops(protocol: str) -> None:
    photos = [encode(Image.new("RGB", (4100, 4100)), "PNG")] * 16  # so large that they are decoded one after another
    with running(DRAIN_SECONDS="30") as (process, urls), NpairClient(urls[protocol], batch_size=64) as client:
        answers: list[int] = []
        request = threading.Thread(target=lambda: answers.append(len(client.embed(photos).vectors)))
        worked = computed(process)
        request.start()
        eventually(lambda: computed(process) > worked + 0.2)  # it is accepted, and takes seconds; a golden photo takes less
        assert not answers
        process.send_signal(signal.SIGTERM)
        request.join(timeout=60)
        client.close()
        assert answers == [16]
        assert process.wait(timeout=30) == 0


def test_a_load_that_ends_between_two_questions_is_not_taken_for_refused() -> None:
    """After each "no" of the server's, time stands still until it has loaded: where its port opens in just that moment."""
    code = """
import sys, time, serve

green = serve.GoldenProber.green


def slowly(self, path):
    answer = green(self, path)
    while not answer and not green(self, "/v2/health/live"):
        time.sleep(0.05)
    return answer


serve.GoldenProber.green = slowly
sys.exit(serve.main())
"""
    assert changed(code) == (0, "npair: stopped\n")


def test_an_answer_that_does_not_come_is_not_taken_for_refused() -> None:
    """As on a starved machine: the first answers of a server that has loaded come too late."""
    code = """
import sys, serve

request = serve.GoldenProber._request
late = ["/v2/models/npair/stats", "/v2/models/npair/ready"]


def starved(self, method, path, *more):
    answer = request(self, method, path, *more)
    if path in late:
        late.remove(path)
        raise TimeoutError
    return answer


serve.GoldenProber._request = starved
code = serve.main()
sys.exit(f"in time: {late}" if late else code)
"""
    assert changed(code) == (0, "npair: stopped\n")


def test_stops_in_order_before_it_has_started_a_server() -> None:
    code = """
import os, signal, sys, serve

command = serve.command


def stopped(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return command(*arguments)


serve.command = stopped
sys.exit(serve.main())
"""
    environment = os.environ | free_ports() | {"PYTHONPATH": str(ROOT / "model/api")}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (process.returncode, process.stderr) == (0, "")


def test_ctrl_c() -> None:
    with running() as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


class TestEngines:
    """On a copy of the repository's model."""

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        return Path(shutil.copytree(ROOT / "model_repository", tmp_path / "models")) / "npair"

    def force(self, model: Path, engine: str) -> None:
        with (model / "config.pbtxt").open("a") as config:
            config.write(f'parameters {{ key: "engine" value: {{ string_value: "{engine}" }} }}\n')

    def golden_distance(self, model: Path, url: str) -> float:
        folder = model / SHIPPED.name / "golden"
        with NpairClient(url) as client:
            vector = client.embed(folder / "photo.jpg").vectors[0]
        return float(np.linalg.norm(vector - np.load(folder / "embeddings.npy")[0]))

    @pytest.mark.parametrize("engine", ["torch", "openvino-fp32"])
    def test_forced(self, model: Path, engine: str) -> None:
        self.force(model, engine)
        with running(MODEL_REPOSITORY=str(model.parent)) as (_, urls):
            assert self.golden_distance(model, urls["http"]) < 0.005

    def test_unknown(self, model: Path) -> None:
        self.force(model, "best")
        code, output = ended(**free_ports(), MODEL_REPOSITORY=str(model.parent))
        assert code == 1
        assert "has no engine best, only openvino-int8" in output

    def test_passed_over_and_said(self, model: Path) -> None:
        """The fastest engine cannot be as exact as this manifest asks."""
        engines = json.loads((model / SHIPPED.name / "manifest.json").read_bytes())["engines"]
        engines["openvino-int8"]["tolerance"] = 0
        rewrite_manifest(model / SHIPPED.name, engines=engines)
        process = start(**(ports := free_ports()), MODEL_REPOSITORY=str(model.parent))
        try:
            said = [line for line in lines_until_ready(process) if "not by openvino-int8" in line]
            assert len(said) == 2, "by each instance"
            assert re.search(rf"version {SHIPPED.name} is served by openvino-(bf16|fp32), not by openvino-int8: ", said[0])
            assert re.search("golden embeddings differ by|this CPU has none of", said[0])
            assert self.golden_distance(model, f"http://127.0.0.1:{ports['HTTP_PORT']}") < 0.05
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_dead_stub_ends_the_server_with_the_reason() -> None:
    """Readiness URLs stay green after this, and another instance answers most golden photos."""
    with running() as (process, urls):
        health = [sys.executable, str(ROOT / "model/api/serve.py"), "--health", "--http-port", urls["http"].rsplit(":", 1)[1]]
        assert subprocess.run(health, check=False).returncode == 0
        os.kill(stubs_of(process)[0], signal.SIGKILL)
        told = subprocess.run(health, check=False, capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (1, "npair: a Python stub of the model died\n")
        _, output = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "npair: a Python stub of the model died, and what it is given fails; the server was ended" in output
        with NpairClient(urls["http"], retries=0) as client, pytest.raises(UnavailableError):
            client.embed(b"photo")


def test_a_dead_stub_is_seen_where_serve_py_has_the_flag_for_the_port_too() -> None:
    ports = free_ports()
    number = ports.pop("HTTP_PORT")
    process = start(f"--http-port={number}", **ports)
    try:
        lines_until_ready(process)
        assert serve.server_at(int(number)) == child_of(process)
        os.kill(stubs_of(process)[0], signal.SIGKILL)
        health = [sys.executable, str(ROOT / "model/api/serve.py"), "--health", f"--http-port={number}"]
        told = subprocess.run(health, check=False, capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (1, "npair: a Python stub of the model died\n")
    finally:
        process.terminate()
        process.communicate(timeout=30)


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
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert all(len(serve.children(process.pid)) == 1 for _ in range(5000))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="No such"):
        serve.children(process.pid)


def test_what_others_compute_beside_a_dead_stub_is_answered() -> None:
    photos = [encode(Image.new("RGB", (4100, 4100)), "PNG")] * 32
    with running(DRAIN_SECONDS="30") as (process, urls), NpairClient(urls["http"], batch_size=32) as client:
        answers: list[int] = []
        request = threading.Thread(target=lambda: answers.append(len(client.embed(photos).vectors)))
        before = {stub: serve.cpu_seconds(stub) for stub in stubs_of(process)}

        def busy() -> list[int]:
            return [stub for stub in before if serve.cpu_seconds(stub) > before[stub] + 0.5]

        request.start()
        eventually(busy)
        os.kill(next(stub for stub in before if stub not in busy()), signal.SIGKILL)
        _, output = process.communicate(timeout=60)
        request.join(timeout=60)
        assert "npair: a Python stub of the model died" in output
        assert process.returncode == 1
        assert answers == [32]


def test_hanging_stubs_end_the_server_with_the_reason() -> None:
    with running() as (process, _):
        stubs = stubs_of(process)
        for stub in stubs:
            os.kill(stub, signal.SIGSTOP)
        _, output = process.communicate(timeout=60)
        assert process.returncode == 1
        deadline = time.monotonic() + 10
        while any(map(serve.arguments_of, stubs)):
            assert time.monotonic() < deadline, "stubs are left behind"
            time.sleep(0.1)
        assert re.search(r"npair: the golden photo has failed for 10 s \(.*\); the server was ended", output)


def test_load_is_not_taken_for_death() -> None:
    """The watch's own photo waits in the same queue as everybody's, longer than a dead model would be left alone."""
    photos = [encode(draw(0, 0, 1500), "PNG")] * 64
    with running() as (process, urls):
        end = time.monotonic() + 1.5 * serve.UNHEALTHY_AFTER

        def load(_: int) -> None:
            with NpairClient(urls["http"], batch_size=64, batch_bytes=1 << 30, timeout=120, retries=10) as client:
                while time.monotonic() < end:
                    client.embed(photos)

        with ThreadPoolExecutor(5) as threads:
            list(threads.map(load, range(5)))
        assert process.poll() is None


@pytest.mark.parametrize(("status", "reason"), [(None, "no answer"), (503, "answered 503")])
def test_busy_is_told_from_dead_whichever_request_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int | None, reason: str
) -> None:
    """A server that answers its statistics alone, and all else not, or that it is full: busy while its count of inferences grows,
    dead when it stands still."""
    counts = iter([7, 9, 9, 9])

    class Statistics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.endswith("/stats"):
                if status:
                    self.send_error(status)
                else:
                    time.sleep(4)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"model_stats": [{"inference_stats": {"success": {"count": %d}}}]}' % next(counts))

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(serve, "PROBE_TIMEOUT", 1)
    monkeypatch.setattr(serve, "WATCH_INTERVAL", 0.1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Statistics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        prober = serve.GoldenProber(tmp_path, "127.0.0.1", server.server_port)
        with pytest.raises(serve.BusyError):
            prober.probe()
        with pytest.raises(serve.ProbeError, match=reason):
            prober.probe()
        server.shutdown()


def test_working_is_told_from_hanging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stubs that compute without an answer, as for a request of many large photos, are left alone, though not for ever."""

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.endswith("/stats"):
                time.sleep(2)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"model_stats": []}')

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(serve, "PROBE_TIMEOUT", 1)
    compute = "import os\n[os.fork() for _ in range(2)]\nwhile True: pass"
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server,
        subprocess.Popen([sys.executable, "-c", compute], start_new_session=True) as process,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            prober = serve.GoldenProber(tmp_path, "127.0.0.1", server.server_port)
            with pytest.raises(serve.ProbeError, match="no answer"):
                prober.probe()  # it does not know the server's process
            prober.server = process.pid
            with pytest.raises(serve.BusyError):
                prober.probe()
            monkeypatch.setattr(serve, "WORKING_FOR", 1)
            with pytest.raises(serve.ProbeError, match="no answer"):
                prober.probe()
            monkeypatch.undo()
            monkeypatch.setattr(serve, "PROBE_TIMEOUT", 1)
            os.killpg(process.pid, signal.SIGSTOP)
            with pytest.raises(serve.ProbeError, match="no answer"):
                prober.probe()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            server.shutdown()


def test_killed_parent_leaves_no_server() -> None:
    with running() as (process, urls):
        stubs = stubs_of(process)
        process.kill()
        port = int(urls["http"].rsplit(":", 1)[1])
        deadline = time.monotonic() + 5
        while serve.server_at(port):
            assert time.monotonic() < deadline, "the server outlived serve.py"
            time.sleep(0.1)
        serve.remove_remains(port)  # a stub that waits for a lock with which the server died
        eventually(lambda: not any(map(serve.arguments_of, stubs)))


def test_the_next_removes_what_the_killed_left() -> None:
    """In a pod, /dev/shm outlives the containers."""
    ports = free_ports()

    def regions() -> set[Path]:
        return serve.shared_regions(int(ports["HTTP_PORT"]))

    process = start(**ports)
    lines_until_ready(process)
    stubs = stubs_of(process)
    for stub in stubs:
        os.kill(stub, signal.SIGSTOP)
    process.kill()
    process.communicate()
    left = regions()
    assert len(left) == len(stubs)
    eventually(lambda: not serve.server_at(int(ports["HTTP_PORT"])))
    following = start(**ports)
    lines_until_ready(following)
    assert regions()
    assert not regions() & left
    eventually(lambda: not any(map(serve.arguments_of, stubs)))
    following.terminate()
    following.communicate(timeout=30)
    assert not regions()


def test_control_apis_open_with_the_secret_alone(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open sesame\n")
    with running(NPAIR_CONTROL_SECRET_FILE=str(tmp_path / "secret")) as (process, urls):

        def index(secret: str) -> int:
            connection = http.client.HTTPConnection(urls["http"].removeprefix("http://"))
            connection.request("POST", "/v2/repository/index", "{}", {serve.CONTROL_HEADER: secret})
            status = connection.getresponse().status
            connection.close()
            return status

        assert index("open sesame") == 200
        assert index("wrong") == 403
        client = tritonclient.grpc.InferenceServerClient(urls["grpc"].removeprefix("grpc://"))
        assert client.get_model_repository_index(headers={f"triton-grpc-protocol-{serve.CONTROL_HEADER}": "open sesame"}).models
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index()
        assert client.get_model_config("npair").config.name == "npair"
        client.close()
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=30)
        assert "sesame" not in output
