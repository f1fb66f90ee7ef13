"""Compare training in two processes, started by torchrun, with training in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.architectures import ARCHITECTURES, checkpoint

# Each process embeds its share of the same 6 pairs or tuplets; rank 0 saves the gradients.
GRADIENTS = """
import sys, torch
from torch import nn
from npair.training.loss import CosineNPairLoss, NPairLoss, TupletLoss
from npair.training.processes import gather, process_group, rank, sum_gradients, world_size

found = {}
with process_group():
    for loss_of in (
        NPairLoss(norm_penalty=0.01),
        CosineNPairLoss(temperature=0.1),
        TupletLoss(norm_penalty=0.01),
    ):
        columns = 7 if isinstance(loss_of, TupletLoss) else 2
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(10, 32), nn.GELU(), nn.Linear(32, 8))
        batch = torch.randn(6, columns, 10)
        embeddings = gather(network(batch[rank() :: world_size()]))
        anchors, positives, negatives = embeddings[:, 0], embeddings[:, 1], embeddings[:, 2:]
        loss = loss_of(anchors, positives, *[negatives] if columns > 2 else [])
        loss.backward()
        sum_gradients(network)
        gradients = [parameter.grad for parameter in network.parameters()]
        found[type(loss_of).__name__] = [loss.detach(), *gradients]
    if rank() == 0:
        torch.save({"processes": world_size(), "found": found}, sys.argv[1])
"""


def in_processes(count: int, *arguments: str | Path) -> None:
    # Without --, torchrun would parse --run itself.
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "--"]
        if count > 1
        else []
    )
    command = [sys.executable, *launcher, *map(str, arguments)]
    result = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    for count in (1, 2):
        in_processes(count, tmp_path / "gradients.py", tmp_path / f"{count}.pt")
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert all(tensors[1].abs().max() > 1e-4 for tensors in one["found"].values()), (
        "there are gradients to compare"
    )
    torch.testing.assert_close(two["found"], one["found"])


def test_training_in_two_processes_goes_the_way_of_one(dataset: Path, tmp_path: Path) -> None:
    """Use no random augmentation and no batch normalisation, which CPUs do not synchronise."""
    network = checkpoint(tmp_path / "convnextv2", ARCHITECTURES["convnextv2"])
    for count in (1, 2):
        options = (
            "--network",
            network,
            "--size=64",
            "--crop-size=64",
            "--classes-per-batch=6",
            "--epochs=3",
            "--learning-rate=1e-3",
        )
        run = tmp_path / str(count)
        in_processes(
            count,
            Path(sys.executable).with_name("npair"),
            "train",
            "--data",
            dataset,
            "--run",
            run,
            "--augmentation=none",
            *options,
        )
    one, two = (
        [json.loads(line) for line in (tmp_path / str(count) / "log.jsonl").open()]
        for count in (1, 2)
    )
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-2)
    assert one[0]["loss"] != pytest.approx(one[-1]["loss"], rel=2e-2), "and it is a way to go"
    assert (tmp_path / "2" / "report.html").exists()
