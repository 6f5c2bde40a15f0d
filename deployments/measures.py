"""What happens to jobs, clips and the queue, put into metrics.py's numbers."""

import logging
import time
from collections.abc import Mapping, Sequence

from deployments import metrics
from serve_app.engine.clip import ClipDone, ClipEvent, ClipRequest, StepDone
from serve_app.engine.report import EngineCounts, EngineReport
from serve_app.errors import (
    EncodingFailed,
    FramesLost,
    GpuOutOfMemory,
    LatentsNotFinite,
    ReplicaDraining,
    ReplicaLost,
    StorageUnavailable,
    UnusableOutput,
)
from serve_app.jobs.job import Job, JobStatus
from serve_app.jobs.presets import JobType
from serve_app.jobs.store import JobStore, JobWork
from serve_app.settings import ModelSettings, Settings

logger = logging.getLogger(__name__)

READ_EVERY_S = 2.0
"""Ray forgets a gauge that nobody set within two of its export intervals (10 s each, unless told otherwise)."""
MOST_QUEUED = 1000
"""Queued jobs that are read one by one; were there more, the rest are taken to be like them."""
USUAL_FAILURES = (
    *(ReplicaLost, FramesLost, ReplicaDraining, GpuOutOfMemory, LatentsNotFinite),
    *(UnusableOutput, EncodingFailed, StorageUnavailable),
)
OUTCOMES = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


def begin(settings: Settings) -> None:
    """Start the counters of what is rare at none: the first value that Prometheus sees of a series is no increase to it."""
    for job_type in JobType:
        of = {"type": job_type.value, "model": settings.model_of(job_type)}
        for outcome in OUTCOMES:
            metrics.JOBS.begin(**of, outcome=outcome.value)
        for kept in ("on_time", "late"):
            metrics.DEADLINES.begin(**of, kept=kept)
        metrics.JOBS_TOOK.begin(**of)
        for use in ("billed", "wasted"):
            metrics.GPU_SECONDS.begin(**of, use=use)
    for kind in USUAL_FAILURES:
        for then in ("retried", "gave_up"):
            metrics.FAILURES.begin(code=kind.code, then=then)


def job_ended(job: Job, outcome: JobStatus, spent_gpu_s: float, models: Mapping[str, ModelSettings]) -> None:
    """A job was just driven to its end, with `spent_gpu_s` of device time that was not wasted on the way."""
    now, of = time.time(), {"type": job.spec.type.value, "model": job.spec.model}
    took_s = now - job.created_at
    metrics.JOBS.add(1, **of, outcome=outcome.value)
    if job.started_at is not None:
        metrics.JOB_WAIT.observe(max(0.0, job.started_at - job.created_at), **of)
    if outcome is JobStatus.SUCCEEDED:
        metrics.JOBS_TOOK.add(took_s, **of)
        metrics.JOB_SECONDS.observe(took_s, **of)
        metrics.DEADLINES.add(1, **of, kept="on_time" if now <= job.deadline else "late")
    for use, gpu_s in gpu_seconds(job, outcome, spent_gpu_s).items():
        metrics.GPU_SECONDS.add(gpu_s, **of, use=use)
        metrics.JOBS_COST.add(models[job.spec.model].cost_of(gpu_s) or 0.0, **of, use=use)
    logger.info("job %s %s after %.1f s, %.1f GPU-seconds", job.id, outcome, took_s, spent_gpu_s)


def gpu_seconds(job: Job, outcome: JobStatus, spent_gpu_s: float) -> dict[str, float]:
    """An ended job's device time, billed and wasted. What a failed job had is wasted, too: nobody is billed for it."""
    if outcome is JobStatus.FAILED:
        return {"billed": 0.0, "wasted": job.wasted_gpu_s + spent_gpu_s}
    return {"billed": spent_gpu_s, "wasted": job.wasted_gpu_s}


class StoreStanding:
    """Whether the job store answers this process."""

    def __init__(self) -> None:
        self._away = False
        metrics.STORE_OUTAGES.begin()

    def answers(self) -> None:
        """It did."""
        self._away = False
        metrics.UP.set(1.0)

    def is_away(self, who: str, error: Exception) -> None:
        """It did not, when `who` asked; once an outage is enough to count and to log."""
        metrics.UP.set(0.0)
        if not self._away:
            self._away = True
            metrics.STORE_OUTAGES.add()
            logger.warning("%s waits for the job store: %s", who, error)


class QueueWatch:
    """Reads the queue for its gauges."""

    def __init__(self, store: JobStore, models: Sequence[str]) -> None:
        self._store = store
        self._models = models

    async def read(self) -> None:
        """Once. Raises StoreUnavailable."""
        now, running, replicas = time.time(), await self._store.running(), await self._store.replicas()
        for model in self._models:
            count, queued = await self._store.queued(model, limit=MOST_QUEUED)
            runs = [job for job in running if job.model == model]
            metrics.QUEUE_JOBS.set(count, model=model)
            metrics.QUEUE_GPU_SECONDS.set(_work_s(queued) * count / max(1, len(queued)), model=model)
            metrics.RUNNING_JOBS.set(len(runs), model=model)
            metrics.LATE_JOBS.set(sum(job.deadline < now for job in (*queued, *runs)), model=model)
            metrics.REPLICAS.set(sum(replica.model == model for replica in replicas), model=model)


def _work_s(jobs: Sequence[JobWork]) -> float:
    return sum(job.estimated_gpu_s for job in jobs)


class ReplicaWatch:
    """Of one generator replica."""

    def __init__(self, model: str, settings: ModelSettings, started_at: float) -> None:
        """`started_at`: monotonic seconds at which the replica began to start; it takes work now."""
        self._model = model
        self._settings = settings
        self._seen_at = started_at
        self._counts = EngineCounts()
        self._checkpoint_failures = 0
        self.busy_share = 0.0
        """Of the time between the last two reports."""
        metrics.COLD_START.observe(time.monotonic() - started_at, model=model)

    def event(self, request: ClipRequest, event: ClipEvent) -> None:
        """Something happened to a clip."""
        of = {"model": self._model, "shape": f"{request.width}x{request.height}x{request.frames}"}
        match event:
            case StepDone():
                metrics.STEP.observe(1000 * event.step_s, **of)
            case ClipDone():
                metrics.DECODE.observe(event.receipt.decode_ms / 1000, **of)

    def report(self, report: EngineReport) -> None:
        """What the engine says of itself now; its difference to what it said before is counted."""
        now, counts, before, model = time.monotonic(), report.counts, self._counts, self._model
        held_s, busy_s = now - self._seen_at, counts.busy_s - before.busy_s
        metrics.GPU_HELD.add(held_s, model=model)
        metrics.REPLICAS_COST.add(self._settings.cost_of(held_s) or 0.0, model=model)
        metrics.GPU_BUSY.add(busy_s, model=model)
        metrics.PREEMPTIONS.add(counts.preemptions - before.preemptions, model=model)
        metrics.PROMPT_EMBEDS.add(counts.embeds_reused - before.embeds_reused, model=model, cache="hit")
        metrics.PROMPT_EMBEDS.add(counts.embeds_computed - before.embeds_computed, model=model, cache="miss")
        metrics.CHECKPOINTS.add(counts.checkpoints - before.checkpoints, model=model)
        metrics.CHECKPOINT_FAILURES.add(report.checkpoint_failures - self._checkpoint_failures, model=model)
        self.busy_share = min(1.0, busy_s / held_s) if held_s > 0 else 0.0
        self._seen_at, self._counts, self._checkpoint_failures = now, counts, report.checkpoint_failures
