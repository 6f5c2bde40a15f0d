"""What the service's knobs do to a picture of the trained model: the tiny one's noise cannot show it."""

import statistics

import torch

from benchmarks.quality import psnr_db
from serve_app.engine.engine import Engine
from tests.quality.conftest import BUNDLED, Draw
from training.captions import HeldOut, held_out
from training.evaluate import judge
from training.reader import Reader

VAE_LEAST_DB = 45.0
"""What a faster decode must keep of the float32 one in every file: an error of 1.4 of 255 (root mean square), which nobody sees.
Rounding to 8 bits alone is 59 dB."""


def test_more_steps_come_closer_to_the_end(draw: Draw, pictures: list[HeldOut]) -> None:
    distances = {}
    some = pictures[:2]
    ends = [draw(item, steps=40) for item in some]
    for steps in (4, 10, 25):
        drawn = [draw(item, steps=steps) for item in some]
        distances[steps] = statistics.median(psnr_db(one, end) for one, end in zip(drawn, ends, strict=True))
    assert distances[4] < distances[10] < distances[25]


def test_guidance_moves_pictures_and_keeps_them_to_their_prompts(
    draw: Draw, pictures: list[HeldOut], reader: Reader
) -> None:
    """These are right without guidance too, so what more of it does is seen in how far it moves them."""
    guided = [draw(item, guidance_scale=6.0) for item in pictures]
    marks = [judge(item.scene, reader.read(frames)) for item, frames in zip(pictures, guided, strict=True)]
    assert sum(mark["colour and shape"] + mark["position"] for mark in marks) >= 2 * len(pictures) - 1
    for item, frames in zip(pictures[:2], guided[:2], strict=True):
        unguided = draw(item, guidance_scale=1.0)
        assert psnr_db(draw(item, guidance_scale=2.0), unguided) > psnr_db(frames, unguided)


def test_the_negative_prompt_is_avoided(draw: Draw, pictures: list[HeldOut], reader: Reader) -> None:
    """A star of no stated colour is no more of the colour that it had, once that is the negative prompt."""
    prompt = "a large star in the centre, white background"
    avoided = 0
    for seed in range(4):
        wild = {"prompt": prompt, "seed": seed}
        (free, *_) = reader.things(draw(pictures[0], negative_prompt="", **wild)[0])
        (other, *_) = reader.things(draw(pictures[0], negative_prompt=free.colour, **wild)[0])
        avoided += other.colour != free.colour
    assert avoided >= 3


def test_bfloat16_decode_is_as_good_as_float32(draw: Draw, pictures: list[HeldOut]) -> None:
    """Why it is the default on GPUs."""
    clip = next(item for item in held_out("tune") if item.scene.frames > 1)
    fast = Engine(BUNDLED, device="cpu", checkpoint_every_s=None, vae_dtype=torch.bfloat16)
    try:
        for item in (*pictures[:2], clip):
            assert psnr_db(draw(item, steps=15, on=fast), draw(item, steps=15)) > VAE_LEAST_DB
    finally:
        fast.close()
