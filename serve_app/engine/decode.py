"""Latents to pixels, one latent frame at a time. The VAE is causal in time: all it needs of the past is a cache.

Two arithmetics: `exact_bits` is AutoencoderKLWan's own, operation by operation; without it the same mathematics in fewer
passes over memory, in the layout that the GPU's convolutions prefer. The VAE has a dtype of its own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from serve_app.engine.clip import ClipRequest
from serve_app.engine.clip_state import ClipState, DecodeState, Phase
from serve_app.engine.progress import progress_line

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d


class Decoder:
    """The VAE's decoder on its device."""

    def __init__(self, vae: "AutoencoderKLWan", device: torch.device, *, exact_bits: bool) -> None:
        self._vae = vae
        self._device = device
        self._exact_bits = exact_bits
        shape = (1, vae.config.z_dim, 1, 1, 1)
        self._mean = torch.tensor(vae.config.latents_mean).view(shape).to(device, vae.dtype)
        # As in WanPipeline: divided by the inverse, which is not the same bits as multiplied by the deviation.
        self._inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(device, vae.dtype)
        if not exact_bits:
            _use_fewer_passes(vae.decoder)
            if device.type == "cuda":
                _use_channels_last(vae)
                vae.encoder.to("cpu")  # 0.2 GB in float32 that making clips from text never needs

    def decode_latent_frame(self, clip: ClipState) -> None:
        """Launch the next latent frame's decode into its pixels (1 frame for the first, 4 for each later one) on the host."""
        if clip.decode is None:
            clip.decode = self._start(clip)
        decode, vae = clip.decode, self._vae
        index = decode.next_latent_frame
        # A picture has nothing after it that could need its cache.
        cache = decode.cache if self._exact_bits or decode.latent_frames > 1 else None
        rgb = to_rgb(self.pixels(decode.latents[:, :, index : index + 1], cache, first=index == 0))
        temporal = vae.config.scale_factor_temporal
        start = 0 if index == 0 else 1 + temporal * (index - 1)
        decode.frames[start : start + rgb.shape[0]].copy_(rgb, non_blocking=True)
        decode.next_latent_frame += 1
        if decode.next_latent_frame == decode.latent_frames:
            clip.phase = Phase.DONE

    def warm_up(self, requests: Sequence[ClipRequest]) -> None:
        """Decode the first frames of each size once, so that kernels are chosen and compiled before a clip waits for them."""
        config = self._vae.config
        sizes = {(request.width, request.height, request.frames > 1) for request in requests}
        for width, height, video in progress_line(
            sorted(sizes), "warming up the decoder", lambda size: f"{size[0]}x{size[1]}"
        ):
            scale = config.scale_factor_spatial
            frame = torch.zeros(1, config.z_dim, 1, height // scale, width // scale, device=self._device)
            with torch.inference_mode():
                cache = self.new_cache()
                for index in range(3 if video else 1):
                    self.pixels(self.scaled(frame), cache if video else None, first=index == 0)

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """`latents` [1, channels, latent frames, height, width] as the decoder wants them."""
        scaled: torch.Tensor = self._vae.post_quant_conv(latents.to(self._vae.dtype) / self._inverse_std + self._mean)
        return scaled

    def pixels(
        self, latent_frame: torch.Tensor, cache: list["torch.Tensor | str | None"] | None, *, first: bool
    ) -> torch.Tensor:
        """[1, 3, frames, height, width], about -1 to 1, of one scaled latent frame. Advances `cache`; None for a picture."""
        vae = self._vae
        if self._exact_bits:
            pixels: torch.Tensor = vae.decoder(latent_frame, feat_cache=cache, feat_idx=[0], first_chunk=first)
        else:
            pixels = _decode(vae.decoder, latent_frame, cache, first=first)
        if vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels

    def new_cache(self) -> list["torch.Tensor | str | None"]:
        """The cache before the first latent frame."""
        return [None] * self._vae._cached_conv_counts["decoder"]

    def _start(self, clip: ClipState) -> DecodeState:
        assert clip.latents is not None
        request = clip.request
        return DecodeState(
            latents=self.scaled(clip.latents),
            cache=self.new_cache(),
            # Pinned on a GPU, so that the copy need not wait for the device.
            frames=torch.empty(
                (request.frames, request.height, request.width, 3),
                dtype=torch.uint8,
                pin_memory=self._device.type == "cuda",
            ),
        )


def to_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [frames, height, width, 3] of [1, 3, frames, height, width], rounded as WanPipeline's callers do."""
    rgb = (pixels.clamp(-1.0, 1.0) * 0.5 + 0.5).clamp(0.0, 1.0)
    return rgb[0].permute(1, 2, 3, 0).float().mul(255.0).round().to(torch.uint8)


def _decode(
    decoder: "WanDecoder3d", x: torch.Tensor, cache: list["torch.Tensor | str | None"] | None, *, first: bool
) -> torch.Tensor:
    """WanDecoder3d.forward, with the part at full resolution done one frame at a time in float32.

    Every layer there is causal in time with its own cache, so that four frames at once or one after the other is the same.
    It is slower by a quarter and takes a gigabyte less, which float32 needs to stay within 8.2 GB and bfloat16 does not.
    """
    place = [0]
    x = _cached(decoder.conv_in, x, cache, place)
    x = decoder.mid_block(x, feat_cache=cache, feat_idx=place)
    *lower_blocks, last_block = decoder.up_blocks
    for block in lower_blocks:
        x = block(x, feat_cache=cache, feat_idx=place, first_chunk=first)
    frames = []
    for frame in x.split(1 if x.dtype == torch.float32 else x.shape[2], dim=2):
        own_place = list(place)
        full = last_block(frame, feat_cache=cache, feat_idx=own_place, first_chunk=first)
        frames.append(_cached(decoder.conv_out, decoder.norm_out(full), cache, own_place))
    return torch.cat(frames, dim=2)


def _cached(
    convolution: nn.Module, x: torch.Tensor, cache: list["torch.Tensor | str | None"] | None, place: list[int]
) -> torch.Tensor:
    """A causal convolution that continues from `cache[place]`, which afterwards holds its latest two frames."""
    if cache is None:
        return convolution(x)
    index = place[0]
    before = cache[index]
    latest = x[:, :, -2:].clone()
    if latest.shape[2] < 2 and isinstance(before, torch.Tensor):
        latest = torch.cat([before[:, :, -1:], latest], dim=2)
    y: torch.Tensor = convolution(x, before)
    cache[index] = latest
    place[0] += 1
    return y


def _use_channels_last(vae: "AutoencoderKLWan") -> None:
    """Lay the weights out with channels last, as tensor cores read them; activations follow."""
    formats = {5: torch.channels_last_3d, 4: torch.channels_last}
    for module in (*vae.decoder.modules(), vae.post_quant_conv):
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=formats[module.weight.ndim])


def _use_fewer_passes(decoder: nn.Module) -> None:
    """Replace what touches memory more often than it must: padding, normalisation and its activation, and upsampling.

    WanUpsample goes through float32, for nothing: it copies its nearest neighbour in any dtype.
    """
    from diffusers.models.autoencoders import autoencoder_kl_wan as wan

    for module in list(decoder.modules()):
        if isinstance(module, wan.WanCausalConv3d):
            module.__class__ = _CausalConv3d
        elif isinstance(module, wan.WanResidualBlock):
            module.norm1, module.norm2 = _NormSilu(module.norm1), _NormSilu(module.norm2)
            module.nonlinearity = nn.Identity()
        elif isinstance(module, wan.WanResample) and module.mode == "upsample2d":
            module.resample = _FrameByFrame(module.resample)
        elif isinstance(module, wan.WanUpsample):
            module.__class__ = nn.Upsample
    decoder.norm_out = _NormSilu(decoder.norm_out)  # type: ignore[arg-type]
    decoder.nonlinearity = nn.Identity()


class _CausalConv3d(nn.Conv3d):
    """WanCausalConv3d without copies of zeros: those around the picture are left to the convolution itself.

    Before the first frame there are zeros too, so that of three weights in time only the last meets something else.
    """

    _padding: tuple[int, int, int, int, int, int]

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        width, _, height, _, frames, _ = self._padding
        weight = self.weight
        if cache_x is None and frames > 0 and x.shape[2] == 1:
            weight, frames = weight[:, :, -1:].contiguous(memory_format=torch.channels_last_3d), 0
        if cache_x is not None and frames > 0:
            x = torch.cat([cache_x, x], dim=2)
            frames -= cache_x.shape[2]
        if frames > 0:
            x = functional.pad(x, (0, 0, 0, 0, frames, 0))
        return functional.conv3d(x, weight, self.bias, self.stride, (0, height, width), self.dilation, self.groups)


class _FrameByFrame(nn.Module):
    """A layer that treats frames alike and alone, given one at a time in float32 to keep what it makes on the way small."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        if frames.dtype != torch.float32:
            return self.layer(frames)
        return torch.cat([self.layer(frame) for frame in frames.split(1)])


class _NormSilu(nn.Module):
    """WanRMS_norm and the SiLU after it, in one kernel where there is a GPU."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.gamma: nn.Parameter = norm.gamma  # type: ignore[assignment]
        self._scale = float(norm.scale)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Detached: a parameter's size is a constant to the compiler, so that each would be compiled for itself.
        return (_norm_silu_compiled if x.is_cuda else _norm_silu)(x, self.gamma.detach(), self._scale)


def _norm_silu(x: torch.Tensor, gamma: torch.Tensor, scale: float) -> torch.Tensor:
    """silu(x / max(|x|, 1e-12) * scale * gamma), the length |x| taken over the channels (F.normalize), in float32."""
    wide = x.float()
    length = wide.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
    return functional.silu(wide / length * (scale * gamma)).to(x.dtype)


_norm_silu_compiled = torch.compile(_norm_silu, dynamic=True)
