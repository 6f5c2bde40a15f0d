"""AutoencoderKLWan over all frames at once, for training: the same results as its own frame-by-frame way, differentiable.

diffusers' VAE runs through time with a cache, one latent frame after the other. Everything in it is causal, so the cache
can be had by padding: only halving and doubling of time treat the first frame apart (tests/training compares both ways).
"""

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanRMS_norm, patchify, unpatchify
from torch.nn import functional


class ParallelVae:
    """`vae`'s encoder and decoder without its cache. Changes how `vae` computes, not what: its own methods still work."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        for module in vae.modules():
            if isinstance(module, WanResample) and module.mode in ("downsample3d", "upsample3d"):
                module.__class__ = _ParallelResample
            elif isinstance(module, WanRMS_norm):
                module.__class__ = _Norm

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the latents of [clips, 3, 4k+1, height, width] pixels of -1 to 1."""
        vae = self.vae
        encoded = vae.quant_conv(vae.encoder(patchify(pixels.contiguous(), vae.config.patch_size)))
        mean, log_variance = encoded.float().chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, about -1 to 1, of latents as `moments` gives them."""
        vae = self.vae
        pixels = vae.decoder(vae.post_quant_conv(latents), first_chunk=True)
        return unpatchify(pixels, vae.config.patch_size)


class _ParallelResample(WanResample):
    def forward(self, x, feat_cache=None, feat_idx=[0]):  # type: ignore[no-untyped-def]  # noqa: B006
        if feat_cache is not None:
            return super().forward(x, feat_cache, feat_idx)
        if self.mode == "upsample3d" and x.shape[2] > 1:
            later = self.time_conv(x[:, :, 1:])
            pairs = later.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
            x = torch.cat([x[:, :, :1], pairs], dim=2)
        frames = x.shape[2]
        y = self.resample(x.transpose(1, 2).flatten(0, 1))
        x = y.unflatten(0, (-1, frames)).transpose(1, 2)
        if self.mode == "downsample3d" and frames > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
        return x


class _Norm(WanRMS_norm):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return (_normalized_on_gpu if x.is_cuda else _normalized)(x, self.gamma, self.scale, self.channel_first)


def _normalized(x: torch.Tensor, gamma: torch.Tensor, scale: float, channel_first: bool) -> torch.Tensor:
    """WanRMS_norm.forward (its bias is always off in this VAE)."""
    return functional.normalize(x.float(), dim=1 if channel_first else -1).to(x.dtype) * scale * gamma.to(x.dtype)


_normalized_on_gpu = torch.compile(_normalized, dynamic=True)
