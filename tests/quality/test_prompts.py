"""What the bundled model was hardest to teach: whose colour is whose, which is left of which, and which way a thing goes.

A few prompts of the tune split; all 340 of the test split are the model card's.
"""

import pytest

from tests.quality.conftest import Draw
from training.captions import held_out
from training.evaluate import judge
from training.reader import Reader
from training.world import DIRECTIONS, RELATIONS


@pytest.mark.parametrize("relation", RELATIONS)
def test_two_things_are_told_apart_and_lie_as_told(draw: Draw, reader: Reader, relation: str) -> None:
    chosen = [item for item in held_out("tune") if item.scene.relation == relation and item.scene.width == 640][:4]
    marks = [judge(item.scene, reader.read(draw(item))) for item in chosen]
    assert sum(mark["colour and shape"] for mark in marks) >= 3
    assert sum(mark["relation"] for mark in marks) >= 3, "by chance it would be one or two"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_things_move_the_way_they_are_told(draw: Draw, reader: Reader, direction: str) -> None:
    item = next(
        item for item in held_out("tune") if item.scene.things[0].motion == direction and item.scene.width == 640
    )
    marks = judge(item.scene, reader.read(draw(item)))
    assert marks["direction"]
    assert marks["colour"]
