"""Runs the model: encode the text, one denoising step, decode one latent frame.

Each function launches one unit of device work and advances the clips' state; none waits for a result. Two arithmetics:
`exact_bits` has the bits of `WanPipeline` (one clip, one guidance branch at a time, diffusers' own solver); without it the
same mathematics as fast as the card allows (denoise.py, kernels.py, decode.py, text.py), equal to rounding.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from serve_app.engine.clip import ClipRequest
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.decode import Decoder
from serve_app.engine.denoise import gather, scatter
from serve_app.engine.kernels import Kernels, StepShape
from serve_app.engine.solver import Schedule, SolverState
from serve_app.engine.text import TextEncoder, TextEncoderPlace
from serve_app.scheduling.cost import Architecture

if TYPE_CHECKING:
    from diffusers import WanPipeline

_SCHEDULES_KEPT = 64
"""Schedules of the latest (steps, flow_shift) pairs; a few kilobytes each."""


class ModelRunner:
    """The model on its device, and the three kinds of work that clips are made of."""

    def __init__(
        self,
        pipeline: "WanPipeline",
        device: str,
        *,
        exact_bits: bool = True,
        text_encoder_place: TextEncoderPlace = "offload",
    ) -> None:
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.exact_bits = exact_bits
        self.text = TextEncoder(pipeline, self.device, place=text_encoder_place, exact_bits=exact_bits)
        self.kernels = None if exact_bits else Kernels(pipeline.transformer, self.device)
        self.decoder = Decoder(pipeline.vae, self.device, exact_bits=exact_bits)
        self._schedules: dict[tuple[int, float], Schedule] = {}

    @property
    def architecture(self) -> Architecture:
        """The model's shape, for counting FLOPs."""
        transformer, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        return Architecture(
            layers=transformer.num_layers,
            dim=transformer.num_attention_heads * transformer.attention_head_dim,
            ffn_dim=transformer.ffn_dim,
            patch=tuple(transformer.patch_size),
            spatial_compression=vae.scale_factor_spatial,
            temporal_compression=vae.scale_factor_temporal,
        )

    @property
    def size_multiple(self) -> int:
        """What width and height must be a multiple of, in pixels."""
        _, patch_height, patch_width = self.pipeline.transformer.config.patch_size
        return int(self.pipeline.vae_scale_factor_spatial * max(patch_height, patch_width))

    def schedule(self, request: ClipRequest) -> Schedule:
        """The noise schedule of the request's steps and flow_shift."""
        key = (request.steps, request.flow_shift)
        if key not in self._schedules:
            if len(self._schedules) >= _SCHEDULES_KEPT:
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = Schedule(
                self.pipeline.scheduler, steps=request.steps, flow_shift=request.flow_shift, device=self.device
            )
        return self._schedules[key]

    def encode_text(self, clip: ClipState) -> None:
        """Embed the prompts, and make the first latents and the solver's state."""
        request, pipeline = clip.request, self.pipeline
        clip.prompt_embeds = self.text.embed(request.prompt)
        clip.negative_prompt_embeds = self.text.embed(request.negative_prompt) if clip.guided else None
        latents = pipeline.prepare_latents(
            1,
            pipeline.transformer.config.in_channels,
            request.height,
            request.width,
            request.frames,
            torch.float32,
            torch.device("cpu"),
            # Drawn on the CPU, so that a seed means the same clip on every device.
            torch.Generator("cpu").manual_seed(request.seed),
        )
        clip.latents = latents if self.device.type == "cpu" else latents.pin_memory().to(self.device, non_blocking=True)
        clip.schedule = self.schedule(request)
        clip.solver = SolverState.at_start(clip.latents)
        clip.phase = Phase.DENOISE

    def denoise_step(self, clips: Sequence[ClipState]) -> torch.Tensor:
        """One denoising step of `clips`, which share a `step_shape`.

        Returns bool [clips], whether the new latents are all finite: on the host, valid once the device is done.
        """
        if self.kernels is None:
            finite = torch.stack([self._step_as_pipeline(clip) for clip in clips])
        else:
            result = self.kernels.step(gather(clips))
            scatter(result, clips)
            finite = result.finite
        for clip in clips:
            clip.launched_steps += 1
            if clip.launched_steps == clip.request.steps:
                clip.phase = Phase.DECODE
        host = torch.empty(len(clips), dtype=torch.bool, pin_memory=self.device.type == "cuda")
        return host.copy_(finite, non_blocking=True)

    def step_shape(self, request: ClipRequest) -> StepShape:
        """What a clip must have in common with others to be stepped with them."""
        vae = self.pipeline.vae.config
        return StepShape(
            (request.frames - 1) // vae.scale_factor_temporal + 1,
            request.height // vae.scale_factor_spatial,
            request.width // vae.scale_factor_spatial,
            guided=request.guidance_scale > 1.0,
        )

    def clips_together(self, request: ClipRequest, waiting: int) -> int:
        """How many of `waiting` clips of this request's `step_shape` to give to one `denoise_step`."""
        return 1 if self.kernels is None else self.kernels.clips_together(self.step_shape(request), waiting)

    def warm_up(self, requests: Sequence[ClipRequest]) -> None:
        """Make the shapes of `requests` fast (`Kernels.warm_up`). Nothing to do with `exact_bits`."""
        if self.kernels is not None:
            self.kernels.warm_up(list(dict.fromkeys(self.step_shape(request) for request in requests)))
            self.decoder.warm_up(requests)

    def kernels_of(self, request: ClipRequest) -> dict[str, Any]:
        """What this request's steps and decode run on, for its receipt."""
        vae = {"vae_dtype": str(self.pipeline.vae.dtype).removeprefix("torch.")}
        if self.kernels is not None:
            return self.kernels.describe(self.step_shape(request)) | vae
        return {
            "attention": "torch scaled_dot_product_attention",
            "blocks": "eager",
            "cuda_graph": False,
            "guidance": "sequential" if request.guidance_scale > 1.0 else "off",
            "solver": type(self.pipeline.scheduler).__name__,
        } | vae

    def decode_latent_frame(self, clip: ClipState) -> None:
        """Decode the next latent frame into its pixels (1 frame for the first, 4 for each later one) on the host."""
        self.decoder.decode_latent_frame(clip)

    def _step_as_pipeline(self, clip: ClipState) -> torch.Tensor:
        """One step, operation by operation that of `WanPipeline.__call__` in diffusers 0.42. Returns whether all is finite."""
        assert clip.latents is not None
        assert clip.schedule is not None
        assert clip.solver is not None
        transformer = self.pipeline.transformer
        timestep = clip.schedule.timesteps[clip.launched_steps]
        latents = clip.latents.to(transformer.dtype)

        def predict(embeds: torch.Tensor | None) -> torch.Tensor:
            prediction: torch.Tensor = transformer(
                hidden_states=latents,
                timestep=timestep.expand(latents.shape[0]),
                encoder_hidden_states=embeds,
                return_dict=False,
            )[0]
            return prediction

        noise = predict(clip.prompt_embeds)
        if clip.guided:
            unguided = predict(clip.negative_prompt_embeds)
            noise = unguided + clip.request.guidance_scale * (noise - unguided)
        clip.latents = clip.schedule.step_as_diffusers(clip.solver, clip.launched_steps, noise, clip.latents)
        return torch.isfinite(clip.latents).all()
