"""Job -> clips: into how many clips a long video is cut, and how long each is. Pure."""

import math

from serve_app.jobs.presets import FPS, MAX_FRAMES


def frames_of(seconds: float) -> int:
    """Frames nearest to so many seconds, at 16 a second."""
    return round(seconds * FPS)


def generated_frames(frames: int) -> int:
    """Frames that are generated for a clip of `frames`: the model makes 4k+1, and the rest is trimmed from the end."""
    return 4 * math.ceil((frames - 1) / 4) + 1


def cut_evenly(total: int, overlap: int) -> list[int]:
    """Frames of the fewest clips, equal to one frame, that make `total` frames where each joint takes `overlap` of them.

    n clips of L frames make n·L - (n-1)·overlap frames. Raises ValueError where a joint would take a whole clip.
    """
    if total <= MAX_FRAMES:
        return [total]
    if overlap >= MAX_FRAMES:
        raise ValueError(f"a transition of {overlap} frames leaves nothing of a clip of {MAX_FRAMES}")
    n = math.ceil((total - overlap) / (MAX_FRAMES - overlap))
    needed = total + (n - 1) * overlap
    return [needed // n + (i < needed % n) for i in range(n)]
