"""Draws layouts, many at once, on any device: signed distance fields looked up in an atlas, so edges are anti-aliased."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from training.world import BOUNCE_FRAMES, MOST_THINGS, SHAPES, Layout, Path, Scene

_EXTENT = 2.0
"""The atlas covers -2 to 2 radii."""
_RESOLUTION = 257
_QUARTER_TURNS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))
"""Cosine and sine."""
_OUTLINE, _BLUR = 7.0, 26.0
"""Units."""
_GLOW_REACH = 0.75
"""Radii; distances are known that far from every shape."""
_NO_THING = (-1e6, 0.0, 0.0, 0.0, 0.0, 0.0, 1e3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""A path far outside, for the second and third things that a layout lacks."""


@dataclass
class Drawing:
    """Layouts of one size and number of frames as tensors, ready to be drawn; one row for each."""

    width: int
    height: int
    frames: int
    shapes: torch.Tensor
    """int64 [clips, things]."""
    paths: torch.Tensor
    """float32 [clips, things, 13]: x, y, vx, vy, bounce, phase, radius, growth, angle, spin, red, green, blue (`Path`)."""
    looks: torch.Tensor
    """float32 [clips, 10]: background colour, share of gradient, of checks, rim, blur px, outline px, glow, light."""

    def to(self, device: torch.device) -> "Drawing":
        """The same on `device`."""
        tensors = (tensor.to(device, non_blocking=True) for tensor in (self.shapes, self.paths, self.looks))
        return Drawing(self.width, self.height, self.frames, *tensors)

    def pin_memory(self) -> "Drawing":
        """The same in memory that a GPU copies from while the host goes on."""
        return Drawing(
            self.width, self.height, self.frames, *(t.pin_memory() for t in (self.shapes, self.paths, self.looks))
        )

    def __getitem__(self, rows: slice) -> "Drawing":
        return replace(self, shapes=self.shapes[rows], paths=self.paths[rows], looks=self.looks[rows])

    def __len__(self) -> int:
        return len(self.shapes)


def drawing_of(layouts: Sequence[Layout]) -> Drawing:
    """`layouts`, which share size and frames, as tensors."""
    scene = layouts[0].scene
    rows = [[_numbers(path) for path in layout.paths] for layout in layouts]
    shapes = [[SHAPES.index(path.thing.shape) for path in layout.paths] for layout in layouts]
    return Drawing(
        scene.width,
        scene.height,
        scene.frames,
        torch.tensor([(row + [0] * MOST_THINGS)[:MOST_THINGS] for row in shapes]),
        torch.tensor([(row + [_NO_THING] * MOST_THINGS)[:MOST_THINGS] for row in rows]),
        torch.tensor([_looks(layout.scene) for layout in layouts]),
    )


def render(drawing: Drawing, atlas: torch.Tensor, window: tuple[int, int, int, int] | None = None) -> torch.Tensor:
    """[clips, 3, frames, height, width] of -1 to 1, float32, on the atlas's device, where `drawing` must be.

    `window` is left, top, width, height of the part to draw, in pixels.
    """
    device, clips, frames = atlas.device, len(drawing), drawing.frames
    unit = min(drawing.width, drawing.height) / 480
    left, top, width, height = window or (0, 0, drawing.width, drawing.height)
    xs = (left + 0.5 + torch.arange(width, device=device)).view(1, 1, 1, width)
    ys = (top + 0.5 + torch.arange(height, device=device)).view(1, 1, height, 1)
    moment = torch.arange(frames, device=device, dtype=torch.float32)
    *base, ramp, checks, rim, blur, outline, glow, light = drawing.looks.view(clips, -1, 1, 1, 1, 1).unbind(1)
    image = torch.cat(base, dim=1) + ramp * (0.25 + 0.6 * ys / drawing.height)
    image = image + checks * (0.62 + 0.24 * ((xs // (80 * unit) + ys // (80 * unit)) % 2))
    image = image.expand(clips, 3, frames, height, width)
    for number in range(MOST_THINGS):
        x, y, vx, vy, bounce, phase, radius, growth, angle, spin, *rgb = (
            drawing.paths[:, number].view(clips, 13, 1).unbind(1)
        )
        x = x + vx * moment
        y = y + vy * moment - bounce * torch.sin(phase + math.pi * moment / BOUNCE_FRAMES).abs()
        radius = (radius * (1 + growth * moment))[..., None, None]
        angle = (angle + spin * moment)[..., None, None]
        across, down = (xs - x[..., None, None]) / radius, (ys - y[..., None, None]) / radius
        cosine, sine = torch.cos(angle), torch.sin(angle)
        turned = torch.stack([cosine * across + sine * down, cosine * down - sine * across], dim=-1) / _EXTENT
        fields = atlas[drawing.shapes[:, number]]
        distance = functional.grid_sample(fields, turned.flatten(1, 2), padding_mode="border", align_corners=True)
        distance = (distance.view(clips, frames, height, width) * radius)[:, None]
        colour = torch.stack(rgb, dim=1).view(clips, 3, 1, 1, 1)
        lit = light * (-(across + down) / 2).clamp(-1, 1)[:, None]
        body = torch.where(lit > 0, colour + (1 - colour) * lit, colour * (1 + lit))
        halo = glow * (1 - distance.clamp_min(0) / (_GLOW_REACH * radius[:, None])).clamp_min(0).square()
        image = torch.lerp(image, colour.expand_as(image), halo.expand_as(image))
        inside = torch.where(blur > 0, torch.sigmoid(-4 * distance / (blur + 1)), (0.5 - distance).clamp(0, 1))
        core = torch.where(outline > 0, (0.5 - distance - outline).clamp(0, 1), 1.0)
        image = torch.lerp(image, torch.lerp(rim.expand_as(body), body, core.expand_as(body)), inside.expand_as(image))
    return image * 2 - 1


def make_atlas(device: torch.device | str = "cpu") -> torch.Tensor:
    """Signed distance of every shape, in radii, negative inside: [shapes, 1, 257, 257], covering -2 to 2 radii."""
    axis = torch.linspace(-_EXTENT, _EXTENT, _RESOLUTION)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 2)
    fields = [_distance(points, contours(shape)) for shape in SHAPES]
    return torch.stack(fields).view(len(SHAPES), 1, _RESOLUTION, _RESOLUTION).to(device)


def contours(shape: str) -> list[torch.Tensor]:
    """The closed outlines of a shape, each [points, 2] in radii, y down; what an odd number of them surrounds is inside."""
    turn = torch.linspace(0, 2 * math.pi, 97)[:-1]
    circle = torch.stack([turn.sin(), -turn.cos()], dim=1)

    def corners(angles_and_radii: list[tuple[float, float]]) -> torch.Tensor:
        return torch.tensor(
            [(r * math.sin(math.radians(a)), -r * math.cos(math.radians(a))) for a, r in angles_and_radii]
        )

    heart_height = 13 * turn.cos() - 5 * (2 * turn).cos() - 2 * (3 * turn).cos() - (4 * turn).cos()
    a, b = 0.33, 1.0
    quarter = torch.tensor([(-a, -b), (a, -b), (a, -a)])
    outlines = {
        "circle": [circle],
        "ring": [circle, 0.55 * circle],
        "square": [corners([(angle, 1.16) for angle in (45, 135, 225, 315)])],
        "triangle": [corners([(angle, 1.2) for angle in (0, 120, 240)]) + torch.tensor([0.0, 0.15])],
        "star": [corners([(36 * k, 0.48 if k % 2 else 1.15) for k in range(10)])],
        "cross": [torch.cat([quarter @ torch.tensor([[c, s], [-s, c]]) for c, s in _QUARTER_TURNS])],
        # The heart curve: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t.
        "heart": [torch.stack([16 * turn.sin() ** 3, -heart_height - 2.5], dim=1) / 16],
        "moon": [_moon(shift=0.5, bite=0.8) + torch.tensor([0.2, 0.0])],
    }
    return outlines[shape]


def _moon(*, shift: float, bite: float) -> torch.Tensor:
    """A circle less one of radius `bite` that is `shift` to the right: two arcs between the points where they meet."""
    meet = (1 + shift**2 - bite**2) / (2 * shift)
    outer_end = math.acos(meet)
    inner_end = math.atan2(math.sin(outer_end), meet - shift)
    outer = torch.linspace(outer_end, 2 * math.pi - outer_end, 72)
    inner = torch.linspace(2 * math.pi - inner_end, inner_end, 48)[1:-1]
    xs, ys = torch.cat([outer.cos(), shift + bite * inner.cos()]), torch.cat([outer.sin(), bite * inner.sin()])
    return torch.stack([xs, ys], dim=1)


def _distance(points: torch.Tensor, outlines: list[torch.Tensor]) -> torch.Tensor:
    """Signed distance of `points` [n, 2] from closed polygons: to the nearest edge, inside by the even-odd rule."""
    nearest = torch.full((len(points),), torch.inf)
    inside = torch.zeros(len(points), dtype=torch.bool)
    for outline in outlines:
        for start, end in zip(outline, outline.roll(-1, 0), strict=True):
            edge, offset = end - start, points - start
            along = ((offset @ edge) / (edge @ edge)).clamp(0, 1)
            nearest = torch.minimum(nearest, (offset - along[:, None] * edge).norm(dim=1))
            spans = (start[1] > points[:, 1]) != (end[1] > points[:, 1])
            if edge[1] != 0:
                inside ^= spans & (points[:, 0] < start[0] + offset[:, 1] / edge[1] * edge[0])
    return torch.where(inside, -nearest, nearest)


def _numbers(p: Path) -> tuple[float, ...]:
    return (p.x, p.y, p.vx, p.vy, p.bounce, p.phase, p.radius, p.growth, p.angle, p.spin, *p.rgb)


def _looks(scene: Scene) -> tuple[float, ...]:
    """A row of `Drawing.looks`."""
    plain = {
        "white": (0.96, 0.96, 0.96),
        "grey": (0.55, 0.55, 0.55),
        "black": (0.04, 0.04, 0.04),
        "cream": (0.95, 0.91, 0.82),
    }
    style, background = scene.style, scene.background
    return (
        *plain.get(background, (0.0, 0.0, 0.0)),
        float(background == "gradient"),
        float(background == "checkered"),
        float(background == "black"),
        _BLUR * scene.unit * (style == "blurry"),
        _OUTLINE * scene.unit * (style == "outlined"),
        0.75 * (style == "glowing"),
        0.5 * (style == "shaded"),
    )
