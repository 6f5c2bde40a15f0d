"""Clips for `benchmarks.stitch`: synthetic, but as hard to encode as a camera's. Smooth textures that pan and zoom over
each other, detail at all sizes, and mild noise that differs in every frame."""

from pathlib import Path

import numpy as np
from PIL import Image

NOISE_LEVELS = 1.5
"""Standard deviation of the noise, in levels of 255."""
MARGIN = 1.6
"""How much wider than the frame a texture is: room to pan."""


def write_clips(folder: Path, count: int, *, frames: int, width: int, height: int) -> None:
    """Write `count` clips, uint8 RGB [frames, height, width, 3], one after the other as `000.npy` and so on."""
    for index in range(count):
        np.save(clip_path(folder, index), clip(index, frames, width, height))


def clip_path(folder: Path, index: int) -> Path:
    """Where clip number `index` lies."""
    return folder / f"{index:03}.npy"


def clip(seed: int, frames: int, width: int, height: int) -> np.ndarray:
    """One clip, uint8 RGB [frames, height, width, 3]; the same for the same seed."""
    rng = np.random.default_rng(seed)
    back, front = (_texture(rng, int(width * MARGIN), int(height * MARGIN)) for _ in range(2))
    speeds = rng.uniform(-1.5, 1.5, (2, 2)) * width / 640  # pixels a frame
    clip = np.empty((frames, height, width, 3), np.uint8)
    for index in range(frames):
        mixed = 0.6 * _seen(back, speeds[0] * index, 1 + 0.001 * index, width, height)
        mixed += 0.4 * _seen(front, speeds[1] * index, 1 - 0.001 * index, width, height)
        mixed += NOISE_LEVELS * rng.standard_normal(mixed.shape, np.float32)
        clip[index] = np.clip(mixed + 0.5, 0, 255)
    return clip


def _texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise at every size from a quarter of the picture to a few pixels, weaker the finer it is, as in photographs; steep
    where it changes sign, so that there are edges."""
    total = np.zeros((height, width, 3), np.float32)
    for cells in (4, 8, 16, 32, 64, 128, 256):
        cell_grid = (cells * height // width + 1, cells)
        grid = 0.8 * rng.uniform(-1, 1, (*cell_grid, 1)) + 0.35 * rng.uniform(
            -1, 1, (*cell_grid, 3)
        )  # more grey than not
        for channel in range(3):
            layer = Image.fromarray(grid[..., channel].astype(np.float32))
            total[..., channel] += (
                np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC)) * (4 / cells) ** 0.6
            )
    return Image.fromarray(np.clip(128 + 45 * total + 35 * np.tanh(6 * total), 0, 255).astype(np.uint8))


def _seen(texture: Image.Image, shift: np.ndarray, zoom: float, width: int, height: int) -> np.ndarray:
    x, y = (np.array(texture.size) - (width * zoom, height * zoom)) / 2 + shift
    seen = texture.transform(
        (width, height), Image.Transform.AFFINE, (zoom, 0, x, 0, zoom, y), Image.Resampling.BILINEAR
    )
    return np.asarray(seen, np.float32)
