"""Frames that nobody wants delivered: all black, or a video in which nothing moves."""

from itertools import pairwise

import numpy as np

BLACK_LEVEL = 16
"""Brightest value (of 255) of a picture that shows nothing: the black of limited-range video (ITU-R BT.709)."""
STILL_LEVEL = 1
"""Largest change of a value (of 255) between two frames that is rounding, not motion."""


def find_defect(frames: np.ndarray) -> str | None:
    """What is wrong with `frames` (uint8 RGB [frames, height, width, 3]) in words, or None.

    Stops at the first frame that is not dark and the first pair that differs, so sound clips cost two frames' reading.
    """
    if all(int(frame.max()) <= BLACK_LEVEL for frame in frames):
        return f"every frame is black (no value over {BLACK_LEVEL})"
    if len(frames) > 1 and all(
        int(np.abs(after.astype(np.int16) - before).max()) <= STILL_LEVEL for before, after in pairwise(frames)
    ):
        return f"all {len(frames)} frames are the same picture"
    return None
