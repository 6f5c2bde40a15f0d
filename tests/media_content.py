"""Synthetic moving frames with saturated colours, and how near a video comes to them."""

import hashlib
import io
from pathlib import Path

import av
import numpy as np


def moving_frames(frames: int = 41, width: int = 640, height: int = 480) -> np.ndarray:
    """uint8 RGB [frames, height, width, 3]: smooth waves that move a different way in each channel."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phases = (2 * np.pi * np.arange(frames) / frames).astype(np.float32)
    waves = [(np.sin(x / 70 + p), np.sin(y / 60 - p), np.sin((x + y) / 90 + 2 * p)) for p in phases]
    return (127.5 + 127 * np.stack([np.stack(wave, axis=-1) for wave in waves])).astype(np.uint8)


def decode_rgb(video: Path | io.BytesIO) -> np.ndarray:
    """The video's frames as a player shows them: bt709, limited range."""
    with av.open(str(video) if isinstance(video, Path) else video) as container:
        return np.stack(
            [
                frame.reformat(
                    format="rgb24",
                    src_colorspace="ITU709",
                    dst_colorspace="ITU709",
                    src_color_range="MPEG",
                    dst_color_range="JPEG",
                ).to_ndarray()
                for frame in container.decode(video=0)
            ]
        )


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays in dB."""
    mse = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)
    return float(10 * np.log10(255**2 / mse))


def shown_sha256(content: bytes) -> str:
    """SHA-256 of what a picture or video shows, decoded: the same for two files that differ in their signatures only."""
    digest = hashlib.sha256()
    with av.open(io.BytesIO(content)) as container:
        for frame in container.decode(video=0):
            digest.update(frame.to_ndarray().tobytes())
    return digest.hexdigest()
