"""Scores how well files follow the held-out prompts. `python -m training.evaluate runs/evaluation --model runs/denoiser/model`

Generates a file for each prompt with `WanPipeline` (pictures as PNG, clips as animated PNG, both lossless), reads the files
back, and prints a table: as asked, and with the prompts shuffled among the files, which must score at chance. With
`--truth` the files are rendered, not generated: the reader's own test.
"""

import functools
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageSequence
from rich.progress import track
from rich.table import Table

from training.captions import USUAL_NEGATIVE, HeldOut, held_out
from training.data import tokenize
from training.model import embed
from training.reader import Found, Reader, Reading
from training.render import drawing_of, make_atlas, render
from training.run import console, pick_device, report
from training.world import DIRECTIONS, Scene, place

Marks = dict[str, bool]
"""What was judged of a file, and whether it was right."""


def judge(scene: Scene, reading: Reading) -> Marks:
    """Whether a file shows what `scene` says."""
    things = reading.things
    shown = things[: len(scene.each)]
    asked = sorted((thing.colour, thing.shape) for thing in scene.each)
    marks = {
        "colour": sorted(thing.colour for thing in shown) == sorted(colour for colour, _ in asked),
        "shape": sorted(thing.shape for thing in shown) == sorted(shape for _, shape in asked),
        "colour and shape": sorted((thing.colour, thing.shape) for thing in shown) == asked,
        "count": len(things) == len(scene.each),
    }
    if scene.relation is not None:
        marks["relation"] = _related(scene, shown)
    thing = scene.things[0]
    if len(scene.each) == 1 and thing.position is not None:
        marks["position"] = bool(shown) and shown[0].place == thing.position
    if thing.motion is not None:
        right = reading.motion == thing.motion
        marks["direction" if thing.motion in DIRECTIONS else "other motion"] = right
    return marks


def _related(scene: Scene, shown: list[Found]) -> bool:
    by_colour = {thing.colour: thing for thing in shown}
    first, second = (by_colour.get(thing.colour) for thing in scene.things)
    if first is None or second is None:
        return False
    return first.x < second.x if scene.relation == "left of" else first.y < second.y


def generate(model: Path, prompts: list[HeldOut], *, steps: int, guidance: float, batch: int) -> Iterator[np.ndarray]:
    """Frames for each prompt, in order, with the service's negative prompt; a prompt's number is its seed."""
    from diffusers import WanPipeline

    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = WanPipeline.from_pretrained(model, dtype={"default": dtype, "vae": torch.float32}).to(device)
    pipeline.set_progress_bar_config(disable=True)
    for some in _batches(prompts, batch):
        scene = some[0].scene
        with torch.inference_mode():
            texts = [item.prompt for item in some] + [USUAL_NEGATIVE]
            *embeds, negative = embed(pipeline.text_encoder, tokenize(pipeline.tokenizer, texts).to(device)).to(dtype)
            frames = pipeline(
                prompt_embeds=torch.stack(embeds),
                negative_prompt_embeds=negative.expand(len(some), -1, -1),
                width=scene.width,
                height=scene.height,
                num_frames=scene.frames,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator("cpu").manual_seed(item.number) for item in some],
                output_type="np",
            ).frames
        yield from (frames * 255).round().astype(np.uint8)


def _batches(prompts: list[HeldOut], size: int) -> Iterator[list[HeldOut]]:
    for _, group in groupby(prompts, lambda item: (item.scene.width, item.scene.height, item.scene.frames)):
        alike = list(group)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def truth(prompts: list[HeldOut]) -> Iterator[np.ndarray]:
    """Frames as the world would draw them."""
    atlas = make_atlas()
    for item in prompts:
        pixels = render(drawing_of([place(item.scene, random.Random(item.number))]), atlas)[0]
        yield ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def save(frames: np.ndarray, path: Path) -> None:
    """One frame as a PNG, several as an animated one."""
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=bool(rest), append_images=rest, duration=1000 / 16)


def load(path: Path) -> np.ndarray:
    """The frames of a PNG or of a video file: uint8 RGB [frames, height, width, 3]. Videos need PyAV."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    import av

    with av.open(str(path)) as video:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@functools.cache
def _reader() -> Reader:
    torch.set_num_threads(1)
    return Reader()


def save_and_read(frames: np.ndarray, path: Path) -> Reading:
    """What the file shows that `save` makes. Runs in processes of its own, for it takes longer than a GPU takes to make the frames."""
    save(frames, path)
    return _reader().read(load(path))


def scores(prompts: list[HeldOut], readings: list[Reading]) -> dict[str, tuple[float, int]]:
    """Share that was right, and number judged, by what was judged; pictures and clips also apart."""
    marks: dict[str, list[bool]] = {}
    for item, reading in zip(prompts, readings, strict=True):
        for name, right in judge(item.scene, reading).items():
            marks.setdefault(name, []).append(right)
            if name in ("colour", "shape"):
                marks.setdefault(f"{name}, {'clips' if item.scene.frames > 1 else 'pictures'}", []).append(right)
    return {name: (sum(rights) / len(rights), len(rights)) for name, rights in sorted(marks.items())}


def shuffled(prompts: list[HeldOut], seed: int = 0) -> list[HeldOut]:
    """The prompts among the files in another way: each goes to a file of its own kind (pictures, clips), never to its own."""
    rng = random.Random(seed)
    result = list(prompts)
    for _, group in groupby(range(len(prompts)), lambda index: prompts[index].scene.frames):
        ring = list(group)
        rng.shuffle(ring)
        for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
            result[here] = prompts[there]
    return result


def contact_sheet(prompts: Iterable[HeldOut], files: Iterable[np.ndarray], path: Path, columns: int = 6) -> None:
    """Pictures, and the first and last frame of clips side by side, with the prompts under them."""
    cells = list(zip(prompts, files, strict=True))
    width, height, text = 320, 240, 44
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (item, frames) in enumerate(cells):
        left, top = number % columns * width, number // columns * (height + text)
        shown = [frames[0]] if len(frames) == 1 else [frames[0], frames[-1]]
        for index, frame in enumerate(shown):
            image = Image.fromarray(frame)
            image.thumbnail((width // len(shown) - 4, height - 4))
            sheet.paste(image, (left + index * width // len(shown) + 2, top + 2))
        for line, words in enumerate(_lines(item.prompt, 50)):
            draw.text((left + 4, top + height + 13 * line), words, fill="black")
    sheet.save(path)


def _lines(text: str, longest: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > longest:
            lines.append("")
        lines[-1] += word + " "
    return lines[:3]


def main(
    out: Path,
    model: Annotated[Path | None, typer.Option(help="The model's folder.")] = None,
    truth_only: Annotated[bool, typer.Option("--truth", help="Render the files: tests the reader.")] = False,
    split: Annotated[str, typer.Option(help="test, or tune while something is still being chosen.")] = "test",
    steps: int = 25,
    guidance: float = 6.0,
    batch: int = 20,
    every: Annotated[int, typer.Option(help="Take only every n-th prompt.")] = 1,
    scale: Annotated[float, typer.Option(help="Of the pictures; below 1 for a model trained so.")] = 1.0,
    frames: Annotated[int | None, typer.Option(help="Of clips, where not 17; 1 for pictures alone.")] = None,
) -> None:
    """Make the files, read them back, print the table, and leave files, table and contact sheet in OUT."""
    prompts = sorted(
        (item for item in held_out(split) if frames != 1 or item.scene.frames == 1),
        key=lambda item: (item.scene.frames, item.scene.width, item.number),
    )[::every]
    prompts = [replace(item, scene=_resized(item.scene, scale, frames)) for item in prompts]
    if model is None and not truth_only:
        raise typer.BadParameter("give --model, or --truth to test the reader")
    make: Callable[[], Iterator[np.ndarray]] = (
        (lambda: truth(prompts))
        if model is None
        else (lambda: generate(model, prompts, steps=steps, guidance=guidance, batch=batch))
    )
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{item.number:03d}.png" for item in prompts]
    workers = min(16, os.cpu_count() or 1)  # in a container this may be the host's count
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as readers:
        pending: list[Future[Reading]] = []
        for path, clip in track(zip(paths, make(), strict=True), "making", total=len(paths), console=console):
            pending.append(readers.submit(save_and_read, clip, path))
            for early in pending[-4 * workers - 1 : -4 * workers]:
                early.result()  # or frames pile up where a GPU makes them faster than they are read
        readings = [reading.result() for reading in track(pending, "reading", console=console)]
    chosen = list(zip(prompts, paths, strict=True))[:: max(1, len(paths) // 48)][:48]
    contact_sheet([item for item, _ in chosen], [load(path) for _, path in chosen], out / "contact_sheet.png")
    right, chance = scores(prompts, readings), scores(shuffled(prompts), readings)
    table = Table("", "files", "right", "prompts shuffled")
    for name, (share, count) in right.items():
        table.add_row(name, str(count), f"{share:.1%}", f"{chance[name][0]:.1%}")
    console.print(table)
    report(out, {"files": len(paths), "split": split, "right": right, "shuffled": chance})


def _resized(scene: Scene, scale: float, frames: int | None) -> Scene:
    if scale == 1.0:
        return replace(scene, frames=frames or scene.frames) if scene.frames > 1 else scene
    width, height = (max(64, round(pixels * scale / 32) * 32) for pixels in (640, 480))
    return replace(scene, width=width, height=height, frames=scene.frames if scene.frames == 1 else frames or 9)


if __name__ == "__main__":
    typer.run(main)
