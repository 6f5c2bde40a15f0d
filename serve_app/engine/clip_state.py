"""All that the engine knows of one clip that is alive."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from serve_app.engine.clip import ClipEvent, ClipRequest
from serve_app.errors import WanServeError

if TYPE_CHECKING:
    import torch

    from serve_app.engine.checkpoints import Checkpoint
    from serve_app.engine.solver import Schedule, SolverState


class Phase(Enum):
    """What a clip needs next from the device."""

    TEXT = "text"
    DENOISE = "denoise"
    DECODE = "decode"
    DONE = "done"
    """Nothing: all of its work is launched."""


@dataclass(eq=False)
class ClipState:
    """One clip between two units of device work. `latents` are [1, channels, latent frames, height, width], float32."""

    request: ClipRequest
    on_event: Callable[[ClipEvent], object]
    arrived_at: float
    """Unix seconds."""
    last_ran_at: float
    """Unix seconds: end of the clip's latest unit, or the launch of one under way; `arrived_at` before its first."""
    phase: Phase = Phase.TEXT
    cancelled: bool = False
    listened: bool = False
    """Whether somebody wants previews."""
    ending: WanServeError | None = None
    """Why the clip gets no more device time; it ends when what is under way is done."""

    prompt_embeds: "torch.Tensor | None" = None
    negative_prompt_embeds: "torch.Tensor | None" = None
    """None where guidance is off (guidance_scale <= 1)."""
    latents: "torch.Tensor | None" = None
    schedule: "Schedule | None" = None
    """Follows from the request's steps and flow_shift; shared by the clips that have the same."""
    solver: "SolverState | None" = None
    """This clip's own: a solver remembers earlier steps."""
    launched_steps: int = 0
    decode: "DecodeState | None" = None

    units_in_flight: int = 0
    """Pieces of its device work that are launched and not accounted for."""
    finished_steps: int = 0
    """Steps that the device has done."""
    decoded_latent_frames: int = 0
    """Latent frames whose pixels have arrived."""
    gpu_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    decode_s: float = 0.0

    loading_until: float | None = None
    """Moment (of the monotonic clock) until which the answer of the checkpoint store is waited for; None: not waiting."""
    checkpoint: "Checkpoint | None" = None
    """What the clip goes on from, until that is on the device."""
    saved_step: int = 0
    """Steps that need not be done again: in the store."""
    snapshot_step: int = 0
    """Steps done at the latest snapshot: written, or on its way there."""
    snapshot_gpu_s: float = 0.0
    """`gpu_s` at the latest snapshot."""
    resumed_from_steps: tuple[int, ...] = ()
    handing_back: bool = False
    """The replica drains: the clip's last snapshot is taken, and it ends when that is written."""

    @property
    def ready(self) -> bool:
        """Whether the device may be given to it."""
        waits = self.ending is not None or self.handing_back or self.loading_until is not None
        return not waits and self.phase is not Phase.DONE

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on: the same rule as WanPipeline's."""
        return self.request.guidance_scale > 1.0

    def free(self) -> None:
        """Drop everything that lies on the device."""
        self.checkpoint = None
        self.prompt_embeds = self.negative_prompt_embeds = self.latents = self.solver = self.decode = None


@dataclass(eq=False)
class DecodeState:
    """A VAE decode under way, one latent frame at a time. The VAE is causal in time: all it needs of the past is `cache`."""

    latents: "torch.Tensor"
    """[1, channels, latent frames, height, width], scaled as the VAE's decoder wants them."""
    cache: list["torch.Tensor | str | None"]
    """One entry for each causal convolution of the decoder: its latest inputs."""
    frames: "torch.Tensor"
    """uint8 [frames, height, width, 3] on the host, filled from the front."""
    next_latent_frame: int = 0

    @property
    def latent_frames(self) -> int:
        """Latent frames in all."""
        return int(self.latents.shape[2])
