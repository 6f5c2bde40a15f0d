"""Frames -> video files: raw RGB through a pipe into one FFmpeg, each file encoded once."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import ffmpeg
import numpy as np

from serve_app.errors import MediaError
from serve_app.media.ffmpeg_process import ffmpeg_binary, run_ffmpeg
from serve_app.media.formats import MP4, Encoder, VideoFormat
from serve_app.media.whole import written_whole


@dataclass(frozen=True)
class Target:
    """A file that frames are to become."""

    path: Path
    video_format: VideoFormat
    encoder: Encoder
    """One of the format's."""


def encode_video(
    frames: np.ndarray | Iterable[np.ndarray],
    path: Path,
    *,
    fps: int,
    timeout_s: float,
    video_format: VideoFormat = MP4,
    encoder: Encoder | None = None,
    crf: int | None = None,
    preset: str | None = None,
) -> None:
    """Encode frames as one file, as `encode_videos` does.

    `encoder`: one of the format's; None for its last, which runs on any CPU. `crf` and `preset` replace that encoder's own quality and
    speed.
    """
    chosen = (encoder or video_format.encoders[-1]).changed(crf=crf, preset=preset)
    encode_videos(frames, [Target(path, video_format, chosen)], fps=fps, timeout_s=timeout_s)


def encode_videos(
    frames: np.ndarray | Iterable[np.ndarray], targets: Sequence[Target], *, fps: int, timeout_s: float
) -> None:
    """Encode frames as all `targets` at once.

    `frames`: uint8 RGB, an array of shape [frames, height, width, 3], or an iterable of such blocks or of single frames
    [height, width, 3], taken one at a time, so a video need never be whole in memory; width and height even. Exactly
    these frames are in each file (of previews: every `video_format.every`th), `fps` of them a second. The files appear
    whole or not at all, and FFmpeg has ended when the call ends, also when `frames` raises (which passes through).

    Blocks. Raises MediaError for unusable frames, a missing FFmpeg and a full disk; EncodingFailed for an FFmpeg that fails (with its
    last lines), or neither takes nor makes anything for `timeout_s` seconds; time that `frames` takes to give the next one does not
    count.
    """
    checked = _checked(frames)
    first = next(checked, None)
    if first is None:
        raise MediaError("there are no frames to encode", hint="A clip has 1 to 81 frames.")
    with ExitStack() as files:
        parts = [files.enter_context(written_whole(target.path.resolve())) for target in targets]
        raw = ffmpeg.input(
            "pipe:", format="rawvideo", pixel_format="rgb24", video_size=first.shape[1::-1], framerate=fps
        )
        command = _command(raw, targets, parts, fps)
        run_ffmpeg(command, chain([first], checked), [target.path for target in targets], timeout_s)


def _checked(frames: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames one by one, C-contiguous, each found to be uint8 [height, width, 3] of the first one's even size."""
    if isinstance(frames, np.ndarray) and frames.ndim != 4:
        raise MediaError(f"frames have shape {frames.shape}; they must have shape [frames, height, width, 3]")
    size = None
    for index, frame in enumerate(_singly(frames)):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise MediaError(
                f"frame {index} is {frame.dtype} of shape {frame.shape}; it must be uint8 [height, width, 3]"
            )
        height, width = frame.shape[:2]
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise MediaError(f"frame {index} is {width}x{height}; yuv420p needs an even width and height")
        if frame.shape != (size := size or frame.shape):
            raise MediaError(f"frame {index} is {width}x{height}; the frames before it are {size[1]}x{size[0]}")
        yield np.ascontiguousarray(frame)


def _singly(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for block in frames:
        if block.ndim == 4:
            yield from block
        else:
            yield block


def _command(raw: Any, targets: Sequence[Target], parts: Sequence[Path], fps: int) -> list[str]:
    copies = raw.split() if len(targets) > 1 else [raw]
    outputs = []
    for index, (target, part) in enumerate(zip(targets, parts, strict=True)):
        video_format = target.video_format
        # The default, 1000, would round the length that players show to milliseconds.
        timescale = {"movie_timescale": fps * 1000} if video_format.container == "mp4" else {}
        options = {**target.encoder.options, **video_format.muxer, **timescale}
        shown = video_format.filters(copies[index], video_format.shrink)
        outputs.append(shown.output(str(part), format=video_format.container, vcodec=target.encoder.name, **options))
    graph = ffmpeg.merge_outputs(*outputs).global_args(
        "-hide_banner", "-nostdin", "-loglevel", "error", "-progress", "pipe:1"
    )
    return ffmpeg.compile(graph, cmd=ffmpeg_binary())
