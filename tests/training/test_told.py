"""A word of a caption belongs to one thing, and what it is made to know is what the scene says of that thing."""

import random

import pytest
import torch

from serve_app.engine.load import WAN_SHAPES
from training.captions import caption, put_into_words
from training.data import PICTURE_KINDS, PROMPT_TOKENS, owners, tokenize
from training.told import TOLD, told
from training.train_denoiser import world_tokenizer
from training.world import COLOURS, SHAPES, Scene, Thing, draw_scene

PAIR = (Thing("heart", "red", "large"), Thing("square", "blue"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    return world_tokenizer(tmp_path_factory.mktemp("tokenizer"), WAN_SHAPES)


def test_each_word_belongs_to_its_thing(tokenizer) -> None:  # type: ignore[no-untyped-def]
    wordings = [
        put_into_words(Scene(PAIR, relation="left of"), random.Random(seed), complete=True) for seed in range(40)
    ]
    ids = tokenize(tokenizer, [wording.text for wording in wordings])
    found = owners(tokenizer, wordings)
    assert found.shape == ids.shape == (40, PROMPT_TOKENS)
    for row, numbers in zip(ids, found, strict=True):
        pieces = tokenizer.convert_ids_to_tokens(row)
        words = {number: "".join(p for p, n in zip(pieces, numbers, strict=True) if n == number) for number in (1, 2)}
        assert "red▁heart" in words[1]
        assert "blue▁square" in words[2] or "blue▁box" in words[2]
        assert "left" not in words[1] + words[2], "how they lie is said between them"
        assert not numbers[(row == tokenizer.pad_token_id) | (row == tokenizer.eos_token_id)].any()


def test_places_in_the_text_are_the_things_phrases() -> None:
    rng = random.Random(2)
    for seed in range(500):
        scene = draw_scene(rng, width=640, height=480, frames=rng.choice((1, 17)), kinds=PICTURE_KINDS)
        wording = put_into_words(scene, random.Random(seed))
        assert wording.text == caption(scene, random.Random(seed))
        assert len(wording.spans) in (0, len(scene.things)), "none in a fragment"
        for (start, end), thing in zip(wording.spans, scene.things, strict=False):
            phrase = wording.text[start:end]
            assert phrase == phrase.strip()
            assert phrase.split()[0] in ("a", "an", "two", "three")
            named = [colour for colour in COLOURS if colour in phrase.split()]
            assert named in ([], [thing.colour])


def test_what_is_told() -> None:
    rows = told(Scene(PAIR, relation="above"))
    assert rows.shape == (3, TOLD)
    assert not rows[0].any(), "nothing of no thing"
    assert [SHAPES[int(row[: len(SHAPES)].argmax())] for row in rows[1:]] == ["heart", "square"]
    size, x, y = (rows[1:, len(SHAPES) + column].tolist() for column in (3, 4, 5))
    assert size[0] > size[1] == 0
    assert x == [0, 0]
    assert y == [-1, 1], "y grows downwards"
    moving = told(Scene((Thing("star", "pink", motion="left"),), count=3, frames=17))
    assert moving[1, -6:].tolist() == [-1, 0, 0, 0, 0, 2]
    assert torch.equal(moving[2], torch.zeros(TOLD)), "one kind of thing, however many"
