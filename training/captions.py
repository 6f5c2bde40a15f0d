"""Puts scenes into words, in many ways, and makes the fixed set of held-out prompts.

A caption may leave out what is usual (one, medium, plain) and, in training, anything at all: that is how the model learns
what "a circle" or "something red" alone means, in a prompt or in a negative prompt.
"""

import random
from dataclasses import dataclass, replace

from training.world import DIRECTIONS, MOTIONS, SHAPES, Scene, Thing, draw_scene, draw_thing, scene_split

NAMES: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "donut"),
    "cross": ("cross", "cross", "plus sign"),
    "heart": ("heart",),
    "moon": ("moon", "moon", "crescent"),
}
USUAL_NEGATIVE = "blurry, low quality, overexposed, jpeg artifacts, watermark, text, deformed hands, extra limbs"
"""The service's default negative prompt (serve_app/settings.py)."""

_PLURALS = {"cross": "crosses", "box": "boxes"}
_SIZE_WORDS = {
    "small": ("small", "small", "tiny", "little"),
    "large": ("large", "big", "huge"),
    "medium": ("", "", "medium"),
}
_PLACES = {
    "left": ("on the left", "on the left side", "at the left edge"),
    "right": ("on the right", "on the right side", "at the right edge"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the center", "in the middle"),
}
_CORNERS = ("in the {} corner", "at the {}", "in the {}")
_MOTION_STEMS = {
    "left": ("left", "to the left", "leftwards", "from right to left"),
    "right": ("right", "to the right", "rightwards", "from left to right"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
    "clockwise": ("clockwise",),
    "counterclockwise": ("counterclockwise", "anticlockwise"),
}
_BACKGROUNDS = {
    "white": ("white",),
    "grey": ("grey", "gray"),
    "black": ("black", "dark"),
    "cream": ("cream", "beige"),
    "gradient": ("gradient",),
    "checkered": ("checkered", "chequered"),
}
_STYLES = {
    "plain": ("flat", "plain flat"),
    "shaded": ("shaded", "glossy 3d"),
    "outlined": ("outlined",),
    "glowing": ("glowing",),
    "blurry": ("blurry", "out of focus"),
}
_NUMBERS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Wording:
    """A caption, and where in it each of the scene's things is spoken of."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """Start and end, exclusive, of each thing's phrase; empty for a fragment."""


def caption(scene: Scene, rng: random.Random, *, complete: bool = False) -> str:
    """A caption of `scene`. `complete`: names shape, colour, size, place, motion, count and background, whatever the dice say."""
    return put_into_words(scene, rng, complete=complete).text


def put_into_words(scene: Scene, rng: random.Random, *, complete: bool = False) -> Wording:
    """As `caption`, with the things' spans."""
    keep = 1.0 if complete else 0.9
    if not complete and rng.random() < 0.08:
        return Wording(_fragment(scene, rng))
    phrases = [_thing_phrase(thing, scene, rng, keep) for thing in scene.things]
    if scene.relation is not None and rng.random() < keep:
        between = {
            "left of": (" to the left of ", " left of ", " next to and left of "),
            "above": (" above ", " over "),
        }
        joint = rng.choice(between[scene.relation])
    else:
        joint = rng.choice((" and ", " and ", " with "))
    details = []
    if rng.random() < keep - 0.1 * (not complete):
        words = rng.choice(_BACKGROUNDS[scene.background])
        details.append(
            rng.choice(("on a {} background", "on a {} background", "against a {} background", "{} background")).format(
                words
            )
        )
    if scene.style != "plain" or rng.random() < 0.05:
        style = rng.choice(_STYLES[scene.style])
        details.append(rng.choice(("{} style", "drawn in a {} style")).format(style))
    kind = (
        rng.choice(("a video of ", "an animation of "))
        if scene.frames > 1
        else rng.choice(("a picture of ", "an image of "))
    )
    opening = kind if rng.random() < 0.12 else ""
    starts = [len(opening), len(opening) + len(phrases[0]) + len(joint)]
    text = opening + joint.join(phrases) + "".join(rng.choice((", ", " ")) + detail for detail in details)
    return Wording(
        text + "." if rng.random() < 0.05 else text,
        tuple((start, start + len(phrase)) for start, phrase in zip(starts, phrases, strict=False)),
    )


def _thing_phrase(thing: Thing, scene: Scene, rng: random.Random, keep: float) -> str:
    """Such as "two small red circles moving left"."""
    has_shape, has_colour = rng.random() < keep + 0.05, rng.random() < keep + 0.05
    plural = scene.count > 1
    noun = rng.choice(NAMES[thing.shape]) if has_shape else rng.choice(("shape", "thing", "object"))
    if plural:
        noun = _PLURALS.get(noun, noun + "s")
    words = []
    if rng.random() < keep:
        words.append(rng.choice(_SIZE_WORDS[thing.size]))
    if has_colour:
        words.append(thing.colour)
    words = [word for word in words if word] + [noun]
    article = _NUMBERS.get(scene.count, "")
    if not plural:
        article = "an" if words[0][0] in "aeiou" else "a"
    phrase = f"{article} {' '.join(words)}"
    moves = thing.motion is not None and rng.random() < keep + 0.05
    where = thing.position is not None and rng.random() < keep + 0.05
    motion_words = _motion(thing, rng, plural) if moves else ""
    place_words = _place(thing.position, rng) if where and thing.position else ""
    order = [motion_words, place_words] if rng.random() < 0.5 else [place_words, motion_words]
    return " ".join([phrase, *(words for words in order if words)])


def _motion(thing: Thing, rng: random.Random, plural: bool) -> str:
    """Such as "moving to the left" or "that spins clockwise"."""
    motion = thing.motion or ""
    if motion in DIRECTIONS:
        stem, tail = rng.choice(("mov", "mov", "mov", "slid", "drift")), " " + rng.choice(_MOTION_STEMS[motion])
        verbs = {
            "mov": ("moving", "moves", "move"),
            "slid": ("sliding", "slides", "slide"),
            "drift": ("drifting", "drifts", "drift"),
        }
    elif motion in _MOTION_STEMS:
        stem, tail = rng.choice(("spin", "spin", "rotat", "turn")), " " + rng.choice(_MOTION_STEMS[motion])
        verbs = {
            "spin": ("spinning", "spins", "spin"),
            "rotat": ("rotating", "rotates", "rotate"),
            "turn": ("turning", "turns", "turn"),
        }
    else:
        stem, tail = motion, rng.choice(("", "", " up and down")) if motion == "bounce" else ""
        verbs = {
            "bounce": ("bouncing", "bounces", "bounce"),
            "grow": ("growing", "grows", "grow"),
            "shrink": ("shrinking", "shrinks", "shrink"),
        }
    participle, singular, base = verbs[stem]
    verb = base if plural else singular
    return rng.choice((participle, participle, "that " + verb, verb)) + tail


def _place(position: str, rng: random.Random) -> str:
    if position in _PLACES:
        return rng.choice(_PLACES[position])
    vertical, horizontal = position.split()
    vertical = rng.choice(("top", "top", "upper") if vertical == "top" else ("bottom", "bottom", "lower"))
    return rng.choice(_CORNERS).format(f"{vertical} {horizontal}")


def _fragment(scene: Scene, rng: random.Random) -> str:
    """One or two properties alone, as in negative prompts: "red", "blurry", "circle, black background"."""
    thing = scene.things[0]
    parts = [
        thing.colour,
        rng.choice(NAMES[thing.shape]),
        rng.choice(_BACKGROUNDS[scene.background]) + " background",
        rng.choice(_STYLES[scene.style]),
    ]
    if thing.motion is not None:
        parts.append(_motion(thing, rng, False))
    chosen = rng.sample(parts, rng.choice((1, 1, 2)))
    return rng.choice((", ", " ")).join(chosen)


def dropped(scene: Scene, rng: random.Random) -> str:
    """What stands in a caption's place where guidance is to learn the world at large: a usual negative prompt, or nothing.

    Mostly the former, since that is what the service guides away from. Blurred scenes get it more often, so that it means a little of
    what it says.
    """
    return USUAL_NEGATIVE if rng.random() < (0.9 if scene.style == "blurry" else 0.6) else ""


@dataclass(frozen=True)
class HeldOut:
    """A prompt that no training or tuning sees, and what a file made from it must show."""

    number: int
    prompt: str
    scene: Scene


HELD_OUT_FRAMES = 17


def held_out(split: str = "test") -> list[HeldOut]:
    """The fixed prompts of `split` (`test` or `tune`): 160 pictures and 180 clips of 17 frames, always the same.

    Pictures: 100 of one thing at a place, 30 of two or three alike, 30 of two different things. Clips: 110 that move in a
    direction, 70 that bounce, spin, grow or shrink.
    """
    rng = random.Random(f"wan-shapes {split}")
    wanted = (
        [_one_at_a_place] * 100
        + [_alike] * 30
        + [_two] * 30
        + [_moving_in_a_direction] * 110
        + [_moving_otherwise] * 70
    )
    prompts: list[HeldOut] = []
    seen: set[str] = set()
    while len(prompts) < len(wanted):
        scene = wanted[len(prompts)](rng)
        prompt = caption(replace(scene, style="plain"), rng, complete=True)
        if scene_split(scene) == split and prompt not in seen:
            seen.add(prompt)
            prompts.append(HeldOut(len(prompts), prompt, scene))
    return prompts


def _one_at_a_place(rng: random.Random) -> Scene:
    thing = draw_thing(rng, moving=False)
    while thing.position is None:
        thing = draw_thing(rng, moving=False)
    return replace(_canvas(rng, 1), things=(thing,))


def _alike(rng: random.Random) -> Scene:
    thing = replace(draw_thing(rng, moving=False), position=None)
    return replace(_canvas(rng, 1), things=(thing,), count=rng.choice((2, 3)))


def _two(rng: random.Random) -> Scene:
    while True:
        scene = draw_scene(rng, width=640, height=480, frames=1, split=rng.choice(("train", "tune", "test")))
        if len(scene.things) == 2 and scene.relation is not None:
            return replace(_canvas(rng, 1), things=scene.things, relation=scene.relation)


def _moving_in_a_direction(rng: random.Random) -> Scene:
    thing = replace(draw_thing(rng, moving=True), position=None, motion=rng.choice(tuple(DIRECTIONS)))
    return replace(_canvas(rng, HELD_OUT_FRAMES), things=(thing,))


def _moving_otherwise(rng: random.Random) -> Scene:
    thing = draw_thing(rng, moving=True)
    while thing.motion in DIRECTIONS:
        thing = draw_thing(rng, moving=True)
    return replace(_canvas(rng, HELD_OUT_FRAMES), things=(replace(thing, position=None),))


def _canvas(rng: random.Random, frames: int) -> Scene:
    """A scene to be filled: background and size at random, mostly the presets' 640x480."""
    width, height = rng.choices(((640, 480), (832, 480), (480, 640)), (0.7, 0.15, 0.15))[0]
    background = rng.choice(tuple(_BACKGROUNDS))
    return Scene(
        (Thing(SHAPES[0], "red", motion=MOTIONS[0]),), background=background, width=width, height=height, frames=frames
    )
