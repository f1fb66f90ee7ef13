"""The engines that compute a version's network; the manifest names those that a version may use.

A graph stops before the normalisation: rounded to bf16 or int8, that last step would exchange neighbours.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

BATCH = 4  # photos that one thread computes together where there are many; more are no faster

# Any one of these instructions makes a precision fast, and as exact as it was when it was measured; named as in /proc/cpuinfo.
INSTRUCTIONS: dict[str, frozenset[str]] = {
    "fp32": frozenset(),
    "bf16": frozenset({"avx512_bf16", "amx_bf16"}),
    "int8": frozenset({"avx512_vnni", "avx_vnni"}),
}


class EngineError(Exception):
    """An engine that cannot run on this machine; the message says why."""


class Engine(Protocol):
    """A loaded graph, which several threads may call at once."""

    def __call__(self, pixels: npt.NDArray[np.uint8], *, alone: bool) -> npt.NDArray[np.float32]:
        """uint8 [N, size, size, 3] -> float32 [N, D], not normalised, valid until this thread's next call; N is 1 or BATCH.

        alone: no other call runs, so that this one, of one photo, may use all cores; else one.
        """


def load(library: str, graph: Path, precision: str, threads: int, cores: int) -> Engine:
    """Load a graph for this many threads that call it at once, and for a call that is alone on this many cores.

    Raises: EngineError where this machine lacks the library, the instructions or a kernel for it.
    """
    if INSTRUCTIONS[precision] and not INSTRUCTIONS[precision] & cpu_flags():
        raise EngineError(f"this CPU has none of {', '.join(sorted(INSTRUCTIONS[precision]))}")
    try:
        return {"openvino": _openvino, "torch": _torch}[library](graph, precision, threads, cores)
    except ImportError as error:
        raise EngineError(f"{library} is not installed ({error})") from error
    except RuntimeError as error:  # both libraries', for operations that this CPU has no kernel for
        raise EngineError(
            f"{library} cannot run {graph.name} on this CPU: {str(error).splitlines()[-1]}"
        ) from error


def cpu_info(key: str) -> str:
    """What /proc/cpuinfo says of the first CPU under this key, empty where it says nothing."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets, named as in /proc/cpuinfo."""
    return frozenset(cpu_info("flags").split())


def cores() -> int:
    """How many physical cores this process may use: those of its CPU affinity, or fewer where its control group has a quota."""
    cpus = os.sched_getaffinity(0)
    try:
        topology = Path("/sys/devices/system/cpu")
        count = len(
            {
                (topology / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
                for cpu in cpus
            }
        )
    except OSError:
        count = len(cpus)
    for files in (
        ["cpu.max"],
        ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"],
    ):  # of versions 2 and 1
        with contextlib.suppress(OSError, ValueError):
            quota, period = (
                int(number)
                for name in files
                for number in (Path("/sys/fs/cgroup") / name).read_text().split()
            )
            if quota > 0:
                count = min(count, -(-quota // period))
    return count


def import_openvino() -> Any:
    """The module, which would tell its maker of its import over the network if it found its package for that."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino  # noqa: PLC0415  # imported where a version uses it

    return openvino


def _openvino(graph: Path, precision: str, threads: int, cores: int) -> Engine:
    core = import_openvino().Core()

    def compiled(batch: int, alone: bool) -> Any:
        model = core.read_model(graph)
        model.reshape(
            [batch, *list(model.input().partial_shape)[1:]]
        )  # a tenth faster than with any batch size
        properties = {
            "NUM_STREAMS": 1 if alone else threads,
            "INFERENCE_NUM_THREADS": cores if alone else threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "ENABLE_CPU_PINNING": False,  # the server's own threads work on the same cores
        }
        return core.compile_model(model, "CPU", properties)

    kinds = sorted({(1, cores > 1), (1, False), (BATCH, False)})
    with ThreadPoolExecutor(cores) as pool:
        networks = dict(zip(kinds, pool.map(compiled, *zip(*kinds, strict=True)), strict=True))
    requests = threading.local()  # a request is not safe to share between threads

    def engine(pixels: npt.NDArray[np.uint8], *, alone: bool) -> npt.NDArray[np.float32]:
        if not hasattr(requests, "of"):
            requests.of = {
                kind: network.create_infer_request() for kind, network in networks.items()
            }
        request = requests.of[len(pixels), alone and cores > 1]
        embeddings: npt.NDArray[np.float32] = request.infer(
            [pixels], share_inputs=True, share_outputs=True
        )[0]
        return embeddings

    return engine


def _torch(graph: Path, precision: str, _threads: int, cores: int) -> Engine:
    import torch  # noqa: PLC0415  # imported where a version uses it

    assert precision == "fp32"
    refuse_pickles(graph)
    network = torch.export.load(graph).module()

    def engine(pixels: npt.NDArray[np.uint8], *, alone: bool) -> npt.NDArray[np.float32]:
        before = torch.get_num_threads()  # of the thread that calls, which may have work of its own
        torch.set_num_threads(cores if alone else 1)
        try:
            with torch.inference_mode():
                embeddings: npt.NDArray[np.float32] = network(torch.from_numpy(pixels)).numpy()
        finally:
            torch.set_num_threads(before)
        return embeddings

    return engine


def refuse_pickles(graph: Path) -> None:
    """Raises: EngineError for an exported program whose weights are not raw bytes, but would have to be unpickled."""
    with zipfile.ZipFile(graph) as archive:
        pickled = [
            item.filename
            for item in archive.infolist()
            if ("/sample_inputs/" in item.filename and item.file_size)
            or (
                item.filename.endswith("_config.json")
                and b'"use_pickle": true' in archive.read(item)
            )
        ]
    if pickled:
        raise EngineError(
            f"{graph} holds pickled data ({', '.join(pickled)}); publish it again with npair"
        )
