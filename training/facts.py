"""What a latent pixel shows, as numbers: targets for a head that reads them from the transformer's middle while it trains.

A denoiser learns sooner if its hidden states are told to know what is in the picture (REPA, Yu et al. 2024). There they are held
against a trained vision model; here the renderer knows the truth: which shape and colour is nearest, where, how fast it
moves and where to. The head is dropped after training.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from training.model import SPATIAL, TEMPORAL
from training.render import Drawing
from training.world import BOUNCE_FRAMES, SHAPES, SIZES, SPIN_DEGREES

FACTS = len(SHAPES) + 13


def facts(drawing: Drawing) -> torch.Tensor:
    """About -1 to 1, float32 [clips, FACTS, latent frames, height, width in latent pixels], of the thing nearest to each latent pixel.

    Shape (one-hot), colour, offset, velocity, logarithm of the radius, growth, spin, bounce, nearness, and number of things.
    """
    device = drawing.paths.device
    x, y, vx, vy, bounce, phase, radius, growth, _, spin, *rgb = drawing.paths[..., None].unbind(2)
    # A latent frame stands for four frames; the first for one.
    latent_frames = (drawing.frames - 1) // TEMPORAL + 1
    moment = (TEMPORAL * torch.arange(latent_frames, device=device) - (TEMPORAL - 1) / 2).clamp_min(0)
    swing = phase + math.pi * moment / BOUNCE_FRAMES
    px = x + vx * moment  # [clips, things, latent frames], as all from here
    py = y + vy * moment - bounce * swing.sin().abs()
    vy = vy - bounce * swing.cos() * swing.sin().sign() * math.pi / BOUNCE_FRAMES
    there = (x > -1e5).float()
    columns = (torch.arange(drawing.width // SPATIAL, device=device) + 0.5) * SPATIAL
    rows = (torch.arange(drawing.height // SPATIAL, device=device) + 0.5) * SPATIAL
    across, down = torch.broadcast_tensors(px[..., None, None] - columns, py[..., None, None] - rows[:, None])
    # [clips, latent frames, height, width]: which thing is nearest, by its edge.
    size = radius * (1 + growth * moment)
    far = (across.square() + down.square()).sqrt() - size[..., None, None] + 1e6 * (1 - there[..., None, None])
    nearest = far.argmin(dim=1, keepdim=True)
    unit = min(drawing.width, drawing.height) / 480

    def of_nearest(value: torch.Tensor) -> torch.Tensor:
        """From [clips, things, latent frames or 1] or that of every latent pixel."""
        if value.ndim == 3:
            value = value[..., None, None]
        return value.expand_as(far).gather(1, nearest)[:, 0]

    shapes = functional.one_hot(drawing.shapes, len(SHAPES)).float()
    step = TEMPORAL / SPATIAL
    values = [of_nearest(shapes[..., number, None]) for number in range(len(SHAPES))]
    values += [of_nearest(2 * value - 1) for value in rgb]
    values += [torch.tanh(of_nearest(value) / (4 * SPATIAL)) for value in (across, down)]
    values += [of_nearest(value * step / (0.6 * unit)) for value in (vx, vy)]
    values += [of_nearest((size / (unit * SIZES["medium"])).log() / 0.35)]
    values += [of_nearest(growth / 0.01), of_nearest(spin / math.radians(SPIN_DEGREES[1]))]
    values += [of_nearest((bounce > 0).float())]
    values += [torch.exp(-(of_nearest(far).clamp_min(0) / SPATIAL).square())]
    values += [(there.sum(dim=1)[..., None, None] - 2).expand_as(values[0])]
    return torch.stack(values, dim=1)


class Tap(nn.Module):
    """Stands between two of a transformer's blocks and keeps what passes."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[torch.Tensor] = []

    def take(self) -> torch.Tensor:
        """What passed. It is not kept: a gradient's graph hangs on it."""
        return self._seen.pop()

    def forward(self, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        """`hidden` itself."""
        self._seen = [hidden]
        return hidden


def build_head(width: int, count: int) -> nn.Module:
    """From a token's hidden state to `count` numbers."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, count))
