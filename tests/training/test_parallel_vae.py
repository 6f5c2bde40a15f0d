"""Training runs the VAE over all frames at once; the service runs it one latent frame at a time. Both must be the same VAE."""

import pytest
import torch

from training.model import build_vae
from training.parallel_vae import ParallelVae


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_parallel_is_the_same_as_frame_by_frame(frames: int) -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    pixels = torch.rand(1, 3, frames, 64, 96) * 2 - 1
    with torch.inference_mode():
        own = vae.encode(pixels).latent_dist
        own_pixels = vae.decode(own.mean).sample
        parallel = ParallelVae(vae)
        mean, log_variance = parallel.moments(pixels)
        torch.testing.assert_close(mean, own.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_variance, own.logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parallel.decode(mean).clamp(-1, 1), own_pixels, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vae.decode(own.mean).sample, own_pixels, rtol=1e-4, atol=1e-5)
