"""What joints there are, and how long stitched clips become."""

import pytest

from serve_app.errors import InvalidValue
from serve_app.jobs.transitions import CUT, KINDS, Transition, stitched_frames


def test_the_default_is_half_a_second_of_crossfade():
    assert Transition() == Transition("crossfade", 8)
    assert KINDS[0] == "crossfade"
    assert len(KINDS) == len(set(KINDS)) == 60


@pytest.mark.parametrize(
    ("kind", "frames", "words"),
    [
        ("swirl", 8, "'swirl'"),
        ("crossfade", 0, "crossfade of 0 frames"),
        ("cut", 3, "cut of 3 frames"),
        ("wipeleft", -1, "wipeleft of -1 frames"),
    ],
)
def test_what_cannot_be_is_refused(kind, frames, words):
    with pytest.raises(InvalidValue, match=words) as caught:
        Transition(kind, frames)
    assert caught.value.param == "transition"


def test_length():
    assert stitched_frames([81], []) == 81
    assert stitched_frames([81, 81], [CUT]) == 162
    assert stitched_frames([81, 41, 81], [Transition(frames=8), Transition("wipeleft", 16)]) == 81 + 41 + 81 - 24
    assert stitched_frames([8, 16, 8], [Transition(frames=8), Transition(frames=8)]) == 16  # nothing but overlaps


def test_no_frame_is_in_two_transitions():
    with pytest.raises(InvalidValue, match="clip 1 has 15 frames; the transitions at its ends take 16"):
        stitched_frames([81, 15, 81], [Transition(frames=8), Transition(frames=8)])
    with pytest.raises(InvalidValue, match="clip 0 has 5 frames"):
        stitched_frames([5, 81], [Transition(frames=8)])
    with pytest.raises(InvalidValue, match="clip 1 has 5 frames"):
        stitched_frames([81, 5], [Transition(frames=8)])


def test_joints_are_one_fewer_than_clips():
    with pytest.raises(InvalidValue, match="2 clips have 1 joints, not 0"):
        stitched_frames([81, 81], [])
