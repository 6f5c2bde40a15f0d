"""What an exception during a clip's work means to the clip's owner."""

import logging

import torch

from serve_app.engine.clip import ClipRequest
from serve_app.engine.clip_state import ClipState, Phase
from serve_app.errors import EngineError, GpuOutOfMemory, LatentsNotFinite, ReplicaLost, WanServeError

_log = logging.getLogger(__name__)


class DeviceFault:
    """Whether the device itself failed (not its memory running out): then no later work succeeds in this process."""

    def __init__(self) -> None:
        self.what: str | None = None

    def note(self, error: Exception) -> None:
        """Look at an exception that device work raised."""
        if isinstance(error, torch.AcceleratorError):
            self.what = f"the device failed: {error}"


def as_engine_error(request: ClipRequest, phase: Phase, step: int, error: Exception) -> WanServeError:
    """The typed error for `error`, raised in `phase` after `step` steps. Holds no reference to `error` or its tensors."""
    where = (
        f"clip {request.clip_id} ({request.width}x{request.height}, {request.frames} frames), "
        f"in its {phase.value} phase after step {step} of {request.steps}"
    )
    if isinstance(error, WanServeError):
        return error.with_traceback(None)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return GpuOutOfMemory(
            f"{where}: out of memory{_memory()}: {error}",
            hint="Ask for a smaller size or fewer frames, or run on a card with more memory.",
        )
    if isinstance(error, torch.AcceleratorError):
        return ReplicaLost(f"{where}: the device failed: {error}", hint="The clip runs again on another replica.")
    _log.error("%s: unexpected error", where, exc_info=error)
    return EngineError(f"{where}: {type(error).__name__}: {error}", hint="The replica's log has the whole story.")


def not_finite(clip: ClipState) -> LatentsNotFinite:
    """What to tell of a clip whose latest finished step gave NaN or infinity."""
    request = clip.request
    return LatentsNotFinite(
        f"clip {request.clip_id}: latents are NaN or infinite after step {clip.finished_steps} of {request.steps} "
        f"({request.width}x{request.height}, {request.frames} frames, guidance {request.guidance_scale})",
        hint="Try 640*480, a lower guidance_scale or another seed.",
    )


def _memory() -> str:
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    return (
        f" ({free / 2**30:.2f} GiB of {total / 2**30:.2f} GiB free on the GPU, "
        f"{torch.cuda.memory_allocated() / 2**30:.2f} GiB in tensors, {torch.cuda.memory_reserved() / 2**30:.2f} GiB held)"
    )
