"""What upscaling takes: seconds for a million generated pixels, and memory, by the size of tiles.

    python -m benchmarks.upscale                                # realesr-animevideov3, tiles of 256 and 512: two minutes on two cores
    python -m benchmarks.upscale --model realesrgan-x4plus      # deeper, some thirty times slower: for GPUs
    python -m benchmarks.upscale --model NET.onnx --device cuda

A frame of 640x480 is made four times as large (x2 takes the same and a Lanczos filter besides). Each size of tiles runs in a fresh
process, which upscales a frame to warm up and then `--repeats` more; peak memory is the process's, on a GPU without the GPU's. The
median over the frames is what the setting `upscale_s_per_megapixel` wants to know.

Prints a table and writes `benchmarks/results/upscale_{model}_{provider}.json`.
"""

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.stitch import machine
from benchmarks.stitch_clips import clip
from serve_app.settings import Settings
from serve_app.upscale_weights import Weights, find_weights

RESULTS = Path(__file__).parent / "results"
WIDTH, HEIGHT = 640, 480
MEGAPIXELS = WIDTH * HEIGHT / 1e6


def measured(weights: Weights, tile_px: int, device: str, repeats: int) -> dict[str, Any]:
    """One size of tiles, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_upscale, args=(weights.path, tile_px, device, repeats, theirs))
    process.start()
    found: dict[str, Any] = ours.recv()
    process.join()
    return {"tile_px": tile_px, **found}


def _upscale(path: Path, tile_px: int, device: Any, repeats: int, result: Connection) -> None:
    from serve_app.media.upscale import Upscaler

    upscaler = Upscaler(path, tile_px=tile_px, device=device)
    loaded_mb = _peak_mb()
    frames = clip(0, repeats + 1, WIDTH, HEIGHT)
    seconds = []
    for frame in frames:
        began = time.perf_counter()
        upscaler.upscale(frame, 4)
        seconds.append(time.perf_counter() - began)
    result.send(
        {
            "provider": upscaler.provider,
            "seconds": seconds[1:],
            "median_s": statistics.median(seconds[1:]),
            "s_per_megapixel": statistics.median(seconds[1:]) / MEGAPIXELS,
            "peak_mb": _peak_mb(),
            "loaded_mb": loaded_mb,
        }
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(
    model: Annotated[str, typer.Option(help="As the setting upscale_model.")] = "realesr-animevideov3",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Frames for each size of tiles.")] = 5,
    tiles: Annotated[list[int], typer.Option("--tile", help="Longest side of a tile; repeatable.")] = [256, 512],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = RESULTS,
) -> None:
    """Measure and tell."""
    console, before = Console(), machine()
    with tempfile.TemporaryDirectory(prefix="upscale-") as data:
        weights = find_weights(Settings(data_dir=Path(data), upscale_model=model))
        with console.status("upscaling"):
            rows = [measured(weights, tile_px, device, repeats) for tile_px in tiles]
    table = Table("tiles of", "runs on", "s a frame", "s a megapixel", "peak MB", "of that, before the first frame")
    for row in rows:
        table.add_row(
            str(row["tile_px"]), row["provider"], f"{row['median_s']:.2f}", f"{row['s_per_megapixel']:.1f}",
            f"{row['peak_mb']:.0f}", f"{row['loaded_mb']:.0f}",
        )  # fmt: skip
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    path = (
        out / f"upscale_{Path(weights.name).stem}_{rows[0]['provider'].removesuffix('ExecutionProvider').lower()}.json"
    )
    facts = {"machine": before, "model": weights.name, "sha256": weights.sha256, "frame": f"{WIDTH}x{HEIGHT}"}
    path.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    console.print(f"written to {path}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
