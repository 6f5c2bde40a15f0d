"""What goes into the engine and what comes out. Plain data; importing it imports no torch."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serve_app.errors import WanServeError


@dataclass(frozen=True)
class ClipRequest:
    """One denoising run of 1 to 81 frames.

    `width` and `height` are pixels; `frames` is of the form 4k+1; `deadline` is in Unix seconds and orders clips;
    `clip_id` is unique among the clips that are alive, and the same again when the clip is resumed elsewhere.
    """

    clip_id: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance_scale: float
    flow_shift: float
    seed: int
    deadline: float
    profile: str = "exact"
    checkpoint_key: str | None = None
    """Where the clip's checkpoints lie, such as `{job_id}/clip-0`: the same over all attempts. None: it has none."""
    estimated_gpu_s: float = 0.0
    """Its work on the model's reference card, for whoever chooses a replica; the engine measures for itself."""


@dataclass(frozen=True)
class ClipReceipt:
    """What ran, for the job's receipt."""

    model: str
    model_revision: str | None
    trained: bool
    """False for the tiny test model: its output is noise, and everything that shows it says so."""
    profile: str
    device: str
    dtype: str
    seed: int
    steps: int
    gpu_s: float
    """Seconds of device time for text, denoising, previews and decoding, over all attempts, lost work not included."""
    step_ms: float
    """Median of the steps."""
    decode_ms: float
    resumed_from_steps: tuple[int, ...] = ()
    """The steps after which the clip was taken up again from a checkpoint, one for each time."""
    kernels: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    replica: str | None = None
    """Which replica ended it; filled in by that, since an engine knows of none."""
    paced: bool = False
    """True where no model ran: a PacedEngine took its time."""


@dataclass(frozen=True)
class ClipStarted:
    """The engine gave the clip its first device time.

    Of a clip that was taken up again from a checkpoint, `resumed_from_step` steps were done by earlier attempts, in
    `earlier_gpu_s` seconds of device time; every later `gpu_s` includes them.
    """

    clip_id: str
    resumed_from_step: int = 0
    earlier_gpu_s: float = 0.0


@dataclass(frozen=True)
class StepDone:
    """The device has finished step `step` of `steps` (counted from 1), in `step_s` seconds of device time; with all that led here,
    in `gpu_s`."""

    clip_id: str
    step: int
    steps: int
    gpu_s: float
    eta_s: float
    """Device seconds that this clip still needs, decode included."""
    step_s: float


@dataclass(frozen=True)
class CheckpointSaved:
    """The clip can be taken up again after step `step`; `gpu_s` device seconds will not have to be spent again."""

    clip_id: str
    step: int
    gpu_s: float


@dataclass(frozen=True)
class Preview:
    """The first frame of what the clip would be if it ended after step `step`, as a small JPEG."""

    clip_id: str
    step: int
    jpeg: bytes


@dataclass(frozen=True)
class ClipDone:
    """The clip's frames: uint8 RGB of shape [frames, height, width, 3], C-contiguous."""

    clip_id: str
    frames: np.ndarray
    receipt: ClipReceipt


@dataclass(frozen=True)
class ClipFailed:
    """The clip ended without frames: cancelled, out of memory, not finite, drained.

    `gpu_s` is all the device time that it had: work that was under way when it ended included, and earlier attempts' up to
    the checkpoint that it was taken up from (`ClipStarted.earlier_gpu_s`).
    """

    clip_id: str
    error: WanServeError
    gpu_s: float


ClipEvent = ClipStarted | StepDone | CheckpointSaved | Preview | ClipDone | ClipFailed
