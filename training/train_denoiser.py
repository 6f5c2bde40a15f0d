"""Trains transformer and text encoder together by flow matching, on a trained VAE's latents, and saves the whole model.

`python -m training.train_denoiser runs/denoiser --vae runs/vae/vae --minutes 15`

The convention is that of diffusers' flow prediction: x = (1 - sigma) * clean + sigma * noise, timestep = 1000 * sigma, and
the model predicts noise - clean.
"""

import random
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import T5TokenizerFast

from training.captions import USUAL_NEGATIVE, caption
from training.data import Shape
from training.facts import FACTS, Tap, build_head
from training.folded_padding import FoldedPadding
from training.graphs import Graphs
from training.model import SPATIAL, TEXT_DIM, build_text_encoder, build_transformer, save_pipeline, train_tokenizer
from training.parallel_vae import ParallelVae
from training.pool import Pool
from training.render import drawing_of, make_atlas, render
from training.run import Trainer, autocast, channels_last, console, cycle, pick_device, report, seed_everything
from training.told import TOLD
from training.world import draw_scene, place


@dataclass(frozen=True)
class Settings:
    """Of one run; recorded beside it."""

    minutes: float
    tokens: int
    """Latent pixels a step: it is as many pictures or clips as fit."""
    scale: float
    seed: int
    reuse: int
    peak_rate: float = 1e-3
    dropout: float = 0.12
    """Share of captions dropped, for guidance."""
    shift: float = 3.0
    """Noise levels are sigmoids of normal numbers, moved towards noise by this (as flow_shift moves the sampler's): with few
    tokens to a picture, what is drawn and where is decided early. A larger shift leaves edges wobbly."""
    facts_weight: float = 0.5
    """Of the error of what is read from the middle (`facts.py`)."""
    told_weight: float = 0.2
    """Of the error of what is read from the text (`told.py`)."""
    init: Path | None = None
    """The model that it began with; None: random weights."""


MIX: tuple[tuple[Shape, float], ...] = (
    (Shape(640, 480, 1), 0.26),
    (Shape(832, 480, 1), 0.06),
    (Shape(480, 640, 1), 0.06),
    (Shape(640, 480, 17), 0.32),
    (Shape(832, 480, 17), 0.06),
    (Shape(480, 640, 17), 0.06),
    (Shape(640, 480, 41), 0.10),
    (Shape(640, 480, 81), 0.08),
)
"""Shapes of clips and their share of the steps. Frames of other numbers follow: positions in time are shared."""
TAPPED = 3
"""Blocks before the place where `facts` are read."""


def mix_of(scale: float) -> tuple[tuple[Shape, float], ...]:
    """`MIX`, or for a trial on a small machine pictures and short clips at a part of the size."""
    if scale == 1.0:
        return MIX
    width, height = (max(64, round(pixels * scale / SPATIAL) * SPATIAL) for pixels in (640, 480))
    return ((Shape(width, height, 1), 0.75), (Shape(width, height, 9), 0.25))


def noise_levels(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """Sigmas in (0, 1): one in five uniform before the shift, so that none is forgotten."""
    even = torch.rand(count, device=device)
    normal = torch.sigmoid(torch.randn(count, device=device))
    sigma = torch.where(torch.rand(count, device=device) < 0.2, even, normal)
    return (shift * sigma / (1 + (shift - 1) * sigma)).clamp(1e-3, 1.0)


@torch.no_grad()
def channel_weights(vae: ParallelVae, atlas: torch.Tensor, shape: Shape, clips: int = 16) -> torch.Tensor:
    """How much a channel's error counts, [1, channels, 1, 1, 1], 1 on average.

    The VAE puts noise on its latents and decodes them all the same, so an error weighs by how it compares with that noise: some
    channels are hardly more than noise. Not by it alone (0.1), or a few channels would be all.
    """
    rng, config, device = random.Random("channels"), vae.vae.config, atlas.device
    scenes = [draw_scene(rng, width=shape.width, height=shape.height, frames=shape.frames) for _ in range(clips)]
    with autocast(device):
        pixels = render(drawing_of([place(scene, rng) for scene in scenes]).to(device), atlas)
        _, log_variance = vae.moments(pixels)
    variance = log_variance.exp().mean(dim=(0, 2, 3, 4)) / torch.tensor(config.latents_std, device=device).square()
    weights = 1 / (variance + 0.1)
    return (weights / weights.mean()).view(1, -1, 1, 1, 1)


class Objective:
    """The loss of a step: how far the predicted velocity is off, and what is read from the transformer's middle and the text."""

    def __init__(
        self, transformer: WanTransformer3DModel, text_encoder: nn.Module, channels: torch.Tensor, settings: Settings
    ) -> None:
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.heads = nn.ModuleDict({"facts": build_head(width, FACTS), "told": build_head(TEXT_DIM, TOLD)})
        self._transformer, self._text_encoder, self._channels = transformer, text_encoder, channels
        self._settings, self._folded, self._tap = settings, FoldedPadding(transformer), Tap()
        transformer.blocks.insert(TAPPED, self._tap)

    def remove(self) -> None:
        """Leave the transformer without what was put into it."""
        del self._transformer.blocks[TAPPED]

    def __call__(
        self, clean: torch.Tensor, ids: torch.Tensor, facts: torch.Tensor, owners: torch.Tensor, told: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Mean squared errors of a batch (`Sample.tensors`): of "velocity", "facts" and "told".

        All places count alike. To let those count more that show things would be to make things likelier than they are: where
        it is still open which of two places has the one thing, both would get one.
        """
        sigma = noise_levels(len(clean), self._settings.shift, clean.device)
        level = sigma.view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(clean)
        with autocast(clean.device):
            text = self._folded.embed(self._text_encoder, ids)
            prediction = self._transformer(
                hidden_states=torch.lerp(clean, noise, level),
                timestep=1000 * sigma,
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
            seen = self.heads["facts"](self._tap.take()).float()
            understood = self.heads["told"](text).float()
        speaks = (owners > 0).float()
        of_thing = told.gather(1, owners[..., None].expand(-1, -1, told.shape[2]))
        of_token = (understood - of_thing).square().mean(dim=2)
        return {
            "velocity": ((prediction.float() - (noise - clean)).square() * self._channels).mean(),
            "facts": (seen.mT.unflatten(2, facts.shape[2:]) - facts).square().mean(),
            "told": (of_token * speaks).sum() / speaks.sum().clamp_min(1),
        }


def begin_with(model: Path, transformer: nn.Module, text_encoder: nn.Module) -> None:
    """Give both the weights of a saved model of the same sizes."""
    for part, name in ((transformer, "transformer"), (text_encoder, "text_encoder")):
        saved = type(part).from_pretrained(model / name)  # type: ignore[attr-defined]
        part.load_state_dict(saved.state_dict())


def world_tokenizer(folder: Path, init: Path | None = None) -> Any:
    """The tokenizer of this world's captions, or that of the model `init`. It is kept in `folder`: other releases of
    SentencePiece find other pieces."""
    kept = folder / "tokenizer"
    if kept.is_dir():
        return T5TokenizerFast.from_pretrained(kept)
    folder.mkdir(parents=True, exist_ok=True)
    if init is not None:
        tokenizer = T5TokenizerFast.from_pretrained(init / "tokenizer")
        tokenizer.save_pretrained(kept)
        return tokenizer
    rng = random.Random(0)
    shapes = [(640, 480, 1), (640, 480, 17)]
    texts = [
        caption(draw_scene(rng, width=width, height=height, frames=frames), rng)
        for _ in range(4000)
        for width, height, frames in shapes
    ]
    tokenizer = train_tokenizer([*texts, USUAL_NEGATIVE], folder)
    tokenizer.save_pretrained(kept)
    return tokenizer


def train(folder: Path, vae: AutoencoderKLWan, settings: Settings, workers: int) -> dict[str, Any]:
    """Train until the budget is spent; returns the parts of the model, with averaged weights."""
    device = pick_device()
    seed_everything(settings.seed)
    tokenizer = world_tokenizer(folder, settings.init)
    transformer, text_encoder = build_transformer(), build_text_encoder(len(tokenizer))
    if settings.init is not None:
        begin_with(settings.init, transformer, text_encoder)
    transformer.to(device)
    text_encoder.to(device)
    parallel = ParallelVae(vae.to(device).eval().requires_grad_(False))
    mix, atlas = mix_of(settings.scale), make_atlas(device)
    clips = next(shape for shape, _ in mix if shape.frames > 1)
    objective = Objective(transformer, text_encoder, channel_weights(parallel, atlas, clips), settings)
    trainer = Trainer(
        folder,
        asdict(settings),
        {"transformer": transformer, "text_encoder": text_encoder, "heads": objective.heads.to(device)},
        minutes=settings.minutes,
        peak_rate=settings.peak_rate,
        device=device,
        warmup_steps=300,
        muon=True,
    )
    if device.type == "cuda":
        channels_last(vae)
        torch._dynamo.config.cache_size_limit = 64
        transformer.compile_repeated_blocks(dynamic=False)

    def step(*sample: torch.Tensor) -> dict[str, torch.Tensor]:
        errors = objective(*sample)
        norm = trainer.descend(
            errors["velocity"] + settings.facts_weight * errors["facts"] + settings.told_weight * errors["told"]
        )
        return {name: error.detach() for name, error in errors.items()} | {"gradient": norm}

    steps = Graphs(step, device)
    pools: OrderedDict[Shape, Pool] = OrderedDict()
    shares = [share for _, share in mix]
    for number in cycle(lambda rng: rng.choices(range(len(mix)), shares)[0], settings.seed, trainer.step):
        if trainer.done:
            break
        shape = mix[number][0]
        if shape not in pools:
            tokens = shape.latent_frames * (shape.width // SPATIAL) * (shape.height // SPATIAL)
            pools[shape] = Pool(
                shape,
                max(1, settings.tokens // tokens),
                vae=parallel,
                atlas=atlas,
                tokenizer=tokenizer,
                seed=f"denoiser {settings.seed} {trainer.step}",
                workers=workers,
                reuse=settings.reuse,
            )
        sample = pools[shape].draw(settings.dropout)
        trainer.set_rate()
        kind = "pictures" if shape.frames == 1 else "clips"
        trainer.count({f"{name}, {kind}": value for name, value in steps(shape, sample.tensors).items()})
    trainer.save()
    objective.remove()
    trainer.average.swap()
    return {"transformer": transformer, "text_encoder": text_encoder, "steps": trainer.step}


def main(
    out: Path,
    vae: Annotated[Path, typer.Option(help="What train_vae saved.")],
    minutes: float = 15.0,
    tokens: Annotated[int, typer.Option(help="Latent pixels a step.")] = 38_400,
    scale: Annotated[float, typer.Option(help="Of the pictures; below 1 for a trial on a small machine.")] = 1.0,
    workers: Annotated[int, typer.Option(help="Processes that prepare scenes, for each of the shapes.")] = 2,
    reuse: Annotated[int, typer.Option(help="How often a clip's latents are used.")] = 40,
    seed: int = 1,
    init: Annotated[Path | None, typer.Option(help="A model's folder to go on from, optimizers afresh.")] = None,
) -> None:
    """Train the denoiser on the VAE's latents and save the whole model in OUT/model."""
    trained_vae = AutoencoderKLWan.from_pretrained(vae)
    settings = Settings(minutes, tokens, scale, seed, reuse, init=init)
    parts = train(out, trained_vae, settings, workers)
    steps = parts.pop("steps")
    # Both afresh: training changed how this VAE computes, and the tokenizer keeps to what it padded last.
    save_pipeline(out / "model", tokenizer=world_tokenizer(out), vae=AutoencoderKLWan.from_pretrained(vae), **parts)
    size_mb = sum(path.stat().st_size for path in (out / "model").rglob("*") if path.is_file()) / 1e6
    report(out, {"steps": steps, "size_mb": round(size_mb, 2)})
    console.print(f"saved {out / 'model'}")


if __name__ == "__main__":
    typer.run(main)
