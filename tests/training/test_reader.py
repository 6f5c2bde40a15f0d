"""The reader must read what the world drew, and find nothing of it where the prompts do not belong to the files."""

from dataclasses import replace

import pytest

from training.captions import HeldOut, held_out
from training.evaluate import load, save, scores, shuffled, truth
from training.reader import Reader


@pytest.fixture(scope="module")
def prompts() -> list[HeldOut]:
    chosen = sorted(held_out(), key=lambda item: (item.scene.frames, item.scene.width, item.number))[::12]
    return [replace(item, scene=replace(item.scene, width=256, height=192)) for item in chosen]


def test_it_reads_the_world(prompts: list[HeldOut]) -> None:
    reader = Reader()
    readings = [reader.read(frames) for frames in truth(prompts)]
    right = scores(prompts, readings)
    assert {name: share for name, (share, _) in right.items() if share < 1.0} == {}
    chance = scores(shuffled(prompts), readings)
    assert chance["colour and shape"][0] < 0.4
    assert chance["direction"][0] < 0.7


def test_files_keep_every_bit(prompts: list[HeldOut], tmp_path) -> None:  # type: ignore[no-untyped-def]
    for frames in truth([prompts[0], prompts[-1]]):
        save(frames, tmp_path / "file.png")
        assert (load(tmp_path / "file.png") == frames).all()
