"""Clips become one video: which frames it has, how a transition mixes them, and what is in memory meanwhile."""

import gc
import subprocess
import weakref
from itertools import pairwise

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from serve_app.errors import InvalidValue, MediaError
from serve_app.jobs.transitions import CUT, XFADE_KINDS, Transition, stitched_frames
from serve_app.media.blend import blended
from serve_app.media.stitch import stitched
from tests.media_content import moving_frames


def _clips(*lengths: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Clips that differ from each other in each frame."""
    return [moving_frames(n, width, height) // (index % 3 + 1) + 20 * index for index, n in enumerate(lengths)]


def _whole(clips, joints, total=None) -> np.ndarray:
    total = stitched_frames([len(clip) for clip in clips], joints) if total is None else total
    return np.concatenate(list(stitched(iter(clips), joints, total)))


def _exact_mix(before, after) -> np.ndarray:
    share = (np.arange(1, len(before) + 1) / (len(before) + 1))[:, None, None, None]
    return before * (1 - share) + after * share


def test_cuts_keep_every_frame_as_it_is():
    clips = _clips(5, 1, 9)
    assert np.array_equal(_whole(clips, [CUT, CUT]), np.concatenate(clips))


@pytest.mark.parametrize("overlap", [1, 4, 8])
def test_crossfade(overlap):
    a, b, c = _clips(9, 16, 9)
    whole = _whole([a, b, c], [Transition(frames=overlap)] * 2)
    assert len(whole) == 34 - 2 * overlap
    assert np.array_equal(whole[: 9 - overlap], a[: 9 - overlap])
    assert np.array_equal(whole[9 : 25 - 2 * overlap], b[overlap : 16 - overlap])
    assert np.array_equal(whole[25 - overlap :], c[overlap:])
    for found, exact in (
        (whole[9 - overlap : 9], _exact_mix(a[-overlap:], b[:overlap])),
        (whole[25 - 2 * overlap : 25 - overlap], _exact_mix(b[-overlap:], c[:overlap])),
    ):
        assert np.abs(found - exact).max() < 1
        assert abs((found - exact).mean()) < 0.25  # no darkening; halves, of which an overlap of 1 is full, go up


def test_extreme_values_do_not_overflow():
    black, white = np.zeros((7, 2, 2, 3), np.uint8), np.full((7, 2, 2, 3), 255, np.uint8)
    assert np.array_equal(np.stack(list(blended(white, white, "crossfade"))), white)
    assert np.array_equal(np.stack(list(blended(black, black, "crossfade"))), black)
    levels = [int(frame[0, 0, 0]) for frame in blended(black, white, "crossfade")]
    assert levels == [32, 64, 96, 128, 159, 191, 223]


def test_xfade_names_are_those_of_ffmpeg():
    said = subprocess.run(
        [get_ffmpeg_exe(), "-hide_banner", "-h", "filter=xfade"], capture_output=True, text=True, check=True
    ).stdout
    listed = said.partition(" transition ")[2].partition(" duration ")[0].splitlines()[1:]
    assert sorted(XFADE_KINDS) == sorted(line.split()[0] for line in listed if line.strip() and "custom" not in line)


@pytest.mark.parametrize("kind", XFADE_KINDS)
def test_each_xfade_has_the_right_frames(kind):
    a, b = _clips(9, 9)
    whole = _whole([a, b], [Transition(kind, 6)])
    assert len(whole) == 12
    assert np.array_equal(whole[:3], a[:3])
    assert np.array_equal(whole[-3:], b[-3:])
    overlap = whole[3:9]
    assert not np.array_equal(overlap, a[3:])
    assert not np.array_equal(overlap, b[:6])
    assert all(not np.array_equal(one, other) for one, other in pairwise(overlap))


def test_xfades_fade_is_the_crossfade_in_step():
    """To the frame and to rounding: so the other xfades, which run by the same clock, begin and end in step too."""
    a, b = _clips(7, 7)
    faded, mixed = np.stack(list(blended(a, b, "fade"))), np.stack(list(blended(a, b, "crossfade")))
    assert np.abs(faded.astype(int) - mixed).max() <= 1


def test_xfade_wipes_the_right_way():
    old, new = np.full((3, 8, 8, 3), 10, np.uint8), np.full((3, 8, 8, 3), 200, np.uint8)
    middle = list(blended(old, new, "wipeleft"))[1]
    assert middle[0, 0, 0] == 10
    assert middle[0, -1, 0] == 200


def test_strided_read_only_clips():
    clips = [clip[:, ::-1, ::2] for clip in _clips(6, 6)]
    for clip in clips:
        clip.flags.writeable = False
    for kind in ("crossfade", "radial"):
        assert _whole(clips, [Transition(kind, 3)]).shape == (9, 48, 32, 3)


@pytest.mark.parametrize("total", [1, 5, 8, 9, 12])
def test_the_end_is_trimmed_to_the_frame(total):
    clips, joints = _clips(7, 9), [Transition(frames=4)]
    assert np.array_equal(_whole(clips, joints, total), _whole(clips, joints)[:total])


def test_clips_that_do_not_fit():
    a, b, c = _clips(7, 9, 7)
    joint = Transition(frames=4)
    with pytest.raises(MediaError, match="the clips have 12 frames together; 13 were to come"):
        _whole([a, b], [joint], 13)
    with pytest.raises(MediaError, match="there are 1 clips; with 1 joints there must be 2"):
        list(stitched([a], [joint], 12))
    with pytest.raises(MediaError, match="more clips than the 2"):
        list(stitched([a, b, c], [joint], 100))
    with pytest.raises(
        MediaError, match=r"clip 1 is uint8 of shape \(9, 24, 64, 3\); it must be uint8 \[frames, 48, 64, 3\]"
    ):
        _whole([a, b[:, :24]], [joint])
    with pytest.raises(MediaError, match="clip 0 is float32"):
        _whole([a.astype(np.float32), b], [joint])
    with pytest.raises(InvalidValue, match="clip 1 has 3 frames"):
        list(stitched([a, b[:3]], [joint], 6))


@pytest.mark.parametrize("kind", ["cut", "crossfade", "dissolve"])
def test_a_clip_is_gone_before_the_next_is_asked_for(kind):
    made: list[weakref.ref] = []

    def clips():
        for _ in range(4):
            gc.collect()
            assert not [ref for ref in made if ref() is not None]
            clip = moving_frames(9, 32, 32)
            made.append(weakref.ref(clip))
            yield clip
            del clip

    total = 0
    for block in stitched(clips(), [CUT if kind == "cut" else Transition(kind, 4)] * 3, 24):
        total += len(block)
    assert total == 24
    assert len(made) >= 3
