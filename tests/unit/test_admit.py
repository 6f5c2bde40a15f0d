"""admit(): every limit of DESIGN.md section 2, at its edges."""

import math
from typing import Any

import pytest

from serve_app.api.admit import admit
from serve_app.api.schemas import JobRequest
from serve_app.errors import ContentRefused, InvalidValue, UnknownJobType
from serve_app.jobs.job import Job
from serve_app.jobs.presets import MAX_SEED, PRESETS, JobType
from serve_app.settings import Settings

SETTINGS = Settings(store_url="redis://unused", max_prompt_chars=50)


def admitted(type: str = "video_fast", prompt: str = "a red fox", **values: Any) -> Job:
    return admit(JobRequest(type=type, prompt=prompt, **values), "alice", SETTINGS, now=1000.0)


@pytest.mark.parametrize("type", list(JobType))
def test_a_preset_fills_every_value_and_gives_the_promised_deadline(type: JobType) -> None:
    job, preset = admitted(type), PRESETS[type]
    assert job.owner == "alice"
    assert job.spec.negative_prompt == SETTINGS.default_negative_prompt
    assert (job.spec.resolution, job.spec.video_length) == (preset.resolution, preset.video_length)
    assert (job.spec.sample_steps, job.spec.guidance_scale) == (preset.sample_steps, preset.guidance_scale)
    assert job.spec.sample_shift == preset.sample_shift
    assert job.deadline == 1000.0 + preset.promised_s[1]
    assert job.estimated_gpu_s > 0


def test_more_work_than_the_preset_moves_the_deadline_and_less_does_not() -> None:
    preset = admitted()
    assert admitted(sample_steps=10).deadline == preset.deadline
    longer = admitted(sample_steps=100)
    assert longer.deadline == pytest.approx(1000.0 + 240 * longer.estimated_gpu_s / preset.estimated_gpu_s)


@pytest.mark.parametrize("text", ["832*480", "832x480", "832X480"])
def test_resolutions_are_understood_with_each_sign(text: str) -> None:
    assert admitted(resolution=text).spec.resolution == "832*480"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resolution", "480x640"),
        ("video_length", 1),
        ("video_length", 81),
        ("sample_steps", 1),
        ("sample_steps", 100),
        ("guidance_scale", 0),
        ("guidance_scale", 20),
        ("sample_shift", 0.1),
        ("sample_shift", 20.0),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("motion_bucket_id", 255),
        ("negative_prompt", ""),
        ("prompt", "x" * 50),
        ("prompt", "two\nlines\tand a tab, ключ, 狐"),
        ("profile", "exact"),
    ],
)
def test_values_at_the_limits_are_taken(name: str, value: Any) -> None:
    assert getattr(admitted(**{name: value}).spec, name) == (value if name != "resolution" else "480*640")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""),
        ("prompt", " \n\t\u200b"),
        ("prompt", "x" * 51),
        ("prompt", "nul \x00"),
        ("prompt", "escape \x1b[31m"),
        ("negative_prompt", "x" * 51),
        ("negative_prompt", "\x07"),
        ("resolution", "641*480"),
        ("resolution", "480*832"),
        ("resolution", "640 480"),
        ("resolution", "\u0666\u0664\u0660*480"),
        ("video_length", 0),
        ("video_length", 4),
        ("video_length", 85),
        ("video_length", -3),
        ("sample_steps", 0),
        ("sample_steps", 101),
        ("guidance_scale", -0.1),
        ("guidance_scale", 20.1),
        ("guidance_scale", math.nan),
        ("sample_shift", 0),
        ("sample_shift", 20.1),
        ("sample_shift", math.inf),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("motion_bucket_id", -1),
        ("motion_bucket_id", 256),
        ("profile", "balanced"),
        ("profile", "turbo"),
        ("profile", "fastest"),
    ],
)
def test_values_past_the_limits_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as refused:
        admitted(**{name: value})
    assert refused.value.param == name
    assert refused.value.message.startswith(name)
    assert refused.value.hint


def test_an_image_has_one_frame_and_a_video_may_have_one() -> None:
    with pytest.raises(InvalidValue, match="image_fast makes exactly 1 frame"):
        admitted("image_fast", video_length=5)
    assert admitted("image_fast", video_length=1).spec.is_image
    assert not admitted("video_fast", video_length=1).spec.is_image


def test_planned_profiles_are_refused_as_not_yet_available() -> None:
    with pytest.raises(InvalidValue, match="profile turbo is not yet available"):
        admitted(profile="turbo")


def test_an_unknown_job_type_is_named() -> None:
    with pytest.raises(UnknownJobType, match="'gif'") as refused:
        admitted("gif")
    assert refused.value.param == "type"


def test_seeds_are_drawn_where_none_is_given() -> None:
    assert len({admitted().spec.seed for _ in range(5)}) == 5


def test_the_content_policy_is_asked() -> None:
    with pytest.raises(ContentRefused) as refused:
        admitted(prompt="nude child")
    assert refused.value.param == "prompt"


UPSCALING = SETTINGS.model_copy(update={"upscale_model": "realesr-animevideov3", "upscale_s_per_megapixel": 10.0})


def upscaled(settings: Settings = UPSCALING, **values: Any) -> Job:
    return admit(JobRequest(type="video_fast", prompt="a red fox", **values), "alice", settings, now=1000.0)


@pytest.mark.parametrize("factor", [2, 4])
def test_upscaling_is_promised_later_and_costs_no_gpu_seconds_of_the_model(factor: int) -> None:
    job, plain = upscaled(upscale=factor), upscaled()
    assert (job.spec.upscale, plain.spec.upscale) == (factor, None)
    assert job.deadline == pytest.approx(plain.deadline + 10.0 * 41 * 0.64 * 0.48)
    assert job.estimated_gpu_s == plain.estimated_gpu_s
    long = upscaled(upscale=factor, seconds=20)
    assert long.deadline == pytest.approx(upscaled(seconds=20).deadline + 10.0 * 320 * 0.64 * 0.48)


@pytest.mark.parametrize("factor", [0, 1, 3, -2, 8])
def test_other_factors_are_refused(factor: int) -> None:
    with pytest.raises(InvalidValue, match=f"upscale is {factor}; it must be 2 or 4") as caught:
        upscaled(upscale=factor)
    assert caught.value.param == "upscale"


def test_a_service_that_does_not_upscale_says_so() -> None:
    with pytest.raises(InvalidValue, match="does not upscale") as caught:
        admitted(upscale=2)
    assert (caught.value.param, caught.value.http_status) == ("upscale", 422)
    assert "upscale_model" in caught.value.hint


def test_what_no_job_may_take_is_refused_before_it_runs() -> None:
    slow = UPSCALING.model_copy(update={"upscale_s_per_megapixel": 100.0})
    upscaled(slow, upscale=4)
    with pytest.raises(InvalidValue, match="would take about 29491 s here; a job may take 3600 s"):
        upscaled(slow, upscale=4, seconds=60)


def test_each_job_type_has_its_model_and_a_larger_one_is_promised_for_later() -> None:
    settings = Settings.model_validate(
        {
            "store_url": "redis://unused",
            "default_model": "small",
            "models": {"small": {}, "large": {"architecture": "14B", "reference_card": "H100"}},
            "job_types": {"video_high": {"model": "large"}},
        }
    )
    fast = admit(JobRequest(type="video_fast", prompt="a red fox"), "alice", settings, now=1000.0)
    high = admit(JobRequest(type="video_high", prompt="a red fox"), "alice", settings, now=1000.0)
    assert (fast.spec.model, high.spec.model) == ("small", "large")
    assert fast.deadline == admitted("video_fast").deadline
    promised_s = 480 * high.estimated_gpu_s / admitted("video_high").estimated_gpu_s
    assert high.deadline == pytest.approx(1000.0 + promised_s)
    assert promised_s > 480
    twice = admit(JobRequest(type="video_high", prompt="a red fox", sample_steps=80), "alice", settings, now=1000.0)
    assert twice.deadline - 1000.0 == pytest.approx(promised_s * twice.estimated_gpu_s / high.estimated_gpu_s)


def test_a_faster_card_changes_no_promise() -> None:
    settings = Settings.model_validate(
        {"store_url": "redis://unused", "models": {"wan-1.3b": {"reference_card": "H100"}}}
    )
    job = admit(JobRequest(type="video_high", prompt="a red fox"), "alice", settings, now=1000.0)
    assert job.deadline == 1480.0
    assert job.estimated_gpu_s < admitted("video_high").estimated_gpu_s
