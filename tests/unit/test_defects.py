"""Black and frozen output is found, and nothing else is."""

import numpy as np

from serve_app.media.defects import BLACK_LEVEL, find_defect

RANDOM = np.random.default_rng(1)


def noise(frames: int) -> np.ndarray:
    return RANDOM.integers(0, 255, (frames, 48, 64, 3), dtype=np.uint8)


def test_black() -> None:
    frames = np.zeros((5, 48, 64, 3), np.uint8)
    assert "black" in str(find_defect(frames))
    assert "black" in str(find_defect(frames[:1]))
    frames[4, 3, 3] = BLACK_LEVEL + 1
    frames[2, 3, 3] = 9
    assert find_defect(frames) is None


def test_frozen() -> None:
    frames = np.repeat(noise(1), 5, axis=0)
    assert "same picture" in str(find_defect(frames))
    assert find_defect(frames[:1]) is None
    frames[4] = 255 - frames[4]
    assert find_defect(frames) is None


def test_sound_frames() -> None:
    assert find_defect(noise(5)) is None
