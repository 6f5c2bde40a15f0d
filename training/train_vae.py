"""Trains the VAE: rendered clips to latents and back. `python -m training.train_vae runs/vae --minutes 6`

L1 and squared error on pixels, and a little KL, which keeps the latents' scale near 1 and makes neighbours decode alike.
Mostly on pieces of clips, and on whole pictures, since the VAE's middle attends over all of a frame. Some clips are as long
as the service's longest: what is causal in time must have seen frames that are far from the first.
"""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan
from torch import nn

from training.data import Shape, draw_batch, stream
from training.model import build_vae
from training.parallel_vae import ParallelVae
from training.render import make_atlas, render
from training.run import Trainer, autocast, channels_last, console, cycle, pick_device, report, seed_everything

PIECES: tuple[tuple[int, float, float], ...] = ((17, 1.0, 0.5), (41, 0.75, 0.3), (81, 0.5, 0.2))
"""Frames of clips, the side of their pieces as a share of `Settings.piece`, and their share of the steps on clips."""
PICTURES = 0.3
"""Share of the steps on whole pictures."""


@dataclass(frozen=True)
class Settings:
    """Of one run; recorded beside it."""

    minutes: float
    batch: int
    piece: int
    scale: float
    seed: int
    peak_rate: float = 1e-3
    kl_weight: float = 5e-4
    init: Path | None = None
    """The VAE that it began with; None: random weights."""
    decoder_only: bool = False
    """The encoder stays as it is, and with it the latents: a denoiser that was trained on them fits the VAE still."""


def train(folder: Path, settings: Settings, workers: int) -> ParallelVae:
    """Train until the budget is spent; returns the VAE with averaged weights."""
    device = pick_device()
    seed_everything(settings.seed)
    vae = build_vae()
    if settings.init is not None:
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(settings.init).state_dict())
    vae.to(device)
    if device.type == "cuda":
        channels_last(vae)
    parallel = ParallelVae(vae)
    modules: dict[str, nn.Module] = {"vae": vae}
    if settings.decoder_only:
        modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trainer = Trainer(
        folder,
        asdict(settings),
        modules,
        minutes=settings.minutes,
        peak_rate=settings.peak_rate,
        device=device,
        decay=0.999,
    )
    atlas = make_atlas(device)
    width, height = _scaled(640, settings.scale), _scaled(480, settings.scale)
    shapes = [Shape(width, height, 1)] + [Shape(width, height, frames) for frames, _, _ in PIECES]
    sizes = [2 * settings.batch] + [
        max(1, round(9 * settings.batch / (frames * side**2))) for frames, side, _ in PIECES
    ]
    sides = [0] + [round(side * settings.piece / 32) * 32 for _, side, _ in PIECES]
    shares = [PICTURES] + [(1 - PICTURES) * share for _, _, share in PIECES]
    seed = f"vae {settings.seed} {trainer.step}"
    streams = [
        stream(shape, size, tokenizer=None, seed=seed, workers=workers)
        for shape, size in zip(shapes, sizes, strict=True)
    ]
    choices = cycle(lambda rng: rng.choices(range(len(shapes)), shares)[0], settings.seed, trainer.step)
    places = random.Random(seed)
    for number in choices:
        if trainer.done:
            break
        drawing = next(streams[number]).drawing.to(device)
        window = _window(places, shapes[number], sides[number]) if sides[number] else None
        with torch.no_grad():
            pixels = render(drawing, atlas, window)
        with autocast(device):
            mean, log_variance = parallel.moments(pixels)
            latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
            decoded = parallel.decode(latents).float()
        error = decoded - pixels
        l1, squared = error.abs().mean(), error.square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        psnr = -10 * torch.log10(squared.detach() / 4)
        trainer.set_rate()
        norm = trainer.descend(l1 + squared + settings.kl_weight * kl)
        trainer.count({"l1": l1, "kl": kl, "psnr": psnr, "gradient": norm})
    trainer.save()
    trainer.average.swap()
    return parallel


def _scaled(pixels: int, scale: float) -> int:
    return max(64, round(pixels * scale / 32) * 32)


def _window(rng: random.Random, shape: Shape, piece: int) -> tuple[int, int, int, int]:
    width, height = min(piece, shape.width), min(piece, shape.height)
    return rng.randint(0, shape.width - width), rng.randint(0, shape.height - height), width, height


@torch.no_grad()
def measure_latents(
    parallel: ParallelVae, shapes: list[Shape], clips: int, seed: int
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latents by channel, over `clips` training scenes of each shape."""
    device, rng = parallel.vae.device, random.Random(f"latents {seed}")
    atlas = make_atlas(device)
    values = []
    for shape in shapes:
        drawing = draw_batch(rng, shape, clips, "train", None).drawing.to(device)
        for start in range(0, clips, 8):
            with autocast(device):
                mean, _ = parallel.moments(render(drawing[start : start + 8], atlas))
            values.append(mean.transpose(0, 1).flatten(1).cpu())
    latents = torch.cat(values, dim=1)
    return latents.mean(dim=1).tolist(), latents.std(dim=1).tolist()


@torch.no_grad()
def measure_psnr(parallel: ParallelVae, shape: Shape, clips: int, split: str = "test") -> float:
    """Mean over held-out clips of each clip's PSNR in dB, encoded and decoded as the service does, latent frame by latent frame."""
    vae, rng = parallel.vae, random.Random(f"psnr {split}")
    atlas = make_atlas(vae.device)
    total = 0.0
    for _ in range(clips):
        drawing = draw_batch(rng, shape, 1, split, None).drawing.to(vae.device)
        pixels = render(drawing, atlas)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        total += float(-10 * torch.log10((decoded - pixels).square().mean() / 4))
    return total / clips


def main(
    out: Path,
    minutes: float = 6.0,
    batch: Annotated[int, typer.Option(help="Clips of nine frames a step; fewer of more.")] = 16,
    piece: Annotated[int, typer.Option(help="Side of the pieces that clips are cut to, in pixels.")] = 256,
    scale: Annotated[float, typer.Option(help="Of the pictures; below 1 for a trial on a small machine.")] = 1.0,
    workers: int = 4,
    seed: int = 1,
    check_clips: Annotated[int, typer.Option(help="Held-out clips to measure on.")] = 48,
    init: Annotated[Path | None, typer.Option(help="A VAE's folder to go on from, optimizers afresh.")] = None,
    decoder_only: Annotated[bool, typer.Option("--decoder-only", help="Leave the latents as they are.")] = False,
) -> None:
    """Train the VAE, measure its latents and its PSNR, and save it with them in OUT/vae."""
    if decoder_only and init is None:
        raise typer.BadParameter("--decoder-only needs --init: there are no latents to keep")
    settings = Settings(minutes, batch, piece, scale, seed, init=init, decoder_only=decoder_only)
    parallel = train(out, settings, workers)
    width, height = _scaled(640, scale), _scaled(480, scale)
    shapes = [Shape(width, height, frames) for frames in (1, 17, 81)]
    if decoder_only:
        config = AutoencoderKLWan.from_pretrained(init).config
        mean, std = config.latents_mean, config.latents_std
    else:
        mean, std = measure_latents(parallel, shapes[:2], check_clips, seed)
    vae = build_vae(mean, std)
    vae.load_state_dict(parallel.vae.state_dict())
    vae.save_pretrained(out / "vae")
    figures = {"psnr_db_pictures": measure_psnr(parallel, shapes[0], check_clips)}
    figures["psnr_db_clips"] = measure_psnr(parallel, shapes[1], check_clips)
    figures["psnr_db_long_clips"] = measure_psnr(parallel, shapes[2], max(1, check_clips // 4))
    report(out, figures | {"latents_mean": mean, "latents_std": std})
    console.print(f"saved {out / 'vae'}")


if __name__ == "__main__":
    typer.run(main)
