"""The world of wan-shapes: what its pictures and clips can show, as data, and how such data is drawn at random.

A `Scene` says what a caption can say. A `Layout` says where every thing is in every frame, which captions leave open; it
follows from a scene and a random generator. `render.py` draws layouts; `captions.py` puts scenes into words.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.52, 0.05),
    "yellow": (0.97, 0.86, 0.10),
    "green": (0.12, 0.65, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.12, 0.25, 0.88),
    "purple": (0.50, 0.15, 0.75),
    "pink": (0.98, 0.45, 0.70),
}
"""RGB, 0 to 1. Things are saturated and backgrounds are not, so that plain image analysis can tell them apart."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
ROUND = ("circle", "ring")
"""Shapes whose rotation nobody sees."""

SIZES: dict[str, float] = {"small": 54.0, "medium": 76.0, "large": 104.0}
"""Radius in units. A unit is 1/480 of a picture's shorter side: a pixel at the service's sizes."""

POSITIONS: dict[str, tuple[float, float]] = {
    "left": (0.22, 0.5),
    "right": (0.78, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
    "centre": (0.5, 0.5),
    "top left": (0.22, 0.25),
    "top right": (0.78, 0.25),
    "bottom left": (0.22, 0.75),
    "bottom right": (0.78, 0.75),
}
"""Centre as a share of width and height."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "bounce", "clockwise", "counterclockwise", "grow", "shrink")
SPEED = (4.2, 5.4)
"""Units a frame of a thing that moves: about 77 pixels a second at 16 fps, and two latent pixels in a clip of 17 frames."""
SPIN_DEGREES = (4.0, 5.0)
"""Degrees a frame."""
BOUNCE_FRAMES = 16
"""From ground to ground."""
BOUNCE_HEIGHT = 0.18
"""Of the picture's height: what leaps higher in so few frames is too fast for the VAE."""

BACKGROUNDS = ("white", "grey", "black", "cream", "gradient", "checkered")
STYLES = ("plain", "shaded", "outlined", "glowing", "blurry")
RELATIONS = ("left of", "above")
KINDS = (0.66, 0.16, 0.18)
"""Shares drawn of one thing, of two or three alike, and of two different things. Of the last fewer remain: both must be of the split."""
MOST_THINGS = 3
"""In one scene."""
HELD_OUT_PAIRS = (("purple", "heart"), ("cyan", "star"), ("orange", "moon"), ("pink", "cross"))
"""Colour and shape that never meet in training."""


@dataclass(frozen=True)
class Thing:
    """One kind of thing. `position` is None where nothing is said of it, `motion` where it stands still."""

    shape: str
    colour: str
    size: str = "medium"
    position: str | None = None
    motion: str | None = None

    @property
    def key(self) -> str:
        """The combination by which training and test are kept apart."""
        return f"{self.colour} {self.shape} {self.motion or self.position or 'anywhere'}"


@dataclass(frozen=True)
class Scene:
    """What a picture (`frames` 1) or clip shows: one thing `count` times, or two things, the first `relation` the second."""

    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None
    background: str = "white"
    style: str = "plain"
    width: int = 640
    height: int = 480
    frames: int = 1

    @property
    def unit(self) -> float:
        """Pixels of one unit of length."""
        return min(self.width, self.height) / 480

    @property
    def each(self) -> tuple[Thing, ...]:
        """Every thing to draw, those that are there more than once repeated."""
        return self.things * self.count


def split_of(thing: Thing) -> str:
    """`train`, `tune` or `test`: fixed for ever by a hash of the combination (1/8 test, 1/16 tune) and `HELD_OUT_PAIRS`."""
    if (thing.colour, thing.shape) in HELD_OUT_PAIRS:
        return "test"
    bucket = hashlib.sha256(thing.key.encode()).digest()[0] % 16
    return "test" if bucket < 2 else "tune" if bucket == 2 else "train"


def scene_split(scene: Scene) -> str:
    """`train` only if every thing is; else `test` if any is; else `tune`."""
    splits = {split_of(thing) for thing in scene.things}
    return "test" if "test" in splits else "tune" if "tune" in splits else "train"


def draw_scene(
    rng: random.Random,
    *,
    width: int,
    height: int,
    frames: int,
    split: str = "train",
    kinds: tuple[float, float, float] = KINDS,
) -> Scene:
    """A scene of `split` at random."""
    while True:
        scene = _draw(rng, width, height, frames, kinds)
        if scene_split(scene) == split:
            return scene


def _draw(rng: random.Random, width: int, height: int, frames: int, kinds: tuple[float, float, float]) -> Scene:
    kind = rng.choices(("one", "same", "two"), kinds)[0]
    first = draw_thing(rng, moving=frames > 1)
    things: tuple[Thing, ...] = (first,)
    count, relation = 1, None
    if kind == "same":
        things, count = (replace(first, position=None),), rng.choice((2, 3))
    elif kind == "two":
        other = draw_thing(rng, moving=frames > 1)
        # One kind of motion for both keeps their lanes apart; the directions are their own.
        motion = first.motion
        if motion in DIRECTIONS and rng.random() < 0.5:
            motion = {"left": "right", "right": "left", "up": "down", "down": "up"}[motion]
        if motion in ("clockwise", "counterclockwise") and other.shape in ROUND:
            other = replace(other, shape="square")
        if other.colour == first.colour:
            other = replace(other, colour=rng.choice([colour for colour in COLOURS if colour != first.colour]))
        things = (replace(first, position=None), replace(other, position=None, motion=motion))
        relation = rng.choice((None, *RELATIONS)) if frames == 1 else None
    return Scene(
        things,
        count,
        relation,
        rng.choice(BACKGROUNDS),
        rng.choices(STYLES, (0.6, 0.1, 0.1, 0.1, 0.1))[0],
        width,
        height,
        frames,
    )


def draw_thing(rng: random.Random, *, moving: bool) -> Thing:
    """One thing at random; `moving` ones move in a way that can be seen of their shape."""
    shape = rng.choice(SHAPES)
    size = rng.choices(tuple(SIZES), (0.25, 0.5, 0.25))[0]
    colour = rng.choice(tuple(COLOURS))
    if not moving:
        return Thing(shape, colour, size, position=rng.choice((None, *POSITIONS)))
    if rng.random() < 0.55:
        motion = rng.choice(tuple(DIRECTIONS))
    else:
        motions = [m for m in MOTIONS if m not in DIRECTIONS]
        motion = rng.choice([m for m in motions if shape not in ROUND or "clockwise" not in m])
    position = rng.choice((None, *POSITIONS)) if motion not in DIRECTIONS and motion != "bounce" else None
    return Thing(shape, colour, size, position, motion)


@dataclass(frozen=True)
class Path:
    """Where one thing is. Pixels, pixels a frame, radians; y and angles grow downwards and clockwise."""

    thing: Thing
    x: float
    y: float
    vx: float
    vy: float
    bounce: float
    """Height in pixels."""
    phase: float
    """Of the bounce, in radians."""
    radius: float
    growth: float
    """Share of `radius` gained a frame."""
    angle: float
    spin: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """A scene and the path of each of its things."""

    scene: Scene
    paths: tuple[Path, ...]


def place(scene: Scene, rng: random.Random) -> Layout:
    """Give every thing a path inside the picture, apart from the others: each has a lane of its own."""
    each = scene.each
    motion = each[0].motion
    if scene.relation is not None:
        across = scene.relation == "left of"
    elif motion in DIRECTIONS:
        across = DIRECTIONS[motion][0] == 0  # lanes lie across the motion
    else:
        across = motion == "bounce" or scene.width > scene.height or rng.random() < 0.5
    order = list(range(len(each)))
    if scene.relation is None:
        rng.shuffle(order)
    lanes = [(lane / len(each), (lane + 1) / len(each)) for lane in range(len(each))]
    whole = (0.0, 1.0)
    return Layout(
        scene,
        tuple(
            _path(thing, scene, lanes[lane] if across else whole, whole if across else lanes[lane], rng)
            for thing, lane in zip(each, order, strict=True)
        ),
    )


def _path(
    thing: Thing, scene: Scene, across: tuple[float, float], down: tuple[float, float], rng: random.Random
) -> Path:
    """A path within a lane, given as shares of width and height."""
    left, right = across[0] * scene.width, across[1] * scene.width
    top, bottom = down[0] * scene.height, down[1] * scene.height
    last, motion, unit = scene.frames - 1, thing.motion, scene.unit
    start, growth = {"grow": (0.7, 0.010), "shrink": (1.2, -0.009)}.get(motion or "", (1.0, 0.0))
    largest = max(start, start + growth * last)
    room = min(right - left, bottom - top) / 2 - 6 * unit
    radius = min(unit * SIZES[thing.size] * rng.uniform(0.93, 1.07), room / (1.12 * largest))
    margin = 1.12 * radius * largest + 4 * unit
    bounce = min(BOUNCE_HEIGHT * scene.height, bottom - top - 2 * margin) if motion == "bounce" else 0.0
    vx = vy = 0.0
    if motion in DIRECTIONS:
        speed, (dx, dy) = unit * rng.uniform(*SPEED), DIRECTIONS[motion]
        length = (right - left if dx else bottom - top) - 2 * margin
        speed = min(speed, length / max(last, 1))
        vx, vy = dx * speed, dy * speed
    x_low, x_high = left + margin - min(vx * last, 0), right - margin - max(vx * last, 0)
    y_low, y_high = top + margin - min(vy * last, 0) + bounce, bottom - margin - max(vy * last, 0)
    x, y = rng.uniform(x_low, x_high), rng.uniform(y_low, y_high)
    if thing.position is not None:
        share_x, share_y = POSITIONS[thing.position]
        x = min(max((share_x + rng.uniform(-0.04, 0.04)) * scene.width, x_low), x_high)
        y = min(max((share_y + rng.uniform(-0.04, 0.04)) * scene.height, y_low), y_high)
    spin = {"clockwise": 1.0, "counterclockwise": -1.0}.get(motion or "", 0.0)
    rgb = tuple(min(max(value + rng.uniform(-0.03, 0.03), 0.0), 1.0) for value in COLOURS[thing.colour])
    return Path(
        thing,
        x,
        y,
        vx,
        vy,
        bounce,
        rng.uniform(0, math.pi),
        radius * start,
        growth / start,
        math.radians(rng.uniform(-8, 8)),
        spin * math.radians(rng.uniform(*SPIN_DEGREES)),
        rgb,  # type: ignore[arg-type]
    )
