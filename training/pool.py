"""Latents made on the device and used several times: encoding a clip costs more than a step of the denoiser on it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from training.data import CAPTIONS, Scenes, Shape, stream
from training.facts import FACTS, facts
from training.model import PROMPT_TOKENS, SPATIAL, Z_DIM
from training.parallel_vae import ParallelVae
from training.render import render
from training.run import autocast
from training.told import MOST_TOLD, TOLD

REFRESH_EVERY = 8
"""Draws between two refreshments: many clips encoded at once cost little more than few."""


@dataclass
class Sample:
    """What a step trains on: normalised latents [batch, channels, frames, height, width] and token ids [batch, tokens]."""

    latents: torch.Tensor
    ids: torch.Tensor
    facts: torch.Tensor
    """As `facts` has them."""
    owners: torch.Tensor
    """int64 [batch, tokens]: the number of the thing that a token speaks of; 0 for none."""
    told: torch.Tensor
    """As `told` has it, [batch, 1 + MOST_TOLD, TOLD]."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of it, in this order."""
        return self.latents, self.ids, self.facts, self.owners, self.told


class Pool:
    """Clips of one shape as latents, with their captions. Some are replaced with new ones all the time.

    `batch` clips are drawn at a time, each about `reuse` times before it is replaced, with another wording, noise and
    timestep. `size` clips are kept, so that those of one batch are not those of the last.
    """

    def __init__(
        self,
        shape: Shape,
        batch: int,
        *,
        vae: ParallelVae,
        atlas: torch.Tensor,
        tokenizer: Any,
        seed: str,
        workers: int,
        reuse: int,
        batches_kept: int = 16,
        piece_pixels: int = 48_000_000,
    ) -> None:
        self.batch = batch
        self._vae, self._atlas = vae, atlas
        config, device = vae.vae.config, atlas.device
        self._mean = torch.tensor(config.latents_mean, device=device).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(config.latents_std, device=device).view(1, -1, 1, 1, 1)
        self._size = batch * batches_kept
        self._fresh = max(1, round(batch * REFRESH_EVERY / reuse))
        # What is drawn and encoded at once: pixels take far more memory than latents.
        self._piece = max(1, piece_pixels // (shape.width * shape.height * shape.frames))
        size = (self._size, Z_DIM, shape.latent_frames, shape.height // SPATIAL, shape.width // SPATIAL)
        self._latents = torch.zeros(
            size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
        self._facts = self._latents.new_zeros(size[0], FACTS, *size[2:])
        self._ids = torch.zeros(self._size, CAPTIONS, PROMPT_TOKENS, dtype=torch.int64, device=device)
        self._owners = torch.zeros_like(self._ids)
        self._told = torch.zeros(self._size, 1 + MOST_TOLD, TOLD, device=device)
        self._dropped_ids = torch.zeros(self._size, PROMPT_TOKENS, dtype=torch.int64, device=device)
        self._scenes: Iterator[Scenes] = stream(shape, self._fresh, tokenizer=tokenizer, seed=seed, workers=workers)
        self._filled = self._next = self._draws = 0

    def draw(self, dropout: float) -> Sample:
        """A batch; a share `dropout` of it with the caption dropped for guidance."""
        if self._draws % REFRESH_EVERY == 0:
            self._refresh()
        self._draws += 1
        while self._filled < min(2 * self.batch, self._size):
            self._refresh()
        device = self._latents.device
        rows = torch.randint(self._filled, (self.batch,), device=device)
        wordings = torch.randint(CAPTIONS, (self.batch,), device=device)
        drop = torch.rand(self.batch, device=device) < dropout
        return Sample(
            self._latents[rows].float(),
            torch.where(drop[:, None], self._dropped_ids[rows], self._ids[rows, wordings]),
            self._facts[rows].float(),
            torch.where(drop[:, None], 0, self._owners[rows, wordings]),
            self._told[rows],
        )

    @torch.no_grad()
    def _refresh(self) -> None:
        """Overwrite the oldest `_fresh` clips with new ones."""
        scenes, device = next(self._scenes), self._latents.device
        rows = (self._next + torch.arange(self._fresh, device=device)) % self._size
        drawing = scenes.drawing.to(device)
        for start in range(0, self._fresh, self._piece):
            with autocast(device):
                pixels = render(drawing[start : start + self._piece], self._atlas)
                mean, _ = self._vae.moments(pixels)
            own = rows[start : start + self._piece]
            self._latents[own] = ((mean - self._mean) / self._std).to(self._latents.dtype)
            self._facts[own] = facts(drawing[start : start + self._piece]).to(self._facts.dtype)
        self._ids[rows] = scenes.ids.to(device, non_blocking=True)
        self._owners[rows] = scenes.owners.to(device, non_blocking=True)
        self._told[rows] = scenes.told.to(device, non_blocking=True)
        self._dropped_ids[rows] = scenes.dropped_ids.to(device, non_blocking=True)
        self._next = (self._next + self._fresh) % self._size
        self._filled = min(self._filled + self._fresh, self._size)
