"""What a caption tells of each of its things, as numbers: targets for a head that reads them from the text encoder while it trains.

A real text encoder comes to the denoiser trained, and a word's embedding knows its sentence. This one starts from nothing, and
a denoiser that learns from pictures alone is content with words in a bag: of "a red heart left of a blue square" it knew both
colours and both shapes, but not whose was which, nor which was left. So each word of "a red heart" is made to know what a caption can
tell of that heart, also where its own leaves some out. The head is dropped after training.
"""

import math

import torch

from training.world import COLOURS, DIRECTIONS, POSITIONS, SHAPES, SIZES, Scene

MOST_TOLD = 2
"""Things in a caption; those that are there more than once are one."""
TOLD = len(SHAPES) + 12


def told(scene: Scene) -> torch.Tensor:
    """About -1 to 1, float32 [1 + MOST_TOLD, TOLD]: a row for each thing as captions number them, from 1. Row 0 is of none.

    Shape (one-hot), colour, logarithm of the size, place (0 where nothing is said of it), direction of motion, bounce, spin,
    growth, and how many more than one there are (up to 2).
    """
    rows = torch.zeros(1 + MOST_TOLD, TOLD)
    for number, thing in enumerate(scene.things):
        x, y = POSITIONS[thing.position or "centre"]
        if scene.relation is not None:
            side = 0.5 + (number - 0.5) / 2
            x, y = (side, y) if scene.relation == "left of" else (x, side)
        motion = thing.motion or ""
        rows[number + 1] = torch.tensor(
            [
                *(float(shape == thing.shape) for shape in SHAPES),
                *(2 * value - 1 for value in COLOURS[thing.colour]),
                math.log(SIZES[thing.size] / SIZES["medium"]) / 0.35,
                4 * (x - 0.5),
                4 * (y - 0.5),
                *(float(value) for value in DIRECTIONS.get(motion, (0, 0))),
                float(motion == "bounce"),
                {"clockwise": 1.0, "counterclockwise": -1.0}.get(motion, 0.0),
                {"grow": 1.0, "shrink": -1.0}.get(motion, 0.0),
                float(scene.count - 1),
            ]
        )
    return rows
