"""Build, test and promote the image as the pipeline does, on this machine alone: make test-image.

Brings its own Docker engine and a registry that answers to ghcr.io, in a mount namespace, so that
nothing is left behind: no container, registry, host entry or login. A stand-in for NVIDIA's image,
which has 15 GB, is put together in the same layout from Debian and the wheel nvidia-pytriton,
unless TRITON_IMAGE and BASE_IMAGE name real ones.

Needs: root on Debian 12 or 13 on x86-64, and the .venv of `make install`. Standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWNER, PASSWORD = "tester", "not-a-secret"
REPOSITORY = f"ghcr.io/{OWNER}/npair_model_api"
REGISTRY_ADDRESS = "127.0.0.88"  # a loopback address that nothing else uses
# Packages of Debian trixie. They are unpacked, since installing would start the servers. They also
# run on bookworm, whose own engine does not support named build contexts.
ENGINE = (
    "docker.io",
    "docker-cli",
    "docker-buildx",
    "docker-compose",
    "containerd",
    "docker-registry",
    "tini",
)
TOOLS = ("runc", "skopeo", "debootstrap", "docker-compose", "iproute2", "apache2-utils")
WHEEL_RELEASE = "24.10"  # of NVIDIA's images, with the wheel's server, 2.51
LIMITS = {"torch": (1300, 420), "no torch": (800, 260)}  # MB unpacked and pushed
MOST_SEARCH = 800  # MB unpacked


def main() -> None:
    if "NPAIR_NAMESPACE" not in os.environ:
        # Changes to /etc/hosts must reach only this process and its children.
        os.environ["NPAIR_NAMESPACE"] = "1"
        os.execvp(
            "unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("interrupted"))  # runs every finally block
    with (
        tempfile.TemporaryDirectory(prefix="npair-image-", ignore_cleanup_errors=True) as scratch,
        contextlib.ExitStack() as stack,
    ):
        test(Path(scratch), stack)


def test(scratch: Path, stack: contextlib.ExitStack) -> None:
    step("install the tools")
    missing = [tool for tool in TOOLS if not installed(tool)]
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qqy", "--no-install-recommends", *missing)
    stack.enter_context(engine(scratch))
    registry = stack.enter_context(registry_at_ghcr(scratch))

    triton, base = os.environ.get("TRITON_IMAGE"), os.environ.get("BASE_IMAGE", "ubuntu:24.04")
    options = ["--network", "host"]
    if triton is None:
        step("put a stand-in for NVIDIA's image together")
        triton, base = stand_in(scratch)
        options += stack.enter_context(wheelhouse(scratch))
    options += ["--build-arg", f"TRITON_IMAGE={triton}", "--build-arg", f"BASE_IMAGE={base}"]

    if "TRITON_IMAGE" not in os.environ:
        step("refuse a Triton with known vulnerabilities")
        refused = build(f"{REPOSITORY}:refused", *options, fails=True)
        assert "have known vulnerabilities" in refused, refused
        options += ["--build-arg", f"TRITON_FLOOR={WHEEL_RELEASE}"]

    step("build the image")
    build(f"{REPOSITORY}:cpu-1", *options)
    step("build it without torch")
    build(f"{REPOSITORY}:no-torch", *options, "--build-arg", "WITH_TORCH=0")
    step("push the candidate")
    login = ("docker", "login", "--username", OWNER, "--password-stdin", "ghcr.io")
    run(*login, stdin=PASSWORD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    digest = push("cpu-1")
    check_size("torch", "cpu-1", digest)
    check_size("no torch", "no-torch", push("no-torch"))

    step("test exactly what was pushed")
    run("docker", "image", "rm", "--force", f"{REPOSITORY}:cpu-1", stdout=subprocess.DEVNULL)
    compose_test(f"cpu-1@{digest}")
    step("start it alone, hardened")
    run("scripts/start-hardened.sh", f"{REPOSITORY}@{digest}", env={"HEALTHY_WITHIN": "15"})
    step("start the one without torch")
    run("scripts/start-hardened.sh", f"{REPOSITORY}:no-torch", env={"HEALTHY_WITHIN": "15"})
    step("stop it under load, beside idle connections")
    check_drain(f"{REPOSITORY}@{digest}")
    step("kill its Python stub under compose")
    check_recovery(f"cpu-1@{digest}")
    step("search a gallery by the profile search")
    check_search(f"cpu-1@{digest}", scratch, options)
    step("promote it")
    promote(digest)
    assert digest_of("cpu") == digest

    step("break an image: it must not be promoted")
    spoiled = scratch / "spoiled"
    shutil.copytree(ROOT / "model/api", spoiled)
    with (spoiled / "client.py").open("a") as file:
        file.write("\nraise ImportError('broken on purpose')\n")
    build(f"{REPOSITORY}:cpu-2", *options, context=spoiled)
    broken = push("cpu-2")
    try:
        compose_test(f"cpu-2@{broken}")
    except subprocess.CalledProcessError:
        print("its test failed, so the pipeline ends there")
    else:
        raise SystemExit("the test of a broken image passed")
    assert digest_of("cpu") == digest != broken
    assert registry.poll() is None
    step("done")


def installed(package: str) -> bool:
    return (
        "install ok installed"
        in subprocess.run(
            ["dpkg-query", "--show", "--showformat", "${Status}", package],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
    )


@contextlib.contextmanager
def engine(scratch: Path) -> Iterator[None]:
    """Run a separate Docker engine; set PATH, DOCKER_HOST and DOCKER_CONFIG to use it."""
    step("start an engine")
    packages, lists = scratch / "packages", scratch / "apt"
    for folder in (packages, lists / "lists/partial", lists / "cache/archives/partial"):
        folder.mkdir(parents=True)
    sources = lists / "trixie.sources"
    sources.write_text(
        "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: trixie\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
    apt = {"Dir::Etc::SourceList": sources, "Dir::Etc::SourceParts": "/dev/null"}
    apt |= {
        "Dir::State::Lists": lists / "lists",
        "Dir::Cache": lists / "cache",
        "APT::Sandbox::User": "root",
    }
    flags = [f"-o={name}={value}" for name, value in apt.items()]
    run("apt-get", *flags, "update", "-qq")
    run("apt-get", *flags, "-qq", "download", *ENGINE, cwd=packages)
    for package in packages.iterdir():
        run("dpkg-deb", "--extract", package, scratch / "engine")
    programs = scratch / "engine/usr"
    plugins = scratch / "docker/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(programs / "libexec/docker/cli-plugins/docker-buildx")
    os.environ["PATH"] = f"{programs}/bin:{programs}/sbin:{os.environ['PATH']}"
    os.environ["DOCKER_HOST"] = f"unix://{scratch}/docker.sock"
    os.environ["DOCKER_CONFIG"] = str(scratch / "docker")
    folders = [f"--{name}={scratch / name}" for name in ("data-root", "exec-root")]
    command = [
        "dockerd",
        *folders,
        f"--pidfile={scratch}/pid",
        f"--host=unix://{scratch}/docker.sock",
        "--insecure-registry=ghcr.io",
        "--iptables=false",  # no rules to leave behind; builds use the host's network
        "--ip6tables=false",
    ]
    bridge = Path("/sys/class/net/docker0")
    had_bridge = bridge.exists()
    with background(command, scratch / "dockerd.log"):
        wait_for(
            "the engine",
            lambda: (
                subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
            ),
        )
        try:
            yield
        finally:
            containers = output("docker", "ps", "--all", "--quiet").split()
            if containers:
                run("docker", "rm", "--force", "--volumes", *containers, stdout=subprocess.DEVNULL)
            run("docker", "network", "prune", "--force", stdout=subprocess.DEVNULL)
    if bridge.exists() and not had_bridge:
        run("ip", "link", "delete", "docker0")


@contextlib.contextmanager
def registry_at_ghcr(scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a registry with a password.

    This process and its children, among them the engine, reach it as ghcr.io.
    """
    hosts = scratch / "hosts"
    hosts.write_text(Path("/etc/hosts").read_text() + f"\n{REGISTRY_ADDRESS} ghcr.io\n")
    run("mount", "--bind", hosts, "/etc/hosts")
    (scratch / "htpasswd").write_text(output("htpasswd", "-nbB", OWNER, PASSWORD))
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(scratch / "registry")}},
        "http": {"addr": f"{REGISTRY_ADDRESS}:80"},
        "auth": {"htpasswd": {"realm": "npair", "path": str(scratch / "htpasswd")}},
    }
    (scratch / "registry.json").write_text(json.dumps(config))  # JSON is YAML
    with background(
        ["docker-registry", "serve", scratch / "registry.json"], scratch / "registry.log"
    ) as process:
        wait_for("the registry", lambda: status(REGISTRY_ADDRESS, 80, "GET", "/v2/") == 401)
        yield process


def stand_in(scratch: Path) -> tuple[str, str]:
    """Build an image with the layout of NVIDIA's, and its base, Debian, also of the final image.

    Returns: their names.
    """
    triton, base = "npair-standin/tritonserver", "npair-standin/debian"
    root = scratch / "debian"
    run("debootstrap", "--variant=minbase", "bookworm", root, stdout=subprocess.DEVNULL)
    run(
        "sh",
        "-c",
        f"tar -C {root} --exclude=./var/cache/apt --exclude=./var/lib/apt/lists/* -c . "
        f"| docker import --message debian - {base}",
    )
    wheel = package_folder("pytriton")
    context = scratch / "stand-in"
    server = context / "opt/tritonserver"
    shutil.copytree(wheel / "tritonserver/bin", server / "bin")
    shutil.copytree(wheel / "tritonserver/caches", server / "caches")
    shutil.copytree(
        wheel / "tritonserver/backends",
        server / "backends",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    shutil.copy(
        wheel / "tritonserver/python_backend_stubs/3.11/triton_python_backend_stub",
        server / "backends/python",
    )
    shutil.copy(next(wheel.parent.glob("nvidia_pytriton-*.dist-info/licenses/LICENSE")), server)
    shutil.copytree(
        wheel.parent / "nvidia_pytriton.libs",
        server / "lib",
        ignore=shutil.ignore_patterns("libpython3*"),
    )
    (context / "Dockerfile").write_text(
        f"FROM {base}\n"
        "RUN apt-get update && apt-get install -y --no-install-recommends libpython3.11 libgomp1\n"
        f"ENV NVIDIA_TRITON_SERVER_VERSION={WHEEL_RELEASE}\n"
        "COPY opt /opt\n"
        "RUN echo /opt/tritonserver/lib > /etc/ld.so.conf.d/tritonserver.conf && ldconfig\n"
    )
    run(
        "docker",
        "buildx",
        "build",
        "--quiet",
        "--network",
        "host",
        "--tag",
        triton,
        context,
        stdout=subprocess.DEVNULL,
    )
    return triton, base


@contextlib.contextmanager
def wheelhouse(scratch: Path) -> Iterator[list[str]]:
    """Serve pip's packages from this process, since a build may have no network.

    Yields: the build options that make pip use them.
    """
    wheels = scratch / "wheels"
    for pins in ("api/requirements.txt", "api/requirements-torch.txt", "web/requirements.txt"):
        run(
            sys.executable,
            "-m",
            "pip",
            "--quiet",
            "download",
            "--dest",
            wheels,
            "--requirement",
            ROOT / "model" / pins,
        )
    handler = partial(QuietHandler, directory=str(wheels))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pip_conf = scratch / "pip.conf"
        pip_conf.write_text(
            f"[global]\nno-index = true\nfind-links = http://127.0.0.1:{server.server_port}/\n"
        )
        yield ["--secret", f"id=pip_conf,src={pip_conf}"]
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def build(tag: str, *options: str, context: Path = ROOT / "model/api", fails: bool = False) -> str:
    """Build one tag from the Dockerfile in ``context``, with the models baked in.

    fails: whether the build must fail. Returns: its output.
    """
    command = [
        "docker",
        "buildx",
        "build",
        "--progress",
        "plain",
        "--build-context",
        "model_repository=model_repository",
    ]
    command += ["--file", str(context / "Dockerfile.cpu"), "--tag", tag, *options, str(context)]
    environment = os.environ | {
        "SOURCE_DATE_EPOCH": output("git", "log", "-1", "--pretty=%ct").strip()
    }
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if (result.returncode != 0) != fails:
        print(result.stdout[-5000:])
        raise SystemExit(f"the build of {tag} {'did not fail' if fails else 'failed'}")
    return result.stdout


def push(tag: str) -> str:
    """Push a tag. Returns: its digest."""
    run("docker", "push", "--quiet", f"{REPOSITORY}:{tag}", stdout=subprocess.DEVNULL)
    return digest_of(tag)


def digest_of(tag: str) -> str:
    return output(
        "skopeo",
        "inspect",
        "--tls-verify=false",
        "--format",
        "{{.Digest}}",
        f"docker://{REPOSITORY}:{tag}",
    ).strip()


def check_size(kind: str, tag: str, digest: str) -> None:
    unpacked = (
        int(output("docker", "image", "inspect", "--format", "{{.Size}}", f"{REPOSITORY}:{tag}"))
        / 1e6
    )
    manifest = json.loads(
        output(
            "skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{REPOSITORY}@{digest}"
        )
    )
    pushed = sum(layer["size"] for layer in manifest["layers"]) / 1e6
    print(f"{kind}: {unpacked:.0f} MB unpacked, {pushed:.0f} MB pushed")
    most_unpacked, most_pushed = LIMITS[kind]
    assert unpacked <= most_unpacked, f"more than {most_unpacked} MB"
    assert pushed <= most_pushed, f"more than {most_pushed} MB"


def compose(tag: str, *arguments: str, program: str = "docker-compose") -> None:
    command = [program, "--file", "docker-compose.prod.yml", *arguments]
    run(*command, stderr=subprocess.DEVNULL, env={"GHCR_USERNAME": OWNER, "TAG": tag, **PORTS})


PORTS = {
    "HTTP_PORT": "18400",
    "GRPC_PORT": "18401",
    "METRICS_PORT": "18402",
    "SEARCH_PORT": "18403",
}


def compose_test(tag: str) -> None:
    """Run the pipeline's tests by Compose 2, and by 1.29 if Debian has it."""
    for program in ("docker-compose", "/usr/bin/docker-compose"):
        print("Compose", output(program, "version", "--short").strip(), flush=True)
        try:
            compose(
                tag,
                "run",
                "--rm",
                "model_api",
                "pytest",
                "-q",
                "test_model_api.py",
                program=program,
            )
        finally:
            compose(tag, "down", program=program)


def promote(digest: str) -> None:
    tags = ("cpu", f"cpu-{output('scripts/version.sh').strip()}")
    options = "--src-tls-verify=false --dest-tls-verify=false"  # the registry is on this machine
    run("scripts/promote.sh", REPOSITORY, digest, *tags, env={"SKOPEO_OPTIONS": options})


RAW = {"Inference-Header-Content-Length": "0"}  # Triton's: the body is the input


def photo() -> bytes:
    return next((ROOT / "model_repository/npair").glob("*/golden/photo.jpg")).read_bytes()


def embed(port: int) -> int:
    """Send a golden photo. Returns: the HTTP status, 0 if there is no answer."""
    return status("127.0.0.1", port, "POST", "/v2/models/npair/infer", photo())


def status(
    host: str,
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    headers: Mapping[str, str] = RAW,
) -> int:
    """Send a request; a body is one raw photo. Returns: the HTTP status, 0 without an answer."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request(method, path, body, {} if body is None else dict(headers))
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def check_drain(image: str) -> None:
    """Check that SIGTERM ends the server with code 0 within 10 s and loses no accepted request.

    Requests are in flight and idle connections open when the signal comes.
    """
    name = "npair-drain"
    run("docker", "run", "--detach", "--name", name, "--read-only", "--tmpfs", "/tmp",
        "--cap-drop", "ALL", "--user", "1000", "--publish", "127.0.0.1:18410:8000", image,
        stdout=subprocess.DEVNULL)  # fmt: skip
    wait_for("the container", lambda: embed(18410) == 200)
    idle = []
    for _ in range(8):
        connection = http.client.HTTPConnection("127.0.0.1", 18410)
        connection.request("GET", "/v2/health/ready")
        connection.getresponse().read()
        idle.append(connection)  # kept open
    statuses: list[int] = []
    accepted = threading.Barrier(17)

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", 18410, timeout=30)
        connection.request("POST", "/v2/models/npair/infer", photo(), RAW)
        accepted.wait()
        statuses.append(connection.getresponse().status)

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    accepted.wait()
    time.sleep(0.1)  # by now the requests have arrived
    began = time.monotonic()
    # The grace period of docker-compose.prod.yml.
    run("docker", "stop", "--time", "15", name, stdout=subprocess.DEVNULL)
    took = time.monotonic() - began
    for thread in threads:
        thread.join()
    code = output("docker", "inspect", "--format", "{{.State.ExitCode}}", name).strip()
    print(
        f"exit code {code} after {took:.1f} s; {statuses.count(200)} of {len(threads)} requests "
        "answered"
    )
    assert (code, statuses) == ("0", [200] * len(threads))
    assert took < 10, "longer than Docker waits by default"
    run("docker", "rm", name, stdout=subprocess.DEVNULL)


def check_recovery(tag: str) -> None:
    """Kill a Python stub, and check that all requests are answered again within 20 s."""
    port = int(PORTS["HTTP_PORT"])

    def works() -> bool:
        # While one instance is dead, the other still answers its share.
        return all(embed(port) == 200 for _ in range(20))

    compose(tag, "up", "--detach", "model_api")
    try:
        wait_for("the service", lambda: embed(port) == 200)
        container = output("docker", "ps", "--quiet", "--filter", "name=model_api").strip()
        stub = re.search(
            r"^ *(\d+) .*triton_python_backend_stub",
            output("docker", "top", container, "-eo", "pid,args"),
            re.MULTILINE,
        )
        assert stub, "no stub runs"
        began = time.monotonic()
        os.kill(int(stub[1]), signal.SIGKILL)
        wait_for("the end of the old server", lambda: embed(port) == 0)
        wait_for("the new server", works)
        took = time.monotonic() - began
        print(f"inference answered again {took:.1f} s after a stub was killed")
        assert took <= 20
    finally:
        compose(tag, "down")


def check_search(tag: str, scratch: Path, options: Sequence[str]) -> None:
    """Build the search's image; build a gallery with it, and search that with a key."""
    run("docker", "buildx", "build", "--quiet", "--file", "model/web/Dockerfile", *options,
        "--tag", "npair_search", "--load", ".", stdout=subprocess.DEVNULL)  # fmt: skip
    size = int(output("docker", "image", "inspect", "--format", "{{.Size}}", "npair_search")) / 1e6
    print(f"search: {size:.0f} MB unpacked")
    assert size <= MOST_SEARCH, f"more than {MOST_SEARCH} MB"
    photos, gallery, key = scratch / "photos", scratch / "gallery", "k" * 32
    photos.mkdir()
    (photos / "photo.jpg").write_bytes(photo())
    gallery.mkdir()
    gallery.chmod(0o777)  # the container's user is another one
    os.environ |= {"GALLERY": str(gallery), "PHOTOS": str(photos), "NPAIR_WEB_KEY": key}
    port, headers = int(PORTS["SEARCH_PORT"]), {"Authorization": f"Bearer {key}"}
    try:
        compose(tag, "up", "--detach", "model_api")
        wait_for("the service", lambda: embed(int(PORTS["HTTP_PORT"])) == 200)
        # Not at /gallery, where the profile's own mount is read-only.
        builds = ("npair", "index", "build", "/photos", "--index", "/new")
        mount = ("--volume", f"{gallery}:/new")
        compose(tag, "--profile", "search", "run", "--rm", "--no-deps", *mount, "search", *builds)
        compose(tag, "--profile", "search", "up", "--detach", "--no-build", "search")
        for path, body in (("/", None), ("/healthz", None), ("/search?k=1", photo())):
            method = "GET" if body is None else "POST"
            answered = partial(status, "127.0.0.1", port, method, path, body, headers=headers)
            wait_for(f"200 at {path}", lambda answered=answered: answered() == 200)  # type: ignore[misc]
        assert status("127.0.0.1", port, "POST", "/search", photo()) == 401, "a key is needed"
        container = output("docker", "ps", "--quiet", "--filter", "name=search").strip()
        health = ("docker", "inspect", "--format", "{{.State.Health.Status}}", container)
        wait_for("its health", lambda: output(*health).strip() == "healthy")
    finally:
        compose(tag, "--profile", "search", "down")


def package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(
            f"{name} is not installed; run this with the Python of .venv, as make test-image does"
        )
    return Path(found.origin).parent


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what} did not come within {seconds:.0f} s")
        time.sleep(0.2)


@contextlib.contextmanager
def background(command: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process during the block; print the end of its log if the block fails."""
    with (
        log.open("wb") as file,
        subprocess.Popen([str(part) for part in command], stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        except BaseException:
            print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
            raise
        finally:
            process.terminate()


def run(
    *command: object,
    cwd: Path = ROOT,
    stdin: str | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run a command and raise if it fails. env: added to this process's environment."""
    words = [str(word) for word in command]
    subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        input=stdin,
        text=True,
        stdout=stdout,
        stderr=stderr,
        check=True,
    )


def output(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


BEGAN = time.monotonic()


def step(title: str) -> None:
    print(f"== {time.monotonic() - BEGAN:5.0f} s  {title}", flush=True)


if __name__ == "__main__":
    main()
