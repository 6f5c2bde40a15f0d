"""Frames -> pictures: PNG for delivered images, JPEG for posters of videos."""

from pathlib import Path

import numpy as np
from PIL import Image

from serve_app.errors import MediaError
from serve_app.media.whole import os_error, written_whole

POSTER_JPEG_QUALITY = 88
"""Posters are looked at small and loaded often; at 88 artefacts are not seen and 640x480 takes some 50 KB."""


def write_png(frame: np.ndarray, path: Path) -> None:
    """Write a frame (uint8 RGB [height, width, 3]) as PNG, lossless. Raises MediaError."""
    _save(frame, path, "PNG")


def write_poster(frame: np.ndarray, path: Path) -> None:
    """Write a frame (uint8 RGB [height, width, 3]) as JPEG. Raises MediaError."""
    _save(frame, path, "JPEG", quality=POSTER_JPEG_QUALITY)


def poster_index(frames: int) -> int:
    """Which of `frames` frames stands for the video: the middle one.

    A poster is seen alone, in lists, and should show what the video is about; the first frame shows the scene before
    anything has happened in it.
    """
    return frames // 2


def _save(frame: np.ndarray, path: Path, picture_format: str, **options: int) -> None:
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise MediaError(
            f"the picture is {frame.dtype} of shape {frame.shape}; it must be uint8 RGB [height, width, 3]"
        )
    with written_whole(path) as part:
        try:
            Image.fromarray(frame).save(part, picture_format, **options)
        except OSError as error:
            raise os_error(error, path) from error
