"""A clip's state off the device, to go on from later, and back onto one."""

from dataclasses import dataclass

import torch

from serve_app.engine.checkpoints import Checkpoint
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.solver import SolverState
from serve_app.scheduling.cost import TEXT_TOKENS

_EMBEDS = ("prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True)
class Snapshot:
    """A clip's tensors after `step` steps, on their way to the host: to be read when the copies are done."""

    step: int
    tensors: dict[str, torch.Tensor]


def take_snapshot(clip: ClipState) -> Snapshot:
    """Launch the copies of all that `clip` needs to go on elsewhere, behind the work that is launched already.

    After the last step that is the latents alone: they go straight into decoding.
    """
    assert clip.latents is not None
    tensors = {"latents": clip.latents}
    if clip.phase is Phase.DENOISE:
        assert clip.solver is not None
        tensors |= {f"solver.{name}": tensor for name, tensor in clip.solver.state_tensors().items()}
        tensors |= {name: embeds for name in _EMBEDS if (embeds := getattr(clip, name)) is not None}
    return Snapshot(clip.launched_steps, {name: _to_host(tensor) for name, tensor in tensors.items()})


def restore(clip: ClipState, checkpoint: Checkpoint, runner: ModelRunner) -> None:
    """Put the checkpoint's state onto the device, in place of text and first latents. Its tensors are all there (`_check`)."""
    header, tensors, device = checkpoint.header, checkpoint.tensors, runner.device
    clip.latents = tensors["latents"].to(device)
    clip.schedule = runner.schedule(clip.request)
    clip.phase = Phase.DECODE
    if header.step < clip.request.steps:
        solver = {
            name.removeprefix("solver."): tensor for name, tensor in tensors.items() if name.startswith("solver.")
        }
        clip.solver = SolverState.load_state_tensors(solver, device)
        clip.prompt_embeds, clip.negative_prompt_embeds = (
            _padded(tensors[name]).to(device) if name in tensors else None for name in _EMBEDS
        )
        clip.phase = Phase.DENOISE
    clip.launched_steps = clip.finished_steps = clip.saved_step = clip.snapshot_step = header.step
    clip.gpu_s = clip.snapshot_gpu_s = header.gpu_s
    clip.step_s = list(header.step_s)
    clip.resumed_from_steps = (*header.resumed_from_steps, header.step)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    # Pinned on a GPU, so that the copy need not wait for the device. Always a copy: what a solver keeps may change in place.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def trimmed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Embeddings without the rows of zeros that follow the last token: seven eighths of them for a usual prompt."""
    return {name: _without_padding(tensor) if name in _EMBEDS else tensor for name, tensor in tensors.items()}


def _without_padding(embeds: torch.Tensor) -> torch.Tensor:
    used = embeds.ne(0).any(dim=2).any(dim=0).nonzero()
    return embeds[:, : int(used.max()) + 1 if len(used) else 0].contiguous()


def _padded(embeds: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(embeds, (0, 0, 0, TEXT_TOKENS - embeds.shape[1]))
