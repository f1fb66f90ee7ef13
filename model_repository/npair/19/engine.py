"""The engines: libraries that compute a version's graph at some precision.

Graphs stop before the normalisation, which would reorder neighbours if rounded to bf16 or int8.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

BATCH = 4  # photos per call of one thread; larger batches are no faster

# A precision needs any one of these instructions (named as in /proc/cpuinfo) to be fast, and as
# exact as when it was measured.
INSTRUCTIONS: dict[str, frozenset[str]] = {
    "fp32": frozenset(),
    "bf16": frozenset({"avx512_bf16", "amx_bf16"}),
    "int8": frozenset({"avx2"}),
}


class EngineError(Exception):
    """An engine that cannot run on this machine; the message says why."""


class Graph(Protocol):
    """A loaded graph. Several threads may call it at once."""

    def __call__(
        self, pixels: Sequence[npt.NDArray[np.uint8]], *, all_cores: bool
    ) -> npt.NDArray[np.float32]:
        """Compute N of uint8 [size, size, 3] -> float32 [N, D], not normalised. N is 1 or BATCH.

        The result is valid until this thread's next call.
        all_cores: use all cores for this one photo, as no other call is running; else one core.
        """


def load_graph(library: str, graph: Path, precision: str, *, threads: int, cores: int) -> Graph:
    """Load a graph to be called by ``threads`` at once, or by one that has all ``cores``.

    Raises: EngineError if this machine lacks the library, the instructions or a kernel for it.
    """
    needed = INSTRUCTIONS[precision]
    if needed and not needed & cpu_flags():
        raise EngineError(f"this CPU has none of {', '.join(sorted(needed))}")
    try:
        return {"openvino": _openvino, "torch": _torch}[library](graph, precision, threads, cores)
    except ImportError as error:
        raise EngineError(f"{library} is not installed ({error})") from error
    except RuntimeError as error:  # both libraries raise it if the CPU lacks a kernel
        reason = str(error).splitlines()[-1]
        raise EngineError(f"{library} cannot run {graph.name} on this CPU: {reason}") from error


def cpu_info(key: str) -> str:
    """Return the first CPU's value of this key in /proc/cpuinfo, empty if there is none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def cpu_flags() -> frozenset[str]:
    """Return the CPU's instruction sets, named as in /proc/cpuinfo."""
    return frozenset(cpu_info("flags").split())


def cores() -> int:
    """Count the physical cores that CPU affinity and cgroup quotas allow this process."""
    cpus = os.sched_getaffinity(0)
    topology = Path("/sys/devices/system/cpu")
    siblings = [topology / f"cpu{cpu}/topology/thread_siblings_list" for cpu in cpus]
    try:
        count = len({path.read_text(encoding="ascii") for path in siblings})
    except OSError:
        count = len(cpus)
    versions = ["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]  # of cgroups, 2 and 1
    for files in versions:
        with contextlib.suppress(OSError, ValueError):
            texts = [(Path("/sys/fs/cgroup") / name).read_text() for name in files]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0:
                count = min(count, -(-quota // period))
    return count


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which sends an event at import."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino  # noqa: PLC0415  # not every machine has it

    return openvino


def _openvino(graph: Path, precision: str, threads: int, cores: int) -> Graph:
    core = import_openvino().Core()

    def compiled(batch: int, all_cores: bool) -> Any:
        model = core.read_model(graph)
        # A fixed batch size is a tenth faster.
        model.reshape([batch, *list(model.input().partial_shape)[1:]])
        properties = {
            "NUM_STREAMS": 1 if all_cores else threads,
            "INFERENCE_NUM_THREADS": cores if all_cores else threads,
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "ENABLE_CPU_PINNING": False,  # the server's threads share the cores
        }
        return core.compile_model(model, "CPU", properties)

    kinds = sorted({(1, cores > 1), (1, False), (BATCH, False)})
    with ThreadPoolExecutor(cores) as pool:
        networks = dict(zip(kinds, pool.map(compiled, *zip(*kinds, strict=True)), strict=True))
    requests = threading.local()  # inference requests are not thread-safe

    def compute(
        pixels: Sequence[npt.NDArray[np.uint8]], *, all_cores: bool
    ) -> npt.NDArray[np.float32]:
        if not hasattr(requests, "of"):
            requests.of = {kind: each.create_infer_request() for kind, each in networks.items()}
        request = requests.of[len(pixels), all_cores and cores > 1]
        np.stack(pixels, out=request.get_input_tensor().data)
        request.infer(share_outputs=True)
        embeddings: npt.NDArray[np.float32] = request.get_output_tensor().data
        return embeddings

    return compute


def _torch(graph: Path, precision: str, _threads: int, cores: int) -> Graph:
    import torch  # noqa: PLC0415  # not every machine has it

    assert precision == "fp32"
    refuse_pickles(graph)
    network = torch.export.load(graph).module()

    def compute(
        pixels: Sequence[npt.NDArray[np.uint8]], *, all_cores: bool
    ) -> npt.NDArray[np.float32]:
        batch = torch.from_numpy(np.stack(pixels))
        before = torch.get_num_threads()  # a setting of the calling thread
        torch.set_num_threads(cores if all_cores else 1)
        try:
            with torch.inference_mode():
                embeddings: npt.NDArray[np.float32] = network(batch).numpy()
        finally:
            torch.set_num_threads(before)
        return embeddings

    return compute


def refuse_pickles(graph: Path) -> None:
    """Raise EngineError if an exported program holds pickled data instead of raw bytes."""
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
        names = ", ".join(pickled)
        raise EngineError(f"{graph} holds pickled data ({names}); publish it again with npair")
