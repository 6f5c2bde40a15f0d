"""Stitching raw clips and encoding once, against the usual way: encode each clip, then decode, FFmpeg's xfade, encode again.

    python -m benchmarks.stitch            # 2, 4 and 12 clips of 81 frames at 640x480, three times: some minutes, 1 GB on disk
    python -m benchmarks.stitch --quick    # 2 and 3 clips, once

Both ways take the same clips from the same files, use x264 at the same quality and speed, and run in a fresh process each
time, in turn. Time is from the first clip to the closed file, CPU time that of the process and its FFmpeg meanwhile (the
fairer figure on a machine that does other work too); both are medians of the repeats. Memory is the most that the process
and its FFmpeg had resident together, sampled every 50 ms. PSNR is that of the decoded file against the blend of the raw
frames, in RGB; xfade's weights are a step behind ours, so each way is held against the blend by its own weights.

Prints a table and writes `benchmarks/results/stitch.json` and `stitch.png`.
"""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Annotated

import av
import ffmpeg
import numpy as np
import psutil
import typer
from imageio_ffmpeg import get_ffmpeg_exe
from rich.console import Console
from rich.table import Table

from benchmarks.stitch_clips import clip_path, write_clips
from serve_app.jobs.transitions import Transition, stitched_frames
from serve_app.media.encode import encode_video
from serve_app.media.probe import as_shown, check, probe
from serve_app.media.stitch import stitched

RESULTS = Path(__file__).parent / "results"
FRAMES, WIDTH, HEIGHT, FPS, OVERLAP = 81, 640, 480, 16, 8
CRF, PRESET = 18, "veryfast"
TIMEOUT_S = 300.0
SAMPLE_S = 0.05
MB = 1e6

Weights = Callable[[int], float]
"""The share of the new clip in frame i of an overlap."""


@dataclass(frozen=True)
class Run:
    """One stitching."""

    seconds: float
    cpu_s: float
    peak_mb: float


@dataclass(frozen=True)
class Quality:
    """Of a file against the raw blend. PSNR in dB, over the RGB values."""

    size_mb: float
    psnr_db: float
    overlaps_psnr_db: float


@dataclass(frozen=True)
class Row:
    """One way with one number of clips: medians of the runs."""

    way: str
    clips: int
    seconds: float
    cpu_s: float
    peak_mb: float
    quality: Quality
    runs: list[Run]


# ---- the two ways -----------------------------------------------------------------------------------------------------


def blend_raw(folder: Path, clips: int, out: Path) -> None:
    """Ours."""
    joints = [Transition(frames=OVERLAP)] * (clips - 1)
    loaded = (np.load(clip_path(folder, index)) for index in range(clips))
    blocks = stitched(loaded, joints, stitched_frames([FRAMES] * clips, joints))
    encode_video(blocks, out, fps=FPS, crf=CRF, preset=PRESET, timeout_s=TIMEOUT_S)


def encode_twice(folder: Path, clips: int, out: Path) -> None:
    """The usual way."""
    with tempfile.TemporaryDirectory(dir=folder) as parts:
        for index in range(clips):
            part = Path(parts) / f"{index}.mp4"
            encode_video(np.load(clip_path(folder, index)), part, fps=FPS, crf=CRF, preset=PRESET, timeout_s=TIMEOUT_S)
        streams = [ffmpeg.input(f"{parts}/{index}.mp4").filter("settb", f"1/{FPS}") for index in range(clips)]
        whole = streams[0]
        for index, stream in enumerate(streams[1:], 1):
            whole = ffmpeg.filter(
                [whole, stream],
                "xfade",
                transition="fade",
                duration=OVERLAP / FPS,
                offset=index * (FRAMES - OVERLAP) / FPS,
            )
        graph = whole.output(str(out), vcodec="libx264", crf=CRF, preset=PRESET, movflags="+faststart")
        command = ffmpeg.compile(graph.global_args("-loglevel", "error", "-nostdin", "-y"), cmd=get_ffmpeg_exe())
        subprocess.run(command, check=True, timeout=TIMEOUT_S)


@dataclass(frozen=True)
class Way:
    """A way to stitch, by the name that tables show."""

    name: str
    stitch: Callable[[Path, int, Path], None]
    weights: Weights


WAYS = (
    Way("blend raw, encode once", blend_raw, lambda index: (index + 1) / (OVERLAP + 1)),
    Way("encode, xfade, encode again", encode_twice, lambda index: index / OVERLAP),
)


# ---- measuring --------------------------------------------------------------------------------------------------------


def measured(way: Way, folder: Path, clips: int, out: Path) -> Run:
    """Run it in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_timed, args=(WAYS.index(way), folder, clips, out, theirs))
    process.start()
    peak = 0
    while not ours.poll(SAMPLE_S) and process.is_alive():
        peak = max(peak, _resident_bytes(process.pid))
    seconds, cpu_s = ours.recv()
    process.join()
    return Run(seconds, cpu_s, peak / MB)


def _timed(way: int, folder: Path, clips: int, out: Path, result: Connection) -> None:
    began, cpu_began = time.perf_counter(), _cpu_s()
    WAYS[way].stitch(folder, clips, out)
    result.send((time.perf_counter() - began, _cpu_s() - cpu_began))


def _cpu_s() -> float:
    return sum(used.ru_utime + used.ru_stime for used in map(getrusage, (RUSAGE_SELF, RUSAGE_CHILDREN)))


def _resident_bytes(pid: int | None) -> int:
    total = 0
    try:
        whole = psutil.Process(pid)
        for process in (whole, *whole.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:  # one ended meanwhile
        pass
    return total


def quality(way: Way, folder: Path, clips: int, out: Path) -> Quality:
    """How near the file comes to the raw blend. Raises MediaError where its length is not that of the blend."""
    errors: dict[bool, list[float]] = {True: [], False: []}
    total = clips * FRAMES - (clips - 1) * OVERLAP
    check(probe(out), frames=total, fps=FPS, faststart=True)
    with av.open(str(out)) as container:
        decoded = (as_shown(frame) for frame in container.decode(video=0))
        for shown, (raw, is_mixed) in zip(decoded, reference(folder, clips, way.weights), strict=True):
            errors[is_mixed].append(float(np.mean((shown.astype(np.float32) - raw) ** 2)))
    return Quality(out.stat().st_size / MB, _psnr_db(errors[True] + errors[False]), _psnr_db(errors[True]))


def reference(folder: Path, clips: int, weights: Weights) -> Iterator[tuple[np.ndarray, bool]]:
    """The frames of the raw blend before rounding, each with whether it is of an overlap. Written apart from the service's."""
    tail = None
    for index in range(clips):
        frames = np.load(clip_path(folder, index))
        if tail is not None:
            for place, (old, new) in enumerate(zip(tail, frames, strict=False)):
                yield old * (1 - weights(place)) + new * weights(place), True
        last = FRAMES if index == clips - 1 else FRAMES - OVERLAP
        yield from ((frame, False) for frame in frames[0 if tail is None else OVERLAP : last])
        tail = frames[-OVERLAP:].copy()


def _psnr_db(mean_squares: list[float]) -> float:
    return float(10 * np.log10(255**2 / np.mean(mean_squares)))


def compare(folder: Path, clips: int, repeats: int) -> list[Row]:
    """Both ways on the first `clips` clips in the folder, in turn."""
    runs: dict[str, list[Run]] = {way.name: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            runs[way.name].append(measured(way, folder, clips, folder / f"{WAYS.index(way)}.mp4"))
    return [
        Row(
            way.name,
            clips,
            statistics.median(run.seconds for run in runs[way.name]),
            statistics.median(run.cpu_s for run in runs[way.name]),
            max(run.peak_mb for run in runs[way.name]),
            quality(way, folder, clips, folder / f"{WAYS.index(way)}.mp4"),
            runs[way.name],
        )
        for way in WAYS
    ]


# ---- telling ----------------------------------------------------------------------------------------------------------


def show(console: Console, rows: list[Row]) -> None:
    """Print the table."""
    table = Table("clips", "way", "s", "times faster", "CPU s", "peak MB", "size MB", "PSNR dB", "overlaps dB")
    for row in rows:
        usual = next(other for other in rows if other.clips == row.clips and other.way == WAYS[1].name)
        table.add_row(
            str(row.clips), row.way, f"{row.seconds:.1f}", f"{usual.seconds / row.seconds:.2f}", f"{row.cpu_s:.1f}",
            f"{row.peak_mb:.0f}",
            f"{row.quality.size_mb:.1f}", f"{row.quality.psnr_db:.2f}", f"{row.quality.overlaps_psnr_db:.2f}",
        )  # fmt: skip
    console.print(table)


def plot(rows: list[Row], path: Path) -> None:
    """Draw time, memory and PSNR over the number of clips."""
    import matplotlib  # here: the measured processes import this file, and its memory would count

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Row], float]]] = [
        ("time, s", lambda row: row.seconds),
        ("peak memory, MB", lambda row: row.peak_mb),
        ("PSNR against the raw blend, dB", lambda row: row.quality.psnr_db),
        ("PSNR in the overlaps, dB", lambda row: row.quality.overlaps_psnr_db),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 3.6), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        for way in WAYS:
            own = [row for row in rows if row.way == way.name]
            axis.plot([row.clips for row in own], [value(row) for row in own], marker="o", label=way.name)
        axis.set(title=title, xlabel="clips", xticks=sorted({row.clips for row in rows}))
        axis.grid(alpha=0.3)
        if "PSNR" not in title:
            axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    said = subprocess.run([get_ffmpeg_exe(), "-version"], capture_output=True, text=True, check=True).stdout
    return {
        "cpu": cpus[0] if cpus else "",
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "ffmpeg": said.split(" Copyright")[0],
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 and 3 clips, once.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for stitch.json and stitch.png.")] = RESULTS,
) -> None:
    """Compare both ways."""
    console = Console()
    counts, repeats = ((2, 3), 1) if quick else ((2, 4, 12), 3)
    found = {
        "quick": quick, "machine": machine(), "frames_a_clip": FRAMES, "size": f"{WIDTH}x{HEIGHT}", "overlap_frames": OVERLAP,
        "crf": CRF, "preset": PRESET, "clip_mb": FRAMES * WIDTH * HEIGHT * 3 / MB,
    }  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory(prefix="stitch-") as folder:
        with console.status("making the clips"):
            write_clips(Path(folder), max(counts), frames=FRAMES, width=WIDTH, height=HEIGHT)
        for clips in counts:
            with console.status(f"stitching {clips} clips"):
                rows += compare(Path(folder), clips, repeats)
    show(console, rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "stitch.json").write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    plot(rows, out / "stitch.png")
    console.print(f"written to {out / 'stitch.json'} and stitch.png", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
