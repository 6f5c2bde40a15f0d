"""Whether a file shows the frames that it was made of, in their colours."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from serve_app.errors import MediaError
from serve_app.media.formats import VideoFormat
from serve_app.media.probe import MediaFacts

BLOCK = 16
"""Pixels of the raw frame that are averaged each way before the comparison: coding noise and dithering are gone then,
wrong colours are not."""


def check_colours(facts: MediaFacts, raw: Mapping[int, np.ndarray], video_format: VideoFormat) -> float:
    """The largest mean absolute difference of a decoded frame and its raw one, in levels of 255, over blocks of pixels.

    `raw`: frames by their index before encoding, uint8 RGB [height, width, 3]. `facts`: of a probe that was asked to show
    `decoded_indices(raw, video_format)`. Raises MediaError where a frame is missing or off by over `video_format.largest_difference`.
    """
    worst = 0.0
    for index in decoded_indices(raw, video_format):
        if index not in facts.shown:
            raise MediaError(f"frame {index} of the file was to be compared with the raw one and is not there")
        difference = colour_difference(facts.shown[index], raw[index * video_format.every])
        if difference > video_format.largest_difference:
            raise MediaError(
                f"frame {index} of the file is {difference:.1f} of 255 away from the raw one on the mean;"
                f" {video_format.largest_difference:g} is the most that coding explains",
                hint="The colour conversion or the order of the frames is wrong: this file must not be delivered.",
            )
        worst = max(worst, difference)
    return worst


def decoded_indices(raw: Mapping[int, np.ndarray], video_format: VideoFormat) -> list[int]:
    """Where in the file the raw frames are; those that the format leaves out are left out."""
    return [index // video_format.every for index in sorted(raw) if index % video_format.every == 0]


def colour_difference(shown: np.ndarray, raw: np.ndarray) -> float:
    """Mean absolute difference of two frames (uint8 RGB, any size), each averaged over the same blocks, 0 to 255."""
    size = (max(1, raw.shape[1] // BLOCK), max(1, raw.shape[0] // BLOCK))
    a, b = (np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BOX), np.int16) for one in (shown, raw))
    return float(np.abs(a - b).mean())
