"""The photos of each training step."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npair.data.dataset import Photos
from npair.data.pixels import Pixels
from npair.networks.network import EmbeddingNetwork
from npair.training.augmentation import augmentation
from npair.training.processes import from_first, world_size
from npair.training.run import RunError, TrainConfig
from npair.training.sampler import Indices, NPairSampler

MINING_PARTS = 4  # passes in which photos for mining are embedded, which bounds memory


class Batches:
    """Draws the photos of each step, augments them and computes their features."""

    def __init__(
        self, config: TrainConfig, photos: Photos, pixels: Pixels, device: torch.device
    ) -> None:
        """photos: the train split. pixels: of these photos and maybe others, larger than the crops.

        Raises: ValueError if there are too few classes or N is too small for the processes.
        """
        self.config, self.photos, self.device = config, photos, device
        self.pixels, self.rows = _on(device, pixels.array), torch.from_numpy(pixels.of(photos))
        self.bf16 = supports_bf16(device)
        self.augment = augmentation(config.augmentation, config.crop_size)
        self.rescale = augmentation("none", config.crop_size)
        self.sampler = NPairSampler(
            photos.fine, config.classes_per_batch, config.seed, multiple_of=world_size()
        )

    @property
    def classes(self) -> int:
        """N, which is lower than was asked for if there are fewer classes."""
        return self.sampler.classes_per_batch

    def refuse_idle_mining(self) -> None:
        """Refuse to mine N classes from no more than N. Raises: RunError."""
        candidates = min(self.config.mine_from, len(self.sampler.members))
        if self.config.mine_from and candidates <= self.classes:
            raise RunError(
                f"--mine-from {self.config.mine_from} mines nothing, since a batch takes"
                f" {self.classes} classes of {candidates}; lower --classes-per-batch, or leave it"
                " out"
            )

    @property
    def per_epoch(self) -> int:
        """The number of batches with as many photos as train has."""
        columns = 1 + self.classes if self.config.loss == "tuplet" else 2
        return max(1, len(self.photos) // (self.classes * columns))

    def draw(self, step: int, network: EmbeddingNetwork) -> Indices:
        """Draw [N, columns]: anchor, positive and, for tuplets, negatives; same in all processes.

        network: embeds the classes to mine from, if classes are mined.
        """
        if self.config.loss == "tuplet":
            return self.sampler.tuplets(step)
        if not self.config.mine_from:
            return self.sampler.pairs(step)
        embed = partial(self._embed_for_mining, network)
        mined = torch.from_numpy(self.sampler.mined_pairs(step, self.config.mine_from, embed))
        # Rounding could make the processes mine different classes.
        drawn: Indices = from_first(mined.to(self.device)).cpu().numpy()
        return drawn

    def features(
        self, network: EmbeddingNetwork, indices: Indices, *, augment: bool = True
    ) -> Tensor:
        """Compute the input of the embedding layer in fp32: photos int64 [n] -> [n, channels]."""
        photos = self.pixels[self.rows[indices]].to(self.device)
        photos = (self.augment if augment else self.rescale)(photos)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            features = network.features(photos)
        return features.float()

    def coarse(self, batch: Indices) -> Tensor:
        """Return the coarse label of each row of a batch, int64 [N]."""
        return torch.from_numpy(self.photos.coarse[batch[:, 0]]).to(self.device)

    @torch.no_grad()
    def _embed_for_mining(
        self, network: EmbeddingNetwork, indices: Indices
    ) -> npt.NDArray[np.float32]:
        network.eval()
        parts = np.array_split(indices, MINING_PARTS)
        features = torch.cat([self.features(network, part, augment=False) for part in parts])
        embeddings = network.embedding(features)
        network.train()
        vectors: npt.NDArray[np.float32] = embeddings.cpu().numpy()
        return vectors


def _on(device: torch.device, pixels: npt.NDArray[np.uint8]) -> Tensor:
    """Return all photos: on a GPU if they leave it room to train, else mapped from disk.

    Reading a step's photos from disk takes longer than a GPU needs for the step.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        photos = torch.from_numpy(pixels)
    if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        return photos.to(device)
    return photos


def supports_bf16(device: torch.device) -> bool:
    """Return whether autocast to bf16 is faster: on GPUs, and on CPUs with instructions for it."""
    capabilities = torch.cpu.get_capabilities()
    cpu = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return device.type == "cuda" or bool(cpu)
