"""Training and sampling must mean the same by a noise level, a timestep and a prediction."""

import torch

from training.model import build_scheduler
from training.train_denoiser import noise_levels


def test_the_sampler_undoes_what_training_does() -> None:
    scheduler = build_scheduler()
    scheduler.set_timesteps(25)
    assert (scheduler.timesteps - 1000 * scheduler.sigmas[:-1]).abs().max() <= 1.0
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4)
    latents = noise
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        torch.testing.assert_close(latents, torch.lerp(clean, noise, sigma), rtol=0, atol=2e-2)
        latents = scheduler.step(noise - clean, timestep, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, clean, rtol=0, atol=1e-3)


def test_noise_levels_lean_towards_noise() -> None:
    torch.manual_seed(0)
    sigma = noise_levels(20_000, 3.0, torch.device("cpu"))
    assert 0.65 < float(sigma.mean()) < 0.75
    assert float(sigma.min()) < 0.05
    assert float(sigma.max()) > 0.98
