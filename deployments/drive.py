"""What a conductor knows of the jobs that it is driving, and of their clips on the replicas."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.generator import ClipReady
from serve_app.jobs.job import Job, JobStatus, Progress, Shot, StageProgress
from serve_app.jobs.store import Lease
from serve_app.tracing import Facts, Stages, Tracing


@dataclass
class ClipDrive:
    """A clip of a job that this conductor is driving, and the replica's stream that brings its news."""

    index: int
    shot: Shot
    stream: Any = None
    """Open until the job is done with the frames: its end tells the replica to let go of them."""
    ready: ClipReady | None = None
    tries: int = 0
    lock: Literal["shared", "alone"] | None = None
    """How it has, or waits for, the lock of clips whose attempts failed (last_attempt.py)."""
    started: bool = False
    """Whether this try was given the device."""
    step: int = 0
    eta_s: float | None = None
    spent_gpu_s: float = 0.0
    """Device time, up to its last step."""
    saved_gpu_s: float = 0.0
    """The part of it that lies in a checkpoint."""
    saved_step: int = 0

    @property
    def at_risk_gpu_s(self) -> float:
        """What is lost if the replica dies now."""
        return max(0.0, self.spent_gpu_s - self.saved_gpu_s)

    def let_go(self) -> None:
        """Close the stream, which frees the replica of the clip and of its frames."""
        if self.stream is not None:
            self.stream.cancel()
        self.stream = self.ready = None


@dataclass
class Drive:
    """A job that this conductor is driving."""

    lease: Lease
    clips: list[ClipDrive]
    task: asyncio.Task[None] | None = None
    ending: JobStatus | None = None
    """Why its task was cancelled: CANCELLED by its user, QUEUED because this conductor goes away, None: lease lost."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Clips run at once; what they write about the job arrives in the order in which it became true."""
    stepping_since: float | None = None
    """When the first step of this drive was heard of (monotonic seconds), and how many steps were done before it."""
    steps_before: int = 0
    told_at: float = 0.0
    trace: Stages = field(default_factory=lambda: Stages(Tracing(), "job"))
    stage: StageProgress | None = None
    """How far the finisher is with the stage under way, which began at `stage_since` (monotonic seconds)."""
    stage_since: float = 0.0

    @property
    def spent_gpu_s(self) -> float:
        """Device time of all clips."""
        return sum(clip.spent_gpu_s for clip in self.clips)

    def progress(self) -> Progress:
        """Steps of all clips together. Time left: one clip's as its engine says, many clips' from their common pace, and the finisher's
        from its own."""
        step, steps = sum(clip.step for clip in self.clips), sum(clip.shot.sample_steps for clip in self.clips)
        eta_s = self.clips[0].eta_s
        if len(self.clips) > 1 and self.stepping_since is not None:
            took_s, done = time.monotonic() - self.stepping_since, step - self.steps_before
            eta_s = took_s / done * (steps - step) if done > 0 else None
        if self.stage is not None:
            took_s, done = time.monotonic() - self.stage_since, self.stage.done
            eta_s = took_s / done * (self.stage.total - done) if done > 0 else None
        return Progress(step=step, steps=steps, eta_s=eta_s, stage=self.stage)

    def enter_stage(self) -> None:
        """The finisher begins with a stage."""
        self.stage, self.stage_since = None, time.monotonic()

    def let_go(self) -> None:
        """Free the replicas of all clips."""
        for clip in self.clips:
            clip.let_go()

    def start_anew(self) -> None:
        """For another size: nothing of what is there can be used."""
        self.let_go()
        for clip in self.clips:
            clip.saved_step = 0


def trace_of(job: Job, tracing: Tracing) -> Stages:
    """The span of a drive of the job, in its first stage; the first drive's goes back to the submission."""
    since = job.created_at if job.attempts <= 1 else None
    facts: Facts = {"job_id": job.id, "job_type": job.spec.type.value, "model": job.spec.model, "attempt": job.attempts}
    trace = Stages(tracing, "job", job.traceparent, at=since, facts=facts)
    trace.enter("queued", at=since)
    return trace
