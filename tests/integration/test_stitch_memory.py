"""Memory of stitching and encoding does not grow with the number of clips: seen from outside, in a process of its own."""

import subprocess
import sys

FRAMES, WIDTH, HEIGHT = 81, 320, 240
CLIP_MB = FRAMES * WIDTH * HEIGHT * 3 / 1e6

STITCH = f"""
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage

import numpy as np

from serve_app.media.encode import encode_video
from serve_app.media.probe import check, probe
from serve_app.media.stitch import stitched
from serve_app.jobs.transitions import Transition

def peaks_mb():
    return [getrusage(who).ru_maxrss / 1e3 for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]

def clip(index):
    return np.full(({FRAMES}, {HEIGHT}, {WIDTH}, 3), 40 * index % 256, np.uint8)

count, out = int(sys.argv[1]), Path(sys.argv[2])
kinds = ["crossfade", "wipeleft"]
joints = [Transition(kinds[index % 2], 8) for index in range(count - 1)]
total = count * {FRAMES} - 8 * (count - 1)
encode_video(np.full((1, {HEIGHT}, {WIDTH}, 3), 9, np.uint8), out, fps=16, timeout_s=60)
before = peaks_mb()[0]
encode_video(stitched((clip(index) for index in range(count)), joints, total), out, fps=16, timeout_s=60)
own, ffmpeg = peaks_mb()
check(probe(out), frames=total, duration_s=total / 16)
print(own - before, ffmpeg)
"""


def _peaks_mb(clips: int, out) -> tuple[float, float]:
    """How much the process grew by stitching, and FFmpeg's peak."""
    said = subprocess.run(
        [sys.executable, "-c", STITCH, str(clips), str(out)], capture_output=True, text=True, check=True, timeout=120
    )
    own, encoder = map(float, said.stdout.split())
    return own, encoder


def test_memory_is_flat_in_the_number_of_clips(tmp_path):
    few, encoder_few = _peaks_mb(3, tmp_path / "v.mp4")
    many, encoder_many = _peaks_mb(12, tmp_path / "v.mp4")
    assert many < 2 * CLIP_MB
    assert many - few < CLIP_MB / 2
    assert encoder_many - encoder_few < CLIP_MB
