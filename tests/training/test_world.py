"""The world, its words and its split. The held-out prompts' scores mean something only while training never sees them."""

import random

import torch

from serve_app.settings import Settings
from training.captions import USUAL_NEGATIVE, caption, held_out
from training.data import PROMPT_TOKENS
from training.render import drawing_of, make_atlas, render
from training.train_denoiser import world_tokenizer
from training.world import HELD_OUT_PAIRS, Scene, Thing, draw_scene, place, scene_split


def test_the_split_is_fixed_and_training_keeps_to_it() -> None:
    rng = random.Random(3)
    tested = {thing.key for item in held_out() for thing in item.scene.things if scene_split(Scene((thing,))) == "test"}
    for frames in (1, 17):
        for _ in range(500):
            scene = draw_scene(rng, width=640, height=480, frames=frames)
            assert not tested & {thing.key for thing in scene.things}
            assert not set(HELD_OUT_PAIRS) & {(thing.colour, thing.shape) for thing in scene.things}


def test_held_out_prompts_are_many_different_and_the_same_every_time() -> None:
    prompts = held_out()
    assert len({item.prompt for item in prompts}) == len(prompts) == 340
    assert prompts == held_out()
    assert not {item.prompt for item in prompts} & {item.prompt for item in held_out("tune")}
    assert prompts[0].prompt == "a small orange cross in the center, against a beige background"


def test_things_stay_inside_the_picture() -> None:
    rng, atlas = random.Random(5), make_atlas()
    for frames in (1, 41):
        scenes = [draw_scene(rng, width=128, height=96, frames=frames) for _ in range(8)]
        scenes = [Scene(s.things, s.count, s.relation, "white", "plain", 128, 96, frames) for s in scenes]
        pixels = render(drawing_of([place(scene, rng) for scene in scenes]), atlas)
        saturation = pixels.amax(1) - pixels.amin(1)
        border = torch.cat(
            [saturation[..., 0], saturation[..., -1], saturation[..., 0, :], saturation[..., -1, :]], dim=-1
        )
        assert float(border.max()) < 0.1
        assert (saturation.flatten(2).amax(2) > 0.3).all(), "every frame shows something"


def test_captions_fit_and_case_does_not_matter(tmp_path) -> None:  # type: ignore[no-untyped-def]
    tokenizer, rng = world_tokenizer(tmp_path), random.Random(1)
    scenes = [draw_scene(rng, width=640, height=480, frames=frames) for _ in range(300) for frames in (1, 17)]
    ids = tokenizer([caption(scene, rng) for scene in scenes]).input_ids
    assert max(map(len, ids)) <= PROMPT_TOKENS
    assert all(tokenizer.unk_token_id not in prompt for prompt in ids)
    assert tokenizer("A RED Circle").input_ids == tokenizer("a red circle").input_ids


def test_the_negative_prompt_is_the_services() -> None:
    assert Settings.model_fields["default_negative_prompt"].default == USUAL_NEGATIVE


def test_a_scene_can_be_said_in_many_ways() -> None:
    scene = Scene((Thing("star", "red", "large", motion="left"),), frames=17)
    said = {caption(scene, random.Random(seed), complete=True) for seed in range(50)}
    assert len(said) > 25
    assert all("red" in text and "star" in text and "left" in text for text in said)
