from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from npair.network import EmbeddingNetwork, embed


def test_costs_what_its_docstring_says() -> None:
    network = EmbeddingNetwork().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert network(torch.zeros(1, 160, 160, 3, dtype=torch.uint8)).shape == (1, 128)
    assert round(counter.get_total_flops() / 2 / 1e9, 2) == 0.26  # a multiply-add counts as two
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 1) == 2.8


def test_embed_normalises_and_does_not_depend_on_the_batch() -> None:
    network = EmbeddingNetwork()
    pixels = torch.randint(0, 256, (5, 64, 64, 3), dtype=torch.uint8).numpy()
    together, apart = embed(network, pixels, batch=5), embed(network, pixels, batch=2)
    torch.testing.assert_close(torch.from_numpy(together), torch.from_numpy(apart))
    torch.testing.assert_close(torch.from_numpy(together).norm(dim=1), torch.ones(5))
    assert network.training, "embedding leaves the network in the mode it was in"
