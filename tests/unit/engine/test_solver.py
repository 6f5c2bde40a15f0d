"""The solver taken apart is diffusers' UniPC: to the bit one way, to float32 rounding the other."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from serve_app.engine.solver import Schedule, SolverState, solver_step

CPU = torch.device("cpu")
TOLERANCE = 3e-6
"""Largest difference after all steps over the largest latent; the worst seen is 9e-7 (100 steps)."""


def model(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A smooth velocity that mixes channels and knows the time."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)) * 0.5
    return torch.einsum("oc,bcfhw->bofhw", mix, torch.tanh(latents)) * (1 + timestep / 1000)


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 4, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def by_diffusers(template: UniPCMultistepScheduler, steps: int, flow_shift: float, latents: torch.Tensor) -> list:
    scheduler = UniPCMultistepScheduler.from_config(template.config, flow_shift=flow_shift)
    scheduler.set_timesteps(steps)
    # Without it diffusers looks the first timestep up, and fails where two are alike (100 steps, flow_shift 20).
    scheduler.set_begin_index(0)
    trail = []
    for timestep in scheduler.timesteps:
        latents = scheduler.step(model(latents, timestep), timestep, latents, return_dict=False)[0]
        trail.append(latents)
    return trail


@pytest.mark.parametrize("flow_shift", [0.5, 1.0, 2.0, 5.0, 20.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 25, 40, 100])
def test_both_ways_follow_diffusers(pipeline: WanPipeline, steps: int, flow_shift: float) -> None:
    schedule = Schedule(pipeline.scheduler, steps=steps, flow_shift=flow_shift, device=CPU)
    expected = by_diffusers(pipeline.scheduler, steps, flow_shift, noise())
    exact = fast = noise()
    exact_state, fast_state = SolverState.at_start(exact), SolverState.at_start(fast)
    for step, wanted in enumerate(expected):
        timestep = schedule.timesteps[step]
        exact = schedule.step_as_diffusers(exact_state, step, model(exact, timestep), exact)
        fast, fast_state = solver_step(schedule.table[step : step + 1], fast_state, model(fast, timestep), fast)
        assert torch.equal(exact, wanted), step
        assert (fast - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), step


def test_a_batch_at_different_steps_is_as_if_alone(pipeline: WanPipeline) -> None:
    """Two clips of different schedules share each step, the second three steps ahead."""
    first = Schedule(pipeline.scheduler, steps=6, flow_shift=2.0, device=CPU)
    second = Schedule(pipeline.scheduler, steps=9, flow_shift=5.0, device=CPU)

    def alone(schedule: Schedule, latents: torch.Tensor, state: SolverState, steps: range) -> tuple:
        for step in steps:
            row = schedule.table[step : step + 1]
            latents, state = solver_step(row, state, model(latents, schedule.timesteps[step]), latents)
        return latents, state

    a, b = noise(1), noise(2)
    state_a = SolverState.at_start(a)
    b, state_b = alone(second, b, SolverState.at_start(b), range(3))
    wanted_a, _ = alone(first, a, state_a, range(6))
    wanted_b, _ = alone(second, b, state_b, range(3, 9))

    latents = torch.cat([a, b])
    state = SolverState(
        **{name: torch.cat([tensor, state_b.state_tensors()[name]]) for name, tensor in state_a.state_tensors().items()}
    )
    for step in range(6):
        rows = torch.stack([first.table[step], second.table[step + 3]])
        timesteps = torch.stack([first.timesteps[step], second.timesteps[step + 3]]).view(2, 1, 1, 1, 1)
        latents, state = solver_step(rows, state, model(latents, timesteps), latents)
    torch.testing.assert_close(latents, torch.cat([wanted_a, wanted_b]), rtol=0, atol=1e-6)


def test_state_goes_on_elsewhere(pipeline: WanPipeline) -> None:
    """Saved after each step and loaded into a new state and a new schedule: the same bits at the end."""
    wanted = by_diffusers(pipeline.scheduler, 5, 2.0, noise())[-1]
    latents = noise()
    state = SolverState.at_start(latents)
    for step in range(5):
        schedule = Schedule(pipeline.scheduler, steps=5, flow_shift=2.0, device=CPU)
        saved = {name: tensor.clone() for name, tensor in state.state_tensors().items()}
        state = SolverState.load_state_tensors(saved, CPU)
        latents = schedule.step_as_diffusers(state, step, model(latents, schedule.timesteps[step]), latents)
    assert torch.equal(latents, wanted)
    with pytest.raises(KeyError):
        SolverState.load_state_tensors({"last_sample": latents}, CPU)
