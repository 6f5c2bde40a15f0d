"""From the last denoise step to a delivered file: frames -> stitched, encoded, marked, checked and stored in a local folder.

    python -m benchmarks.finish            # a clip of 81 frames at 640x480, nine times: half a minute

Does what a finisher does for a video_high job, with its own functions, and times each of them. What it leaves out is the way of
the frames from the generator (75 MB through Ray's object store, 0.1 to 0.2 s) and the VAE decode, which is the GPU's. The first
run of a process also tries whether there is a hardware encoder; it stands apart. Medians, least and most of the others.

Prints a table and writes `benchmarks/results/finish.json`.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.stitch import machine
from benchmarks.stitch_clips import clip
from serve_app.jobs.job import JobSpec
from serve_app.jobs.presets import PRESETS, JobType
from serve_app.media import finish
from serve_app.media.certificates import SigningCertificate
from serve_app.media.provenance import ready_certificate
from serve_app.settings import Settings
from serve_app.storage.local import LocalStore

RESULTS = Path(__file__).parent / "results"
STAGES = {
    "encode_videos": "stitch and encode",
    "mark": "mark and sign",
    "probe": "decode again",
    "check_colours": "compare colours",
    "write_poster": "poster",
    "_artifact": "checksums",
}
"""The functions that `make_files` calls, and what the table calls them."""
RECEIPT = {"job_id": "0199f2f0a1b2c3d4e5f60718293a", "model": "benchmark", "model_revision": None}


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Within the block, how many seconds each stage took so far."""
    seconds: dict[str, float] = defaultdict(float)

    def timing(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[stage] += time.perf_counter() - began

        return run

    with ExitStack() as patches:
        for name, stage in STAGES.items():
            patches.enter_context(patch.object(finish, name, timing(getattr(finish, name), stage)))
        yield seconds


def delivered(
    spec: JobSpec, frames: np.ndarray, settings: Settings, certificate: SigningCertificate, *, key: str
) -> dict[str, float]:
    """Seconds of each stage of one job, and of the whole."""
    store = LocalStore(settings.artifacts_dir)
    with timed() as seconds, tempfile.TemporaryDirectory(prefix="finish-") as folder:
        began = time.perf_counter()
        files = finish.make_files(
            spec, iter([frames]), Path(folder), settings, receipt=RECEIPT, certificate=certificate
        )
        stored = time.perf_counter()
        for file in files:
            store.put(f"{key}/1/{file.name}", Path(folder) / file.name, file.content_type)
        ended = time.perf_counter()
    return {**seconds, "store": ended - stored, "whole": ended - began}


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 9,
    out: Annotated[Path, typer.Option(help="Folder for finish.json.")] = RESULTS,
) -> None:
    """Measure and tell."""
    console, preset = Console(), PRESETS[JobType.VIDEO_HIGH]
    spec = JobSpec(
        type=JobType.VIDEO_HIGH, prompt="", negative_prompt="", resolution=preset.resolution,
        video_length=preset.video_length, sample_steps=preset.sample_steps, guidance_scale=preset.guidance_scale,
        sample_shift=preset.sample_shift, seed=0,
    )  # fmt: skip
    found = {"machine": machine(), "frames": spec.video_length, "resolution": spec.resolution}
    with console.status("making the clip"):
        frames = clip(0, spec.video_length, spec.width, spec.height)
    with tempfile.TemporaryDirectory(prefix="finish-data-") as data, console.status("delivering"):
        settings = Settings(data_dir=Path(data))
        certificate = ready_certificate(settings)
        first, *runs = [
            delivered(spec, frames, settings, certificate, key=f"run{index}") for index in range(repeats + 1)
        ]
    rows = {
        stage: {
            "median_s": statistics.median(run[stage] for run in runs),
            "least_s": min(run[stage] for run in runs),
            "most_s": max(run[stage] for run in runs),
            "first_s": first[stage],
        }
        for stage in runs[0]
    }
    table = Table("stage", "median s", "least", "most", "first run")
    for stage, row in rows.items():
        table.add_row(stage, *(f"{value:.3f}" for value in row.values()))
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "finish.json").write_text(json.dumps({**found, "stages": rows, "runs": [first, *runs]}, indent=2) + "\n")
    console.print(f"written to {out / 'finish.json'}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
