"""The facts of a latent pixel are those of the thing that is drawn there."""

import random

import torch
from torch.nn import functional

from training.facts import FACTS, facts
from training.render import drawing_of, make_atlas, render
from training.world import COLOURS, SHAPES, Scene, Thing, place


def test_a_thing_that_moves_right() -> None:
    scene = Scene((Thing("star", "red", motion="right"),), width=640, height=480, frames=17)
    layout = place(scene, random.Random(3))
    path = layout.paths[0]
    found = facts(drawing_of([layout]))[0]
    assert found.shape == (FACTS, 5, 15, 20)
    shape, colour, offset, velocity = found[:8], found[8:11], found[11:13], found[13:15]
    assert torch.equal(shape.argmax(0), torch.full((5, 15, 20), SHAPES.index("star")))
    assert float((colour[:, 0, 0, 0] - (2 * torch.tensor(COLOURS["red"]) - 1)).abs().max()) < 0.1
    torch.testing.assert_close(velocity[0], torch.full((5, 15, 20), path.vx * 4 / 32 / 0.6))
    assert float(velocity[1].abs().max()) == 0
    for latent_frame, frame in ((0, 0.0), (1, 2.5), (4, 14.5)):
        x, y = path.x + path.vx * frame, path.y
        row, column = divmod(int(offset[:, latent_frame].square().sum(0).argmin()), 20)
        assert (column, row) == (int(x // 32), int(y // 32)), "the offset is least where the thing is"


def test_every_thing_has_its_own_surroundings() -> None:
    scene = Scene((Thing("circle", "blue", position=None), Thing("heart", "yellow")), relation="left of")
    layout = place(scene, random.Random(5))
    drawing = drawing_of([layout])
    found = facts(drawing)[0, :, 0]
    for path in layout.paths:
        here = found[:, int(path.y // 32), int(path.x // 32)]
        assert SHAPES[int(here[:8].argmax())] == path.thing.shape
        assert float(here[19]) == 1.0, "as near as can be"
    assert float(found[20].unique()) == 0.0, "two things"
    pixels = render(drawing, make_atlas())[0, :, 0]
    saturated = (pixels.amax(0) - pixels.amin(0) > 0.5).float()
    shown = functional.max_pool2d(saturated[None, None], 32)[0, 0]
    assert float(found[19][shown > 0].min()) > float(found[19][shown == 0].min())
