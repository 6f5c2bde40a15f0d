"""Which encoder this machine has: hardware where a test encode on it succeeds, else software."""

import logging
import subprocess
from functools import cache

import ffmpeg

from serve_app.media.ffmpeg_process import ffmpeg_binary
from serve_app.media.formats import Encoder, VideoFormat

PROBE_TIMEOUT_S = 20.0
"""The first use of a card takes a second or two."""

_log = logging.getLogger(__name__)
_given_up: set[str] = set()


def encoder_for(video_format: VideoFormat) -> Encoder:
    """The best encoder of the format that works here; its name is what a receipt should tell.

    Each hardware encoder is tried once a process, with its options, on a few black frames; what was found is logged. Raises
    MediaError where there is no FFmpeg at all. Blocks for up to PROBE_TIMEOUT_S the first time.
    """
    *hardware, software = video_format.encoders
    for encoder in hardware:
        if encoder.name not in _given_up and _works(encoder.name, tuple(sorted(encoder.options.items()))):
            return encoder
    return software


def give_up(encoder: Encoder) -> None:
    """Use the encoder no more in this process: it failed after all. Cards have a limit of encodes at once, and break."""
    _log.warning("%s failed; encoding in software from now on", encoder.name)
    _given_up.add(encoder.name)


@cache
def _works(name: str, options: tuple[tuple[str, str | int], ...]) -> bool:
    """Whether FFmpeg can encode so. An NVENC build without a card or its driver says no only when it is run."""
    black = ffmpeg.input("color=black:size=640x480:rate=16:duration=0.5", format="lavfi")
    trial = black.output("-", format="null", vcodec=name, pix_fmt="yuv420p", **dict(options))
    command = ffmpeg.compile(trial.global_args("-hide_banner", "-nostdin", "-loglevel", "error"), cmd=ffmpeg_binary())
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        _log.warning("%s: no test encode within %g s; encoding in software", name, PROBE_TIMEOUT_S)
        return False
    if tried.returncode:
        _log.info("%s does not work here (%s); encoding in software", name, (tried.stderr.splitlines() or ["?"])[0])
        return False
    _log.info("%s works here and is used", name)
    return True
