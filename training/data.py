"""Endless batches of scenes, laid out and put into words by worker processes, ready for the device to draw."""

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from training.captions import Wording, dropped, put_into_words
from training.model import PROMPT_TOKENS, TEMPORAL
from training.render import Drawing, drawing_of
from training.told import told
from training.world import KINDS, draw_scene, place

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of worker processes

CAPTIONS = 4
"""Wordings of each scene."""
PICTURE_KINDS = (0.42, 0.16, 0.42)
"""As `KINDS`, of pictures with captions: which words belong together is learned from those of two things and hardly from anything else."""


@dataclass(frozen=True)
class Shape:
    """Size in pixels and number of frames, 4k+1."""

    width: int
    height: int
    frames: int

    @property
    def latent_frames(self) -> int:
        """Frames of its latents."""
        return (self.frames - 1) // TEMPORAL + 1


@dataclass
class Scenes:
    """A batch of scenes of one shape: how to draw them, and what they are called."""

    drawing: Drawing
    ids: torch.Tensor
    """int64 [clips, CAPTIONS, PROMPT_TOKENS], padded with 0."""
    owners: torch.Tensor
    """int64, of the same shape: the number of the thing that a token speaks of, from 1; 0 for none."""
    told: torch.Tensor
    """As `told` has it."""
    dropped_ids: torch.Tensor
    """int64 [clips, PROMPT_TOKENS]: what stands in for a caption that guidance drops."""

    def pin_memory(self) -> "Scenes":
        """As `Drawing.pin_memory`; the DataLoader calls it."""
        tensors = (tensor.pin_memory() for tensor in (self.ids, self.owners, self.told, self.dropped_ids))
        return Scenes(self.drawing.pin_memory(), *tensors)


def draw_batch(rng: random.Random, shape: Shape, size: int, split: str, tokenizer: Any) -> Scenes:
    """`size` scenes of `split` at random. Without a tokenizer there are no captions."""
    kinds = PICTURE_KINDS if shape.frames == 1 and tokenizer is not None else KINDS
    scenes = [
        draw_scene(rng, width=shape.width, height=shape.height, frames=shape.frames, split=split, kinds=kinds)
        for _ in range(size)
    ]
    wordings = [put_into_words(scene, rng) for scene in scenes for _ in range(CAPTIONS)]
    return Scenes(
        drawing_of([place(scene, rng) for scene in scenes]),
        tokenize(tokenizer, [wording.text for wording in wordings]).view(size, CAPTIONS, PROMPT_TOKENS),
        owners(tokenizer, wordings).view(size, CAPTIONS, PROMPT_TOKENS),
        torch.stack([told(scene) for scene in scenes]),
        tokenize(tokenizer, [dropped(scene, rng) for scene in scenes]),
    )


def tokenize(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """int64 [texts, PROMPT_TOKENS], padded with 0 and cut."""
    if tokenizer is None:
        return torch.zeros(len(texts), PROMPT_TOKENS, dtype=torch.int64)
    ids: torch.Tensor = tokenizer(
        texts, padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def owners(tokenizer: Any, wordings: list[Wording]) -> torch.Tensor:
    """int64 [wordings, PROMPT_TOKENS]: the number of the thing that a token speaks of, from 1; 0 for none."""
    result = torch.zeros(len(wordings), PROMPT_TOKENS, dtype=torch.int64)
    if tokenizer is None:
        return result
    texts = [wording.text for wording in wordings]
    encoded = tokenizer(texts, truncation=True, max_length=PROMPT_TOKENS, return_offsets_mapping=True)
    for row, (wording, offsets) in enumerate(zip(wordings, encoded.offset_mapping, strict=True)):
        for number, (start, end) in enumerate(wording.spans, 1):
            for token, (first, last) in enumerate(offsets):
                if first < last and start < last <= end:
                    result[row, token] = number
    return result


class _Stream(IterableDataset):
    def __init__(self, shape: Shape, size: int, tokenizer: Any, seed: str) -> None:
        self._arguments = shape, size, "train", tokenizer
        self._seed = seed

    def __iter__(self) -> Iterator[Scenes]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        if worker is not None:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the training process saves at it; its workers just end
        rng = random.Random(f"{self._seed} {worker.id if worker else 0}")
        while True:
            yield draw_batch(rng, *self._arguments)


def stream(shape: Shape, size: int, *, tokenizer: Any, seed: str, workers: int) -> Iterator[Scenes]:
    """Training batches of `size` scenes for ever. `seed` should name the step it starts from, so that a restart sees others."""
    loader = DataLoader(
        _Stream(shape, size, tokenizer, f"{seed} {shape}"),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
