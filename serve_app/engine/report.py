"""What an engine says of itself. Plain data; importing it imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.engine.clip_state import ClipState
    from serve_app.engine.speed import Speed


@dataclass(frozen=True)
class ClipProgress:
    """One clip that is alive: `step` of `steps` are done; `remaining_s` of device work are left, decode included."""

    clip_id: str
    phase: str
    """`text`, `denoise`, `decode`, or `done` while the last of its work finishes."""
    step: int
    steps: int
    deadline: float
    """Unix seconds."""
    gpu_s: float
    remaining_s: float


@dataclass(frozen=True)
class EngineCounts:
    """What an engine has done since its start."""

    busy_s: float = 0.0
    """Seconds in which the device worked."""
    preemptions: int = 0
    """How often the device went to another clip while the one before still had work for it."""
    embeds_reused: int = 0
    """Prompts whose embeddings were there from before."""
    embeds_computed: int = 0
    """Prompts that the text encoder had to be run for."""
    checkpoints: int = 0
    """Checkpoints that were written."""


@dataclass(frozen=True)
class EngineReport:
    """The engine at one moment."""

    clips: tuple[ClipProgress, ...]
    """All clips that are alive, earliest deadline first."""
    running: ClipProgress | None
    """The clip that was given the device last, if it is still alive."""
    backlog_gpu_s: float
    """Seconds of device work left in all clips."""
    checkpoint_failures: int = 0
    """Reads and writes of checkpoints that failed, since the start; the clips went on without."""
    counts: EngineCounts = field(default=EngineCounts(), compare=False)


def report_of(
    clips: "Sequence[ClipState]",
    running: "ClipState | None",
    speed: "Speed",
    checkpoint_failures: int,
    counts: EngineCounts,
) -> EngineReport:
    """The report on `clips`, of which `running` may be one."""
    in_order = sorted(clips, key=lambda clip: clip.request.deadline)
    progress = {clip: _progress(clip, speed.remaining_s(clip)) for clip in in_order}
    return EngineReport(
        clips=tuple(progress.values()),
        running=None if running is None else progress.get(running),
        backlog_gpu_s=sum(clip.remaining_s for clip in progress.values()),
        checkpoint_failures=checkpoint_failures,
        counts=counts,
    )


def _progress(clip: "ClipState", remaining_s: float) -> ClipProgress:
    return ClipProgress(
        clip_id=clip.request.clip_id,
        phase=clip.phase.value,
        step=clip.finished_steps,
        steps=clip.request.steps,
        deadline=clip.request.deadline,
        gpu_s=clip.gpu_s,
        remaining_s=remaining_s,
    )
