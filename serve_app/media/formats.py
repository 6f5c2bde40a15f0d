"""The formats of videos: what each file is called, what is in it, and which FFmpeg encoders make it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ffmpeg

Options = Mapping[str, str | int]
Filters = Callable[[Any, int], Any]
"""Takes a stream of raw RGB of ffmpeg-python's graph and what the format shrinks by, and gives the stream for the encoder."""


@dataclass(frozen=True)
class Encoder:
    """One of FFmpeg's encoders, and how it is run."""

    name: str
    options: Options = field(default_factory=dict)
    is_hardware: bool = False

    def changed(self, **options: str | int | None) -> "Encoder":
        """The same encoder with other options; those that are None stay as they are."""
        named = {name: value for name, value in options.items() if value is not None}
        return replace(self, options={**self.options, **named})


@dataclass(frozen=True)
class VideoFormat:
    """A kind of video file."""

    name: str
    """As requests name it."""
    file_name: str
    content_type: str
    container: str
    """FFmpeg's name of the muxer."""
    codec: str
    """What a probe of the file finds, as is `pix_fmt`."""
    pix_fmt: str | None
    """None where each frame has its own."""
    filters: Filters
    encoders: tuple[Encoder, ...]
    """The best first; the last runs on any CPU."""
    muxer: Options = field(default_factory=dict)
    faststart: bool | None = None
    """Whether the index comes first; None where the container has none."""
    tick_s: float = 1e-6
    """How exactly the container can tell a length in seconds."""
    every: int = 1
    """1: all frames. n: the first of every n, at an nth of the rate."""
    shrink: int = 1
    """1: full size. n: an nth of the width and of the height."""
    largest_difference: float = 12.0
    """How far a decoded frame may be from its raw one: mean absolute difference over blocks of 16x16 pixels, in levels of
    255. Right files of natural content stay under 1.1, of coloured noise under 3.5, of blocks of random pure colours, which
    4:2:0 cannot hold, under 7.1 (at crf 28). A wrong order of channels, or another frame, is off by tens. BT.601 for BT.709 is
    off by up to 8, which tests of known content find; a right file must never be refused."""

    def of_upscaled(self, factor: int) -> "VideoFormat":
        """The format for frames that were upscaled: a preview stays as small as it was."""
        return self if self.shrink == 1 else replace(self, shrink=self.shrink * factor)


def _bt709(stream: Any, _: int) -> Any:
    """yuv420p in BT.709, limited range.

    Converts for bt709, then tags the frames so. Either alone gives wrong colours in some player or FFmpeg version: output
    options such as -colorspace neither convert in FFmpeg 5 nor tag primaries and transfer in FFmpeg 9.
    """
    return (
        stream.filter("scale", out_color_matrix="bt709", out_range="tv")
        .filter("format", "yuv420p")
        .filter("setparams", colorspace="bt709", color_primaries="bt709", color_trc="bt709", range="tv")
    )


def _preview(stream: Any, shrink: int) -> Any:
    return stream.filter("framestep", PREVIEW_EVERY).filter("scale", f"iw/{shrink}", f"ih/{shrink}", flags="area")


def _webp(stream: Any, shrink: int) -> Any:
    """libwebp takes RGB and converts it as the WebP format says."""
    return _preview(stream, shrink).filter("format", "bgra")


def _gif(stream: Any, shrink: int) -> Any:
    """A palette for each frame: one for all would need the whole video in memory before the first frame is written."""
    shown, measured = (copies := _preview(stream, shrink).split())[0], copies[1]
    return ffmpeg.filter([shown, measured.filter("palettegen", stats_mode="single")], "paletteuse", new=1)


PREVIEW_EVERY = 2
PREVIEW_SHRINK = 2
"""Previews show every second frame at half the generated size: an eighth of the pixels, for chats and lists that play no video."""

MP4 = VideoFormat(
    name="mp4",
    file_name="video.mp4",
    content_type="video/mp4",
    container="mp4",
    codec="h264",
    pix_fmt="yuv420p",
    filters=_bt709,
    encoders=(
        Encoder(
            "h264_nvenc", {"preset": "p5", "rc": "vbr", "cq": 19, "video_bitrate": 0, "spatial-aq": 1}, is_hardware=True
        ),
        Encoder("libx264", {"crf": 18, "preset": "veryfast"}),
    ),
    muxer={"movflags": "+faststart"},
    faststart=True,
)

H265 = VideoFormat(
    name="h265",
    file_name="video_h265.mp4",
    content_type="video/mp4",
    container="mp4",
    codec="hevc",
    pix_fmt="yuv420p",
    filters=_bt709,
    encoders=(
        Encoder(
            "hevc_nvenc", {"preset": "p5", "rc": "vbr", "cq": 21, "video_bitrate": 0, "spatial-aq": 1}, is_hardware=True
        ),
        Encoder("libx265", {"crf": 20, "preset": "fast", "x265-params": "log-level=error"}),
    ),
    muxer={"movflags": "+faststart", "tag:v": "hvc1"},  # the tag that Apple's players ask for
    faststart=True,
)

AV1 = VideoFormat(
    name="av1",
    file_name="video_av1.mp4",
    content_type="video/mp4",
    container="mp4",
    codec="av1",
    pix_fmt="yuv420p",
    filters=_bt709,
    encoders=(Encoder("libsvtav1", {"crf": 26, "preset": 8}),),
    muxer={"movflags": "+faststart"},
    faststart=True,
)

WEBM = VideoFormat(
    name="webm",
    file_name="video.webm",
    content_type="video/webm",
    container="webm",
    codec="vp9",
    pix_fmt="yuv420p",
    filters=_bt709,
    encoders=(Encoder("libvpx-vp9", {"crf": 28, "video_bitrate": 0, "deadline": "good", "cpu-used": 4, "row-mt": 1}),),
    tick_s=1e-3,
)

GIF = VideoFormat(
    name="gif",
    file_name="preview.gif",
    content_type="image/gif",
    container="gif",
    codec="gif",
    pix_fmt=None,
    filters=_gif,
    encoders=(Encoder("gif"),),
    tick_s=1e-2,
    every=PREVIEW_EVERY,
    shrink=PREVIEW_SHRINK,
)

WEBP = VideoFormat(
    name="webp",
    file_name="preview.webp",
    content_type="image/webp",
    container="webp",
    codec="webp",
    pix_fmt="RGB",
    filters=_webp,
    encoders=(Encoder("libwebp_anim", {"quality": 80, "compression_level": 4}),),
    muxer={"loop": 0},
    tick_s=1e-3,
    every=PREVIEW_EVERY,
    shrink=PREVIEW_SHRINK,
    largest_difference=24.0,  # at half size, 4:2:0 again: 12.3 on blocks of pure colours
)

FORMATS: Mapping[str, VideoFormat] = {one.name: one for one in (MP4, H265, AV1, WEBM, GIF, WEBP)}
"""All formats by name; the first is the default."""
