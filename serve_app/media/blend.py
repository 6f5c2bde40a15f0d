"""The frames of a transition: two overlapping runs of raw frames become one."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from av import VideoFrame
from av.error import BlockingIOError as NothingYet
from av.filter import Graph
from av.filter.context import FilterContext


def blended(before: np.ndarray, after: np.ndarray, kind: str) -> Iterator[np.ndarray]:
    """The frames of a transition of `kind` (any of KINDS but `cut`), one by one, as uint8 RGB [height, width, 3].

    `before`, `after`: the overlapping frames of the clip that goes and of the clip that comes, uint8 RGB
    [frames, height, width, 3], alike in shape. Of k frames, frame i (from 0) shows the new clip to (i + 1) / (k + 1): no
    frame shows only one of the clips, so all of an overlap is a transition, and it is the same forwards and backwards.
    """
    return _crossfaded(before, after) if kind == "crossfade" else _xfaded(before, after, kind)


def _crossfaded(before: np.ndarray, after: np.ndarray) -> Iterator[np.ndarray]:
    """A linear mix of the gamma-encoded values, rounded.

    Not of linear light: encoded values are about even to the eye (C. Poynton, "Digital Video and HD", 2nd ed., ch. 27),
    so the change looks even in time. In linear light the brighter picture rules for most of the transition: half white
    and half black is 188 of 255, not 128. It is also what editing programs and `xfade=fade` do by default, save that
    `xfade` cuts fractions off, which darkens each of its frames by half a level.

    In 16-bit integers, the share of the new clip to 1/256: within one level of the exact mix, without a bias, and five
    times as fast as in floating point.
    """
    mix, incoming = np.empty(before.shape[1:], np.uint16), np.empty(before.shape[1:], np.uint16)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        share = round((index + 1) / (len(before) + 1) * 256)
        np.multiply(old, np.uint16(256 - share), out=mix, dtype=np.uint16)
        np.multiply(new, np.uint16(share), out=incoming, dtype=np.uint16)
        mix += incoming
        mix += 128  # half of the 256 that the shift divides by: rounds; the sum stays under 2^16
        mix >>= 8
        yield mix.astype(np.uint8)


def _xfaded(before: np.ndarray, after: np.ndarray, kind: str) -> Iterator[np.ndarray]:
    """FFmpeg's `xfade` filter on raw RGB frames, inside this process.

    The filter begins with the old clip alone. It is given the first pair of frames twice and the frame that comes of
    the first is left out: what follows are the k steps between the two clips.
    """
    frames, height, width = before.shape[:3]
    graph = Graph()
    sources = [_source(graph, width, height), _source(graph, width, height)]
    xfade = graph.add("xfade", f"transition={kind}:offset=0:duration={frames + 1}")  # seconds of one frame each
    for pad, source in enumerate(sources):
        planar = graph.add("format", "pix_fmts=gbrp")  # xfade takes planar RGB; both ways lose nothing
        source.link_to(planar)
        planar.link_to(xfade, 0, pad)
    packed, sink = graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")
    xfade.link_to(packed)
    packed.link_to(sink)
    graph.configure()
    for time in range(frames + 1):
        for source, clip in zip(sources, (before, after), strict=True):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(clip[max(time - 1, 0)]), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1)
            source.push(frame)
        for pulled in _pulled(sink):
            if pulled.pts:
                yield pulled.to_ndarray()


def _source(graph: Graph, width: int, height: int) -> FilterContext:
    return graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgb24:time_base=1/1:frame_rate=1/1")


def _pulled(sink: FilterContext) -> Iterator[VideoFrame]:
    while True:
        try:
            frame = sink.pull()
        except NothingYet:
            return
        assert isinstance(frame, VideoFrame)
        yield frame
