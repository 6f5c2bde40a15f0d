"""The UniPC solver of Wan, taken apart: a clip's own state, and the coefficients that are the same for every clip.

A step of UniPC is linear in five tensors, and what it multiplies them with depends on (steps, flow_shift) alone. So the
coefficients are asked of diffusers' own scheduler once, by giving it unit vectors; after that a step is a few fused
multiply-adds, for many clips at different steps at once, with nothing for the launching thread to wait for.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import UniPCMultistepScheduler

TERMS = 5
"""What a step combines: the last sample, the last x0, the x0 before it, the current sample, the new x0."""


@dataclass
class SolverState:
    """What the solver remembers of one clip. Tensors are float32, of the latents' shape; zeros until they are used.

    With `latents` and the number of steps done this is all that a clip needs to go on elsewhere.
    """

    last_sample: torch.Tensor
    """The sample that the last prediction started from, after its correction."""
    last_x0: torch.Tensor
    """The clean latents that the last step predicted."""
    older_x0: torch.Tensor
    """The same of the step before."""

    @classmethod
    def at_start(cls, latents: torch.Tensor) -> "SolverState":
        """The state before the first step."""
        return cls(*(torch.zeros_like(latents) for _ in fields(cls)))

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name, for a checkpoint."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def load_state_tensors(cls, tensors: dict[str, torch.Tensor], device: torch.device) -> "SolverState":
        """The state that `state_tensors` gave, on `device`. Raises `KeyError` for one that is missing."""
        return cls(**{field.name: tensors[field.name].to(device) for field in fields(cls)})


class Schedule:
    """The timesteps of one (steps, flow_shift), and a step along them. One serves any number of clips.

    `template` is the model's own scheduler; only its `flow_shift` is replaced.
    """

    def __init__(
        self, template: "UniPCMultistepScheduler", *, steps: int, flow_shift: float, device: torch.device
    ) -> None:
        self.steps = steps
        self._scheduler: UniPCMultistepScheduler = type(template).from_config(template.config, flow_shift=flow_shift)
        self._scheduler.set_timesteps(steps, device=device)
        self.timesteps: torch.Tensor = self._scheduler.timesteps
        """int64 [steps], on the device."""
        self._device = device
        self._table: torch.Tensor | None = None

    @property
    def table(self) -> torch.Tensor:
        """float32 [steps, 1 + 2 * TERMS], on the device: sigma, then the terms of the corrected and of the next sample."""
        if self._table is None:
            table = torch.stack([self._coefficients(step) for step in range(self.steps)])
            pinned = table.pin_memory() if self._device.type == "cuda" else table
            self._table = pinned.to(self._device, non_blocking=True)
        return self._table

    def step_as_diffusers(
        self, state: SolverState, step: int, prediction: torch.Tensor, latents: torch.Tensor
    ) -> torch.Tensor:
        """Latents after step `step` (counted from 0), with the bits of `UniPCMultistepScheduler.step`; advances `state`."""
        scheduler = self._scheduler
        order = scheduler.config.solver_order
        # A scheduler remembers one clip; all of that memory is set here, so that clips can share it.
        scheduler.set_begin_index(0)
        scheduler._step_index = step
        scheduler.lower_order_nums = min(step, order)
        scheduler.this_order = self._order(step - 1)
        scheduler.last_sample = state.last_sample
        scheduler.model_outputs = [state.older_x0, state.last_x0]
        latents = scheduler.step(prediction, self.timesteps[step], latents, return_dict=False)[0]
        state.last_sample = scheduler.last_sample
        state.older_x0, state.last_x0 = scheduler.model_outputs
        return latents

    def _order(self, step: int) -> int:
        """Order of the predictor at `step`, as UniPCMultistepScheduler.step sets it."""
        config = self._scheduler.config
        final = self.steps - step if config.lower_order_final else config.solver_order
        return min(config.solver_order, final, max(step, 0) + 1)

    def _coefficients(self, step: int) -> torch.Tensor:
        """One row of `table`, on the host, read off the scheduler's answer to unit vectors."""
        last_sample, last_x0, older_x0, sample, new_x0 = torch.eye(TERMS)[:, None]
        sigma = self._scheduler.sigmas[step]
        state = SolverState(last_sample, last_x0, older_x0)
        # new_x0 = sample - sigma * prediction (flow prediction), solved for the prediction.
        next_sample = self.step_as_diffusers(state, step, (sample - new_x0) / sigma, sample)
        return torch.cat([sigma[None], state.last_sample[0], next_sample[0]])


def solver_step(
    rows: torch.Tensor, state: SolverState, prediction: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, SolverState]:
    """The latents after one step, and the state with them, for a batch whose samples may be at different steps.

    `rows` are float32 [batch, 1 + 2 * TERMS], one row of `Schedule.table` for each sample; the rest is float32
    [batch, channels, latent frames, height, width]. Differs from diffusers in the order of additions alone: see
    tests/unit/engine/test_solver.py for how much.
    """
    sigma, *terms = rows.view(*rows.shape, 1, 1, 1, 1).unbind(1)
    new_x0 = latents - sigma * prediction
    inputs = (state.last_sample, state.last_x0, state.older_x0, latents, new_x0)
    corrected = _combine(terms[:TERMS], inputs)
    following = _combine(terms[TERMS:], inputs)
    return following, SolverState(corrected, new_x0, state.last_x0)


def _combine(factors: list[torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    total = factors[0] * inputs[0]
    for factor, value in zip(factors[1:], inputs[1:], strict=True):
        total = torch.addcmul(total, factor, value)
    return total
