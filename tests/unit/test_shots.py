"""Videos of several clips: what is asked for becomes shots and transitions of exact lengths, or an error that names the value."""

from typing import Any

import pytest

from serve_app.api.admit import admit
from serve_app.api.schemas import JobRequest
from serve_app.errors import ContentRefused, WanServeError
from serve_app.jobs.job import Job
from serve_app.jobs.transitions import CUT, Transition
from serve_app.settings import Settings


def admitted(**fields: Any) -> Job:
    return admit(JobRequest(**{"type": "video_fast"} | fields), "me", Settings(), now=1000.0)


def test_seconds_within_a_clip_are_one_clip_trimmed() -> None:
    spec = admitted(prompt="a river", seconds=3).spec
    assert (spec.video_length, spec.shots, len(spec.clips)) == (48, (), 1)


def test_seconds_over_a_clip_are_cut_into_equal_clips_of_one_prompt() -> None:
    spec = admitted(prompt="a river", seconds=12, seed=7).spec
    assert spec.video_length == 192
    assert [shot.frames for shot in spec.shots] == [70, 69, 69]
    assert spec.transitions == (Transition("crossfade", 8), Transition("crossfade", 8))
    assert {shot.prompt for shot in spec.shots} == {"a river"}
    assert [shot.seed for shot in spec.shots] == [7, 8, 9], "one seed would make one clip three times"


def test_shots_have_their_own_values_or_the_jobs() -> None:
    job = admitted(
        sample_steps=10,
        seed=5,
        transition={"kind": "fadeblack", "seconds": 1.0},
        shots=[
            {"prompt": "a river", "seconds": 5.0},
            {"prompt": "a sea", "seed": 99, "sample_steps": 4, "transition": {"kind": "cut"}},
            {"prompt": "a lake", "seconds": 2, "guidance_scale": 1.5},
        ],
    )
    spec = job.spec
    assert [(shot.prompt, shot.frames, shot.sample_steps, shot.seed) for shot in spec.shots] == [
        ("a river", 80, 10, 5), ("a sea", 41, 4, 99), ("a lake", 32, 10, 7),
    ]  # fmt: skip
    assert spec.shots[2].guidance_scale == 1.5
    assert spec.transitions == (Transition("fadeblack", 16), CUT)
    assert spec.video_length == 80 + 41 + 32 - 16
    assert spec.prompt == "a river\na sea\na lake"


def test_work_and_deadline_are_those_of_all_clips() -> None:
    one = admitted(prompt="a river", seconds=5)
    many = admitted(prompt="a river", seconds=40)
    assert many.estimated_gpu_s > 8 * one.estimated_gpu_s
    assert many.deadline - 1000 > 8 * 240


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "x", "seconds": 61}, "seconds"),
        ({"prompt": "x", "seconds": 0}, "seconds"),
        ({"prompt": "x", "seconds": 0.01}, "seconds"),
        ({"prompt": "x", "seconds": float("nan")}, "seconds"),
        ({"prompt": "x", "seconds": 2, "video_length": 41}, "video_length"),
        ({"prompt": "x", "seconds": 2, "type": "image_fast"}, "seconds"),
        ({"prompt": "x", "shots": [{"prompt": "y"}]}, "prompt"),
        ({"shots": [{"prompt": "y"}], "seconds": 4}, "seconds"),
        ({"shots": []}, "shots"),
        ({"shots": [{"prompt": "y"}] * 25}, "shots"),
        ({"shots": [{"prompt": "y", "seconds": 5}] * 20}, "shots"),
        ({"shots": [{"prompt": " "}]}, "shots[0].prompt"),
        ({"shots": [{"prompt": "y", "seconds": 5.2}]}, "shots[0].seconds"),
        ({"shots": [{"prompt": "y", "seed": -1}]}, "shots[0].seed"),
        ({"shots": [{"prompt": "y", "sample_steps": 0}]}, "shots[0].sample_steps"),
        ({"shots": [{"prompt": "y", "sample_shift": 0}]}, "shots[0].sample_shift"),
        ({"shots": [{"prompt": "y", "transition": {"kind": "cut"}}]}, "shots[0].transition"),
        ({"shots": [{"prompt": "y", "transition": {"kind": "swirl"}}] * 2}, "shots[0].transition.kind"),
        ({"prompt": "x", "seconds": 9, "transition": {"kind": "cut", "seconds": 1}}, "transition.seconds"),
        ({"prompt": "x", "seconds": 9, "transition": {"seconds": 2.5}}, "transition.seconds"),
        ({"shots": [{"prompt": "y", "seconds": 0.25}] * 2}, "transition"),
        ({"prompt": "x", "formats": ["avi"]}, "formats"),
        ({"prompt": "x", "formats": []}, "formats"),
        ({"prompt": "x", "formats": ["contact_sheet"]}, "formats"),
        ({"prompt": "x", "formats": ["mp4", "mp4"]}, "formats"),
        ({"prompt": "x", "formats": ["gif"], "type": "image_fast"}, "formats"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(WanServeError) as refused:
        admitted(**fields)
    assert refused.value.info.param == param
    assert refused.value.hint


def test_the_content_policy_reads_all_shots_as_one() -> None:
    with pytest.raises(ContentRefused):
        admitted(shots=[{"prompt": "a child at the beach"}, {"prompt": "the same person, nude"}])
