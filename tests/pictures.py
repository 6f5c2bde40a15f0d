"""Prompts for pictures of the bundled model, which no training saw."""

from training.captions import HeldOut, held_out


def one_thing_at_a_place(count: int) -> list[HeldOut]:
    """The first prompts of one thing at a place, in pictures of 640x480."""
    found = [
        item
        for item in held_out("tune")
        if item.scene.frames == 1 and len(item.scene.each) == 1 and (item.scene.width, item.scene.height) == (640, 480)
    ]
    return found[:count]
