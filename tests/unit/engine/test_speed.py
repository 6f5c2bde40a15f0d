"""The estimate of device seconds: the table's guess, then measurements, shape by shape."""

import pytest

from serve_app.engine.clip_state import ClipState
from serve_app.engine.speed import Speed
from serve_app.scheduling.cost import CARDS, WAN_1_3B, clip_gpu_s

from .conftest import MakeRequest


def test_guess_is_the_cost_models(request_of: MakeRequest) -> None:
    request = request_of(width=640, height=480, frames=41, steps=25)
    clip = ClipState(request, print, arrived_at=0.0, last_ran_at=0.0)
    expected = clip_gpu_s(CARDS["H100"], WAN_1_3B, width=640, height=480, frames=41, steps=25)
    speed = Speed(CARDS["H100"], WAN_1_3B)
    assert speed.remaining_s(clip) == pytest.approx(expected)
    clip.finished_steps, clip.decoded_latent_frames = 25, 10
    assert (
        speed.remaining_s(clip) == pytest.approx(speed.decode_s(request)) == pytest.approx(12.595 * 0.1 / 11, rel=1e-3)
    )


def test_without_guidance_a_step_is_half(request_of: MakeRequest) -> None:
    speed = Speed(CARDS["H100"], WAN_1_3B)
    assert speed.step_s(request_of()) == pytest.approx(2 * speed.step_s(request_of(guidance_scale=1.0)))


def test_measurements_win_and_correct_other_shapes(request_of: MakeRequest) -> None:
    speed = Speed(CARDS["H100"], WAN_1_3B)
    seen, unseen = request_of(frames=5), request_of(frames=81)
    guessed = {request.frames: speed.step_s(request) for request in (seen, unseen)}
    for _ in range(50):
        speed.saw_step(seen, 3 * guessed[5])
    assert speed.step_s(seen) == pytest.approx(3 * guessed[5])
    assert speed.step_s(unseen) == pytest.approx(3 * guessed[81])
    speed.saw_step(unseen, 2 * guessed[81])
    assert speed.step_s(unseen) == pytest.approx(2 * guessed[81])
    assert speed.step_s(seen) == pytest.approx(3 * guessed[5]), "each shape keeps its own"


def test_a_change_of_speed_is_followed(request_of: MakeRequest) -> None:
    speed, request = Speed(CARDS["H100"], WAN_1_3B), request_of()
    speed.saw_decode(request, 1.0)
    for _ in range(20):
        speed.saw_decode(request, 2.0)
    assert speed.decode_s(request) == pytest.approx(2.0, rel=0.02)
