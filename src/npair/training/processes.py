"""Training in several processes, one per GPU or machine, started by torchrun.

Each process embeds its own rows of a batch and gathers the embeddings of all, so N pairs have
N - 1 negatives for any number of processes. In one process these functions do nothing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of malloc.h


def keep_freed_memory() -> None:
    """Make glibc reuse the memory that a step frees; do nothing under other C libraries.

    By default it returns large blocks to the kernel, which clears every page before it hands it
    out again: a quarter of a step's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in (
            (M_MMAP_MAX, 0),
            (M_TRIM_THRESHOLD, -1),
            (M_ARENA_MAX, 1),
        ):
            mallopt(parameter, value)


def rank() -> int:
    """Return this process's number, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join torchrun's processes, if it started this one.

    Yields: this process's device: its GPU, or the CPU if there is none.
    """
    cuda = torch.cuda.is_available()
    index = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", index) if cuda else torch.device("cpu")
    if "RANK" not in os.environ:
        yield device
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes by rank: [n, ...] -> [world_size * n, ...].

    Gradients flow only into this process's rows. If every process computes the loss of all rows,
    each row's gradient is taken where the row was embedded, and ``sum_gradients`` then gives each
    parameter the gradient that one process with all rows would compute.
    """
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[rank()] = rows
    return torch.cat(parts)


def sum_gradients(network: nn.Module) -> None:
    """Replace every parameter's gradient by its sum over all processes."""
    if world_size() > 1:
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        totals = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def from_first(values: Tensor) -> Tensor:
    """Return the first process's values in every process; shapes and dtypes must agree."""
    if world_size() > 1:
        dist.broadcast(values, 0)
    return values
