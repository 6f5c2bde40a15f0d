"""Clips -> one video's frames, blended raw, so that the whole is encoded once."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from serve_app.errors import MediaError
from serve_app.jobs.transitions import CUT, Transition, check_overlaps
from serve_app.media.blend import blended

BLOCK_FRAMES = 8
"""Longest block: 7 MB at 640x480. Blocks are copies, so that whoever still holds one does not hold its whole clip."""


def stitched(clips: Iterable[np.ndarray], joints: Sequence[Transition], total_frames: int) -> Iterator[np.ndarray]:
    """The video's frames in order, in blocks of 1 to BLOCK_FRAMES: uint8 RGB [frames, height, width, 3].

    `clips`: uint8 RGB [frames, height, width, 3], all of one size; `joints[i]` joins clip i with clip i + 1. The end is
    trimmed: the blocks have `total_frames` frames together, which may be fewer than `stitched_frames` says.

    A clip is asked for when its turn comes and let go before the next one is, so clips from a generator are in memory
    one at a time, with the copy of an overlap.

    Raises MediaError for clips that do not fit together or are too short, InvalidValue where a clip is shorter than its
    two overlaps. Both come when the clip's turn does: check plans with `stitched_frames`.
    """
    left = total_frames
    for block in _joined(iter(clips), joints):
        yield block[:left]
        left -= len(block)
        if left <= 0:
            return
    raise MediaError(f"the clips have {total_frames - left} frames together; {total_frames} were to come of them")


def _joined(clips: Iterator[np.ndarray], joints: Sequence[Transition]) -> Iterator[np.ndarray]:
    tail, size = np.empty(0, np.uint8), None
    for index in range(len(joints) + 1):
        clip = next(clips, None)
        if clip is None:
            raise MediaError(f"there are {index} clips; with {len(joints)} joints there must be {len(joints) + 1}")
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or clip.shape[1:] != (size or clip.shape[1:]):
            wanted = f"[frames, {size[0]}, {size[1]}, 3]" if size else "[frames, height, width, 3]"
            raise MediaError(f"clip {index} is {clip.dtype} of shape {clip.shape}; it must be uint8 {wanted}")
        size = clip.shape[1:]
        into = joints[index - 1] if index else CUT
        out_of = joints[index] if index < len(joints) else CUT
        check_overlaps(index, len(clip), into, out_of)
        if into.frames:
            for frame in blended(tail, clip[: into.frames], into.kind):
                yield frame[np.newaxis]
        end = len(clip) - out_of.frames
        for start in range(into.frames, end, BLOCK_FRAMES):
            yield clip[start : min(start + BLOCK_FRAMES, end)].copy()
        tail = clip[end:].copy()
        del clip
    if next(clips, None) is not None:
        raise MediaError(f"there are more clips than the {len(joints) + 1} that {len(joints)} joints join")
