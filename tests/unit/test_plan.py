"""How a long video is cut: exact to the frame, in the fewest clips, all of one length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.jobs.plan import cut_evenly, frames_of, generated_frames
from serve_app.jobs.presets import MAX_FRAMES
from serve_app.jobs.transitions import Transition, stitched_frames


@given(total=st.integers(1, 5000), overlap=st.integers(0, 32))
def test_cut_clips_make_exactly_the_total(total: int, overlap: int) -> None:
    clips = cut_evenly(total, overlap)
    joint = Transition("crossfade", overlap) if overlap else Transition("cut", 0)
    assert stitched_frames(clips, [joint] * (len(clips) - 1)) == total
    assert max(clips) <= MAX_FRAMES
    assert max(clips) - min(clips) <= 1
    if len(clips) > 1:  # one fewer would not do
        assert (len(clips) - 1) * MAX_FRAMES - (len(clips) - 2) * overlap < total


@given(st.integers(1, MAX_FRAMES))
def test_the_model_makes_the_next_length_it_can(frames: int) -> None:
    made = generated_frames(frames)
    assert made % 4 == 1
    assert 0 <= made - frames < 4
    assert made <= MAX_FRAMES


def test_seconds_are_the_nearest_frame() -> None:
    assert [frames_of(seconds) for seconds in (5.0, 5.0625, 0.03, 60.0)] == [80, 81, 0, 960]


def test_a_transition_longer_than_a_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="81 frames leaves nothing"):
        cut_evenly(200, 81)
