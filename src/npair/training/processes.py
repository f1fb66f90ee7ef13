"""Training in several processes, one for each GPU or machine, started by torchrun; in one process all of this does nothing.

Each process embeds its own rows of a batch and sees the embeddings of all, so that N pairs have N - 1 negatives however many
processes share them.
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
    """Have glibc keep what a step frees for the next step; without effect under other C libraries.

    By default it returns large blocks to the kernel, which then clears every page of every activation anew: a quarter of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this one's device: its GPU where there is one, else the CPU."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
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


def gather(embeddings: Tensor) -> Tensor:
    """[n, ...] of this process -> [world_size * n, ...] of all, in the order of ranks; gradients reach this process's rows alone.

    Where every process then computes the loss over all rows, ``sum_gradients`` makes each parameter's gradient that of one process
    with all rows: the derivative by a row is taken where that row was embedded.
    """
    if world_size() == 1:
        return embeddings
    rows = [torch.empty_like(embeddings) for _ in range(world_size())]
    dist.all_gather(rows, embeddings.detach().contiguous())
    rows[rank()] = embeddings
    return torch.cat(rows)


def sum_gradients(network: nn.Module) -> None:
    """Add up every parameter's gradient over all processes."""
    if world_size() > 1:
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        totals = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def from_first(values: Tensor) -> Tensor:
    """The first process's values, in every process; [..] of the same shape and dtype in all."""
    if world_size() > 1:
        dist.broadcast(values, 0)
    return values
