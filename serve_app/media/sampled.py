"""A few frames of a video that passes by only once: for its poster, its contact sheet and its checks."""

from collections.abc import Collection, Iterable, Iterator

import numpy as np


class Sampled:
    """Passes blocks of frames on and keeps copies of some frames. For one reading."""

    def __init__(self, blocks: Iterable[np.ndarray], indices: Collection[int]) -> None:
        """`blocks`: uint8 RGB [frames, height, width, 3]; `indices`: which frames are kept, counted over all blocks."""
        self._blocks, self._indices = blocks, frozenset(indices)
        self.frames: dict[int, np.ndarray] = {}
        """The kept frames that have passed so far, by index."""

    def __iter__(self) -> Iterator[np.ndarray]:
        passed = 0
        for block in self._blocks:
            for index in self._indices.intersection(range(passed, passed + len(block))):
                self.frames[index] = block[index - passed].copy()
            passed += len(block)
            yield block


def spread_indices(frames: int, count: int) -> list[int]:
    """The middles of `count` equal parts of a video of `frames` frames; all frames where there are no more."""
    if frames <= count:
        return list(range(frames))
    return [(2 * part + 1) * frames // (2 * count) for part in range(count)]
