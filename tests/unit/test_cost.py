"""The cost model: the table, unknown cards, and what is learned from steps."""

import pytest

from serve_app.jobs.presets import PRESETS, size_of
from serve_app.scheduling.cost import CARDS, WAN_1_3B, CostModel, Shape, card_for, clip_gpu_s, upscale_s

VIDEO = Shape(640, 480, 81)
PICTURE = Shape(640, 480, 1)


@pytest.mark.parametrize(
    ("device_name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("cpu", "CPU"),
    ],
)
def test_known_devices(device_name: str, card: str) -> None:
    assert card_for(device_name) is CARDS[card]
    assert card_for(device_name, matmul_tflops=1.0) is CARDS[card]


@pytest.mark.parametrize(
    "device_name",
    ["NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40", "NVIDIA GH200 480GB", "Tesla T4"],
)
def test_an_unknown_card_is_estimated_from_its_matmul_rate(device_name: str) -> None:
    with pytest.raises(ValueError, match=device_name):
        card_for(device_name)
    card = card_for(device_name, matmul_tflops=77.8)
    assert card.name == device_name
    assert card.tflops == pytest.approx(CARDS["H100"].tflops / 10, rel=0.01)
    assert card.decode_s_per_megapixel == pytest.approx(CARDS["H100"].decode_s_per_megapixel * 10, rel=0.01)


@pytest.mark.parametrize(
    ("preset", "tflop"), [("image_fast", 7), ("image_high", 9), ("video_fast", 133), ("video_high", 365)]
)
def test_step_flops_are_those_of_the_design(preset: str, tflop: float) -> None:
    spec = next(p for name, p in PRESETS.items() if name == preset)
    width, height = size_of(spec.resolution)
    assert WAN_1_3B.step_flops(width, height, spec.video_length) / 1e12 == pytest.approx(tflop, abs=0.6)


def test_before_any_measurement_it_is_the_table() -> None:
    model = CostModel(CARDS["H100"], WAN_1_3B)
    expected = clip_gpu_s(CARDS["H100"], WAN_1_3B, width=640, height=480, frames=81, steps=40)
    assert model.clip_gpu_s(VIDEO, steps=40) == pytest.approx(expected)
    assert model.remaining_s(VIDEO, steps=40, latent_frames=21) == pytest.approx(expected)
    assert model.remaining_s(VIDEO, steps=0, latent_frames=0) == 0
    assert model.step_s(Shape(640, 480, 81, guided=False)) == pytest.approx(model.step_s(VIDEO) / 2)


def test_measurements_win_for_their_shape_and_correct_the_others() -> None:
    model = CostModel(CARDS["H100"], WAN_1_3B)
    video_s, picture_s, decode_s = model.step_s(VIDEO), model.step_s(PICTURE), model.decode_s(VIDEO)
    for _ in range(3):
        model.observe_step(VIDEO, 2 * video_s)
    assert model.step_s(VIDEO) == pytest.approx(2 * video_s)
    assert model.step_s(PICTURE) == pytest.approx(2 * picture_s)
    assert model.decode_s(VIDEO) == decode_s, "steps say nothing about decodes"
    model.observe_step(PICTURE, picture_s)
    assert model.step_s(PICTURE) == picture_s
    assert model.step_s(VIDEO) == pytest.approx(2 * video_s)
    model.observe_decode(VIDEO, 5.0)
    assert model.decode_s(VIDEO) == 5.0


def test_one_slow_step_counts_for_nothing_and_a_lasting_change_is_followed() -> None:
    model = CostModel(CARDS["H100"], WAN_1_3B)
    for seconds in (0.5, 0.5, 13.0, 0.5, 0.5):
        model.observe_step(VIDEO, seconds)
    assert model.step_s(VIDEO) == 0.5
    for _ in range(9):
        model.observe_step(VIDEO, 0.8)
    assert model.step_s(VIDEO) == 0.8


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_step_that_took_no_time_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="more than zero"):
        CostModel(CARDS["H100"], WAN_1_3B).observe_step(VIDEO, seconds)


def test_upscaling_takes_as_long_as_its_pixels() -> None:
    assert upscale_s(width=640, height=480, frames=81, s_per_megapixel=17.0) == pytest.approx(17.0 * 24.8832)
