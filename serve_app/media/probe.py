"""What a file really is, found by decoding it, and whether that is what was asked for."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image, UnidentifiedImageError

from serve_app.errors import MediaError
from serve_app.media.formats import VideoFormat

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
PREVIEW_SUFFIXES = frozenset({".gif", ".webp"})
UNSPECIFIED_MATRIX = 2
"""ITU-T H.273, matrix coefficients: the file does not say."""
ACCURATE = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
"""FFmpeg's default way from YUV to RGB is faster and a level too dark, which would be taken for an error of the file."""


@dataclass(frozen=True)
class MediaFacts:
    """A media file as found. `fps`, `duration_s` and `faststart` are None for pictures, `faststart` for all but MP4."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    frames: int
    """Counted by decoding every one of them."""
    fps: float | None
    duration_s: float | None
    codec: str
    """FFmpeg's name for a video (`h264`); `png` or `jpeg` for a picture."""
    pix_fmt: str
    """FFmpeg's name for a video (`yuv420p`); Pillow's mode for a picture (`RGB`)."""
    faststart: bool | None
    """Whether the MP4's index (moov) lies before its data (mdat), so that a browser plays while it loads."""
    size_bytes: int
    shown: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    """The frames that were asked for, by index, as a player shows them: uint8 RGB [height, width, 3]."""


def probe(path: Path, show: Collection[int] = ()) -> MediaFacts:
    """Decode the whole file and say what it is; with the frames at the indices in `show` (from 0) as they look.

    Raises MediaError where it cannot be decoded. Blocks.
    """
    try:
        if path.suffix.lower() in PICTURE_SUFFIXES:
            return _picture(path)
        return _preview(path, show) if path.suffix.lower() in PREVIEW_SUFFIXES else _video(path, show)
    except (FFmpegError, UnidentifiedImageError, OSError, SyntaxError) as error:  # Pillow: SyntaxError = broken PNG
        raise MediaError(f"{path.name} cannot be decoded: {error}") from error


def check(facts: MediaFacts, **expected: float | str | bool) -> None:
    """Raise MediaError, naming every difference, unless the facts given by name are as expected.

    Numbers are compared to one part in a million: `check(facts, frames=41, fps=16, codec="h264", faststart=True)`.
    """
    differences = [
        f"{name} is {found}, not {wanted}"
        for name, wanted in expected.items()
        if not _same(found := getattr(facts, name), wanted)
    ]
    if differences:
        raise MediaError(f"the file is not what was asked for: {', '.join(differences)}")


def check_video(
    facts: MediaFacts, video_format: VideoFormat, *, width: int, height: int, frames: int, fps: int
) -> None:
    """Raise MediaError, naming every difference, unless the file is of `video_format` and shows what was encoded.

    `width`, `height` (pixels), `frames` and `fps` are those of the raw frames; of a preview, fewer are expected.
    """
    shown, rate = math.ceil(frames / video_format.every), fps / video_format.every
    told = {"pix_fmt": video_format.pix_fmt, "faststart": video_format.faststart}
    check(
        facts,
        width=width // video_format.shrink,
        height=height // video_format.shrink,
        frames=shown,
        codec=video_format.codec,
        **{name: value for name, value in told.items() if value is not None},
    )
    assert facts.duration_s is not None
    assert facts.fps is not None
    if shown == 1 and facts.duration_s == 0:  # a preview of one frame is a still picture
        return
    rounding_s = video_format.tick_s * 1.001
    if abs(facts.duration_s - shown / rate) > rounding_s:
        raise MediaError(
            f"{shown} frames at {rate:g} fps last {shown / rate:g} s; the file lasts {facts.duration_s:g} s"
        )
    if abs(1 / facts.fps - 1 / rate) > rounding_s:
        raise MediaError(f"the file shows {facts.fps:g} frames a second, not {rate:g}")


def _same(found: float | str | bool | None, wanted: float | str | bool) -> bool:
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return found == wanted


def _picture(path: Path) -> MediaFacts:
    with Image.open(path) as image:
        image.load()
        return MediaFacts(
            width=image.width,
            height=image.height,
            frames=1,
            fps=None,
            duration_s=None,
            codec=(image.format or "unknown").lower(),
            pix_fmt=image.mode,
            faststart=None,
            size_bytes=path.stat().st_size,
        )


def _preview(path: Path, show: Collection[int]) -> MediaFacts:
    with Image.open(path) as image:
        shown, duration_ms = {}, 0
        frames = getattr(image, "n_frames", 1)
        for index in range(frames):
            image.seek(index)
            image.load()
            duration_ms += image.info.get("duration", 0)
            if index in show:
                shown[index] = np.asarray(image.convert("RGB"))
        return MediaFacts(
            width=image.width,
            height=image.height,
            frames=frames,
            fps=frames * 1000 / duration_ms if duration_ms else 0.0,
            duration_s=duration_ms / 1000,
            codec=(image.format or "unknown").lower(),
            pix_fmt=image.mode,
            faststart=None,
            size_bytes=path.stat().st_size,
            shown=shown,
        )


def _video(path: Path, show: Collection[int]) -> MediaFacts:
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError(f"{path.name} holds no video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        shown, frames = {}, 0
        for frame in container.decode(stream):
            if frames in show:
                shown[frames] = as_shown(frame)
            frames += 1
        if stream.duration is not None and stream.time_base is not None:
            duration_s = float(stream.duration * stream.time_base)
        elif container.duration is not None:  # WebM tells the length of the whole file only
            duration_s = container.duration / av.time_base
        else:
            raise MediaError(f"{path.name} does not say how long it is")
        if stream.average_rate is None:
            raise MediaError(f"{path.name} does not say how many frames a second it shows")
        return MediaFacts(
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            frames=frames,
            fps=float(stream.average_rate),
            duration_s=duration_s,
            codec=stream.codec_context.codec.canonical_name,  # the decoder's own name may be that of a library
            pix_fmt=stream.codec_context.pix_fmt or "unknown",
            faststart=_index_first(path) if "mp4" in container.format.name else None,
            size_bytes=path.stat().st_size,
            shown=shown,
        )


def as_shown(frame: av.VideoFrame) -> np.ndarray:
    """The frame in RGB by its own tags; where it has none, as most players take small video: BT.601, limited range."""
    matrix = Colorspace.ITU601 if frame.colorspace == UNSPECIFIED_MATRIX else frame.colorspace
    values = ColorRange.MPEG if frame.color_range == ColorRange.UNSPECIFIED else frame.color_range
    return frame.reformat(
        format="rgb24",
        interpolation=ACCURATE,
        src_colorspace=matrix,
        dst_colorspace=matrix,
        src_color_range=values,
        dst_color_range=ColorRange.JPEG,
    ).to_ndarray()


def _index_first(path: Path) -> bool:
    """Whether `moov` comes before `mdat` among an MP4's top-level boxes (ISO/IEC 14496-12: 32-bit size, type)."""
    with path.open("rb") as file:
        while len(header := file.read(8)) == 8:
            size, kind, header_bytes = int.from_bytes(header[:4]), header[4:], 8
            if kind in (b"moov", b"mdat"):
                return kind == b"moov"
            if size == 1:  # a 64-bit size follows
                size, header_bytes = int.from_bytes(file.read(8)), 16
            if size < header_bytes:
                break
            file.seek(size - header_bytes, 1)
    return False
