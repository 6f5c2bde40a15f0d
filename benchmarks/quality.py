"""What a change of how the model runs does to its files: measured against the same files made exactly.

    python -m benchmarks.quality                      # the bundled model on a CPU, 12 prompts: five minutes on two cores
    python -m benchmarks.quality --variant vae-bfloat16 --prompts 60 --model ... --device cuda

Makes a file for each of some prompts with the engine as it is by default, then again for each variant, with the same seeds, and
prints how far the variant's frames are from the exact ones (PSNR, SSIM; LPIPS where it is installed), how many files show what
the prompt says by plain image analysis (only for wan-shapes, whose world training/reader.py can read), and what a file costs.
An acceleration profile is held against this: it is one more entry of `VARIANTS`.

Medians over files, with the lowest. Writes `benchmarks/results/quality_DEVICE.json` and a picture beside it, a row for each variant.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.stitch import machine
from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed, ClipRequest
from serve_app.engine.engine import Engine
from serve_app.engine.load import WAN_SHAPES, ModelSource, pick_device, resolve_model
from serve_app.jobs.presets import PRESETS, JobType
from training.captions import USUAL_NEGATIVE, HeldOut, held_out
from training.evaluate import scores
from training.reader import Reader

RESULTS = Path(__file__).parent / "results"
console = Console()

Change = Callable[[ClipRequest], ClipRequest]


@dataclass(frozen=True)
class Variant:
    """A way to run the model: what the engine is given, and how each clip's request differs."""

    name: str
    engine: dict[str, Any] = field(default_factory=dict)
    change: Change = lambda request: request


EXACT = Variant("exact")
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("vae-bfloat16", {"vae_dtype": torch.bfloat16}),
        Variant("half-the-steps", change=lambda request: dataclasses.replace(request, steps=request.steps // 2)),
        Variant("no-guidance", change=lambda request: dataclasses.replace(request, guidance_scale=1.0)),
    )
}
"""What is measured unless --variant names some. The last two are no profiles: they show what a visible loss reads like."""


@dataclass(frozen=True)
class Made:
    """One file's frames, uint8 RGB [frames, height, width, 3], and its device seconds."""

    frames: np.ndarray
    gpu_s: float


@dataclass(frozen=True)
class Distance:
    """How far a variant's frames are from the exact ones. `psnr_db` is infinite where they are equal."""

    psnr_db: float
    ssim: float
    lpips: float | None


def psnr_db(frames: np.ndarray, exact: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all frames of a file, of uint8 values."""
    return math.inf if np.array_equal(frames, exact) else float(peak_signal_noise_ratio(exact, frames))


def ssim(frames: np.ndarray, exact: np.ndarray) -> float:
    """Mean structural similarity of the frames (Wang et al. 2004), 1 where they are equal."""
    pairs = zip(frames, exact, strict=True)
    return statistics.mean(float(structural_similarity(one, other, channel_axis=-1)) for one, other in pairs)


def load_lpips() -> Callable[[np.ndarray, np.ndarray], float] | None:
    """Perceptual distance (Zhang et al. 2018) on AlexNet, or None where the package or the network's weights are not at hand."""
    try:
        import lpips

        measure = lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:  # not installed, or torchvision could not download the weights
        console.print(f"without LPIPS: {error}", highlight=False)
        return None

    def distance(frames: np.ndarray, exact: np.ndarray) -> float:
        one, other = (torch.from_numpy(values).permute(0, 3, 1, 2).float() / 127.5 - 1 for values in (frames, exact))
        with torch.inference_mode():
            return float(measure(one, other).mean())

    return distance


def request_of(item: HeldOut) -> ClipRequest:
    """The prompt at its scene's size, with the values of the fast presets; its number is its seed."""
    preset = PRESETS[JobType.IMAGE_FAST if item.scene.frames == 1 else JobType.VIDEO_FAST]
    return ClipRequest(
        clip_id=f"quality-{item.number}",
        prompt=item.prompt,
        negative_prompt=USUAL_NEGATIVE,
        width=item.scene.width,
        height=item.scene.height,
        frames=item.scene.frames,
        steps=preset.sample_steps,
        guidance_scale=preset.guidance_scale,
        flow_shift=preset.sample_shift,
        seed=item.number,
        deadline=time.time(),
    )


def make(source: ModelSource, device: str, variant: Variant, prompts: Sequence[HeldOut]) -> list[Made]:
    """A file for each prompt, one after the other. Raises what a clip failed with."""
    engine = Engine(source, device=device, checkpoint_every_s=None, **variant.engine)
    try:
        return [
            run(engine, variant.change(request_of(item)))
            for item in track(prompts, variant.name, console=console, transient=True)
        ]
    finally:
        engine.close()


def run(engine: Engine, request: ClipRequest) -> Made:
    """One clip on an engine that nobody else steps. Raises what it failed with."""
    ends: list[ClipDone | ClipFailed] = []

    def note(event: ClipEvent) -> None:
        if isinstance(event, ClipDone | ClipFailed):
            ends.append(event)

    engine.submit(request, note)
    while not ends:
        engine.step()
    if isinstance(ends[0], ClipFailed):
        raise ends[0].error
    return Made(ends[0].frames, ends[0].receipt.gpu_s)


def following(prompts: list[HeldOut], made: Sequence[Made]) -> dict[str, float]:
    """Share of files that show what was asked, by what was judged."""
    reader = Reader()
    return {name: share for name, (share, _) in scores(prompts, [reader.read(item.frames) for item in made]).items()}


def comparison(rows: dict[str, Sequence[Made]], prompts: Sequence[HeldOut], path: Path, most: int = 8) -> None:
    """A row of files (clips: their last frame) for each variant, under the prompts."""
    width, height, margin = 240, 180, 110
    columns = list(range(0, len(prompts), max(1, math.ceil(len(prompts) / most))))
    sheet = Image.new("RGB", (margin + width * len(columns), 40 + height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, index in enumerate(columns):
        words = prompts[index].prompt.split()
        half = len(words) // 2
        for line, part in enumerate((words[:half], words[half:])):
            draw.text((margin + column * width + 4, 6 + 14 * line), " ".join(part)[:42], fill="black")
        for row, made in enumerate(rows.values()):
            image = Image.fromarray(made[index].frames[-1])
            image.thumbnail((width - 4, height - 4))
            sheet.paste(image, (margin + column * width, 40 + row * height))
    for row, name in enumerate(rows):
        draw.text((6, 40 + row * height + height // 2), name, fill="black")
    sheet.save(path)


def main(
    variant: Annotated[list[str] | None, typer.Option(help=f"Some of {', '.join(VARIANTS)}; all by default.")] = None,
    prompts: Annotated[int, typer.Option(min=2, help="How many, half of them clips of 17 frames.")] = 12,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the bundled wan-shapes by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    results: Path = RESULTS,
) -> None:
    """Make the files, compare them, print the table."""
    unknown = set(variant or ()) - VARIANTS.keys()
    if unknown:
        raise typer.BadParameter(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    device = pick_device(device)
    source = resolve_model(model or str(WAN_SHAPES), None, device, Path("data"))
    pictures = [item for item in held_out("tune") if item.scene.frames == 1]
    clips = [item for item in held_out("tune") if item.scene.frames > 1]
    chosen = [
        item
        for kind, count in ((pictures, (prompts + 1) // 2), (clips, prompts // 2))
        for item in kind[:: max(1, len(kind) // count)][:count]
    ]
    can_read, perceive = source.name_or_path == str(WAN_SHAPES), load_lpips()
    rows: dict[str, list[Made]] = {}
    figures: dict[str, Any] = {}
    for one in (EXACT, *(VARIANTS[name] for name in variant or VARIANTS)):
        made = rows[one.name] = make(source, device, one, chosen)
        distances = [
            Distance(
                psnr_db(new.frames, old.frames),
                ssim(new.frames, old.frames),
                perceive(new.frames, old.frames) if perceive else None,
            )
            for new, old in zip(made, rows[EXACT.name], strict=True)
        ]
        figures[one.name] = {
            "gpu_s": statistics.median(item.gpu_s for item in made),
            "psnr_db": summary([distance.psnr_db for distance in distances], worst=min),
            "ssim": summary([distance.ssim for distance in distances], worst=min),
            "lpips": summary([d.lpips for d in distances if d.lpips is not None], worst=max) if perceive else None,
            "right": following(chosen, made) if can_read else None,
        }
    show(figures)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"quality_{device}.json"
    record = {"machine": machine(), "device": device, "model": source.name_or_path.rsplit("/", 1)[-1]}
    path.write_text(json.dumps(record | {"files": len(chosen), "variants": figures}, indent=2) + "\n")
    comparison(rows, chosen, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png')}")


def summary(values: Sequence[float], worst: Callable[[Sequence[float]], float]) -> dict[str, float | None]:
    """Median and worst; None where the frames are equal, since JSON knows no infinity."""
    pair = {"median": statistics.median(values), "worst": worst(values)}
    return {name: value if math.isfinite(value) else None for name, value in pair.items()}


def show(figures: dict[str, Any]) -> None:
    """The table."""
    table = Table(
        "", "PSNR dB (lowest)", "SSIM (lowest)", "LPIPS (highest)", "colour", "shape", "direction", "s a file"
    )
    for name, row in figures.items():
        cells = [name]
        for key in ("psnr_db", "ssim", "lpips"):
            pair = row[key]
            cells.append(f"{_number(pair['median'])} ({_number(pair['worst'])})" if pair else "-")
        right = row["right"] or {}
        cells += [f"{right[key]:.0%}" if key in right else "-" for key in ("colour", "shape", "direction")]
        table.add_row(*cells, f"{row['gpu_s']:.2f}")
    console.print(table)


def _number(value: float | None) -> str:
    return "equal" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    typer.run(main)
