"""One denoising step as a function of tensors: clips of one shape, each at its own step and guidance, in one forward.

The mathematics is WanPipeline's and UniPC's. The order of the arithmetic is not: both guidance branches may share the
forward, and guidance and solver run in float32 whatever the transformer's dtype. In float32 on a CPU the latents of a
whole clip differ from WanPipeline's by at most `TOLERANCE` of their largest value (tests/unit/engine/test_fast_path.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from serve_app.engine.clip_state import ClipState
from serve_app.engine.solver import SolverState, solver_step

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

TOLERANCE = 5e-5
"""Largest difference from WanPipeline in float32, over the largest latent (FACTS: 6e-6 absolute on latents of about 8)."""

PAIR_UP_TO_TOKENS = 8192
"""Tokens of a clip up to which its two guidance branches share a forward. Above it one branch fills any GPU, so that
sharing would double the activations for nothing."""


@dataclass
class StepBatch:
    """Everything that one step reads. All on the device; the first dimension is the clip."""

    latents: torch.Tensor
    """float32 [clips, channels, latent frames, latent height, latent width]."""
    last_sample: torch.Tensor
    last_x0: torch.Tensor
    older_x0: torch.Tensor
    """The solver's memory, of the same shape (`SolverState`)."""
    rows: torch.Tensor
    """float32 [clips, 1 + 2 * TERMS]: rows of `Schedule.table`."""
    timesteps: torch.Tensor
    """int64 [clips]."""
    guidance_scale: torch.Tensor
    """float32 [clips]."""
    prompt_embeds: torch.Tensor
    """[clips, 512, text_dim], in the transformer's dtype."""
    negative_prompt_embeds: torch.Tensor | None
    """The same; None where guidance is off for all of them."""


@dataclass
class StepResult:
    """What one step gives, in the order of the clips."""

    latents: torch.Tensor
    last_sample: torch.Tensor
    last_x0: torch.Tensor
    older_x0: torch.Tensor
    finite: torch.Tensor
    """bool [clips]: whether all of a clip's latents are finite."""


def gather(clips: Sequence[ClipState]) -> StepBatch:
    """The next step of `clips`, which must agree in shape and in whether they are guided. Does not wait for the device."""
    columns = []
    for clip in clips:
        assert clip.latents is not None
        assert clip.schedule is not None
        assert clip.solver is not None
        step, device = clip.launched_steps, clip.latents.device
        columns.append(
            (
                clip.latents,
                clip.solver.last_sample,
                clip.solver.last_x0,
                clip.solver.older_x0,
                clip.schedule.table[step : step + 1],
                clip.schedule.timesteps[step : step + 1],
                torch.full((1,), clip.request.guidance_scale, device=device),
                clip.prompt_embeds,
                clip.negative_prompt_embeds,
            )
        )
    return StepBatch(*(_cat(values) for values in zip(*columns, strict=True)))  # type: ignore[arg-type]


def scatter(result: StepResult, clips: Sequence[ClipState]) -> None:
    """Give each clip its part of `result`."""
    for index, clip in enumerate(clips):
        own = slice(index, index + 1)
        clip.latents = result.latents[own]
        clip.solver = SolverState(result.last_sample[own], result.last_x0[own], result.older_x0[own])


def denoise(transformer: "WanTransformer3DModel", batch: StepBatch, *, paired: bool) -> StepResult:
    """One step of every clip in `batch`. `paired`: both guidance branches in one forward."""
    dtype = transformer.dtype

    def predict(latents: torch.Tensor, timesteps: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = transformer(
            hidden_states=latents.to(dtype), timestep=timesteps, encoder_hidden_states=embeds, return_dict=False
        )[0]
        return prediction.float()

    latents, timesteps, negative = batch.latents, batch.timesteps, batch.negative_prompt_embeds
    if negative is None:
        velocity = predict(latents, timesteps, batch.prompt_embeds)
    else:
        if paired:
            both = predict(
                torch.cat([latents, latents]),
                torch.cat([timesteps, timesteps]),
                torch.cat([batch.prompt_embeds, negative]),
            )
            guided, unguided = both.chunk(2)
        else:
            guided = predict(latents, timesteps, batch.prompt_embeds)
            unguided = predict(latents, timesteps, negative)
        velocity = torch.lerp(unguided, guided, batch.guidance_scale.view(-1, 1, 1, 1, 1))
    solver = SolverState(batch.last_sample, batch.last_x0, batch.older_x0)
    latents, solver = solver_step(batch.rows, solver, velocity, latents)
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    return StepResult(latents, solver.last_sample, solver.last_x0, solver.older_x0, finite)


def _cat(values: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    first = values[0]
    if first is None or len(values) == 1:
        return first
    return torch.cat([value for value in values if value is not None])
