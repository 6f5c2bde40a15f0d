"""Reads colour, shape, place and motion back from frames, by plain image analysis: no learned model, and no look at the prompt.

Things are saturated and backgrounds are not, so a threshold on chroma finds them. A thing's colour is the nearest of the
world's by its median; its shape is the template that overlaps it best, over all rotations; its motion is what its
centre, area and rotation do from frame to frame.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from training.render import make_atlas
from training.world import BOUNCE_FRAMES, COLOURS, POSITIONS, SHAPES

_CHROMA = 0.27
"""Largest less smallest of red, green and blue (0 to 1), above which a pixel belongs to a thing."""
_SMALLEST = 0.0015
"""Share of the picture below which a patch is noise."""
_GRID = 48
_TURNS = 72
"""Rotations tried: every five degrees."""
_SYMMETRY = {"circle": 0.0, "ring": 0.0, "square": 90.0, "cross": 90.0, "triangle": 120.0, "star": 72.0}
"""Degrees after which a shape looks the same; 360 for the rest, none for the round."""


@dataclass(frozen=True)
class Found:
    """A thing in one frame. Centre as a share of width and height, area as a share of the picture."""

    colour: str
    shape: str
    x: float
    y: float
    area: float

    @property
    def place(self) -> str:
        """The nearest of the world's positions."""
        return min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], (self.x, self.y)))


@dataclass(frozen=True)
class Reading:
    """What a file shows: the things of its first frame, the largest first, and what the largest of a clip does."""

    things: list[Found]
    motion: str | None


class Reader:
    """Holds the templates."""

    def __init__(self) -> None:
        angles = torch.arange(_TURNS) * 2 * math.pi / _TURNS
        axis = torch.linspace(-1.8, 1.8, 96)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        cosine, sine = angles.cos().view(-1, 1, 1), angles.sin().view(-1, 1, 1)
        grid = torch.stack([cosine * x + sine * y, cosine * y - sine * x], dim=-1) / 2
        masks = [
            functional.grid_sample(field.expand(_TURNS, 1, -1, -1), grid, align_corners=True)[:, 0] < 0
            for field in make_atlas()
        ]
        normal = [_normalized(mask) for turns in masks for mask in turns]
        self._templates = torch.stack(normal).flatten(1)

    def read(self, frames: np.ndarray) -> "Reading":
        """What a file shows: uint8 RGB [frames, height, width, 3]."""
        return Reading(self.things(frames[0]), self.motion(frames) if len(frames) > 1 else None)

    def things(self, frame: np.ndarray) -> list[Found]:
        """Everything in `frame` (uint8 RGB [height, width, 3]), the largest first."""
        pixels, patches = _pixels_and_patches(frame)
        height, width = pixels.shape[:2]
        found = []
        for mask in patches:
            best = int(self._overlaps(mask).argmax())
            x, y = _centre(mask)
            colour = _colour(pixels[mask].median(dim=0).values)
            found.append(Found(colour, SHAPES[best // _TURNS], x / width, y / height, float(mask.float().mean())))
        return found

    def motion(self, frames: np.ndarray) -> str | None:
        """What the largest thing of a clip does from frame to frame: one of the world's motions, or None."""
        masks = [patches[0] for frame in frames if (patches := _pixels_and_patches(frame)[1])]
        if len(masks) < 3:
            return None
        travelled = _travelled(masks, min(frames.shape[1:3]) / 480)
        if travelled is not None:
            return travelled
        overlaps = torch.stack([self._overlaps(mask) for mask in masks]).view(len(masks), len(SHAPES), _TURNS)
        shape = int(overlaps.amax(2).sum(0).argmax())
        angles = overlaps[:, shape].argmax(1).numpy() * 360 / _TURNS
        last, turned = len(masks) - 1, _turned(angles, _SYMMETRY.get(SHAPES[shape], 360.0))
        if abs(turned) > 2.0 * last:
            return "clockwise" if turned > 0 else "counterclockwise"
        growth = math.log(int(masks[-1].sum()) / int(masks[0].sum())) / last
        return "grow" if growth > 0.010 else "shrink" if growth < -0.007 else None

    def _overlaps(self, mask: torch.Tensor) -> torch.Tensor:
        """Intersection over union with every template."""
        own = _normalized(mask).flatten()
        both = self._templates @ own
        return both / (self._templates.sum(1) + own.sum() - both)


def _travelled(masks: list[torch.Tensor], unit: float) -> str | None:
    """A direction or `bounce`, if that is what the centre does. At least a third of the world's least speed is asked."""
    x, y = (np.array(values) / unit for values in zip(*map(_centre, masks), strict=True))
    dx, dy, last = x[-1] - x[0], y[-1] - y[0], len(masks) - 1
    # What a bounce goes up and comes down again, over and above what it gains.
    turning = np.ptp(y) - abs(dy)
    if turning > 25 * min(1.0, last / BOUNCE_FRAMES) and np.ptp(y) > 2 * np.ptp(x):
        return "bounce"
    if max(abs(dx), abs(dy)) < 1.4 * last:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _centre(mask: torch.Tensor) -> tuple[float, float]:
    """Pixels from the left and from the top."""
    rows, columns = mask.nonzero(as_tuple=True)
    return float(columns.float().mean()) + 0.5, float(rows.float().mean()) + 0.5


def _normalized(mask: torch.Tensor) -> torch.Tensor:
    """A mask moved to its centre and scaled to one area: float [48, 48], 0 to 1."""
    rows, columns = (index.float() for index in mask.nonzero(as_tuple=True))
    height, width = mask.shape
    side = 3.4 * math.sqrt(float(mask.sum()) / math.pi)
    axis = (torch.arange(_GRID) + 0.5) / _GRID * side - side / 2
    xs, ys = (columns.mean() + axis + 0.5) * 2 / width - 1, (rows.mean() + axis + 0.5) * 2 / height - 1
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None]
    return functional.grid_sample(mask.float()[None, None], grid, align_corners=False)[0, 0]


def _pixels_and_patches(frame: np.ndarray) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """RGB of 0 to 1, and the connected saturated parts but for specks, the largest first.

    Labels spread on a quarter of the resolution until they stand.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).float() / 255
    mask = pixels.amax(-1) - pixels.amin(-1) > _CHROMA
    small = functional.max_pool2d(mask.float()[None, None], 4, ceil_mode=True)[0, 0] > 0
    labels = torch.where(small, torch.arange(1, small.numel() + 1).view_as(small), 0).float()
    while True:
        spread = functional.max_pool2d(labels[None, None], 3, stride=1, padding=1)[0, 0] * small
        if torch.equal(spread, labels):
            break
        labels = spread
    full = labels.repeat_interleave(4, 0).repeat_interleave(4, 1)[: mask.shape[0], : mask.shape[1]] * mask
    names, counts = full[full > 0].unique(return_counts=True)
    order = counts.argsort(descending=True)
    return pixels, [full == names[i] for i in order if counts[i] > _SMALLEST * mask.numel()]


def _colour(rgb: torch.Tensor) -> str:
    """The nearest colour of the world, light and shade set aside."""

    def pure(values: torch.Tensor) -> torch.Tensor:
        return values / values.amax().clamp_min(1e-3)

    return min(COLOURS, key=lambda name: float((pure(torch.tensor(COLOURS[name])) - pure(rgb)).norm()))


def _turned(angles: np.ndarray, symmetry: float) -> float:
    """Degrees turned in all, clockwise: the sum of steps, each the smallest that the symmetry allows."""
    if symmetry == 0.0:
        return 0.0
    steps = (np.diff(angles) + symmetry / 2) % symmetry - symmetry / 2
    return float(steps.sum())
