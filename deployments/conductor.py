"""Drives each job from claim to artifact. Reading `_run` from top to bottom tells the life of a job."""

import asyncio
import base64
import logging
import time
from collections.abc import Coroutine, Iterable
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import measures, metrics
from deployments.claims import Claims
from deployments.drive import ClipDrive, Drive, trace_of
from deployments.forever import forever
from deployments.generator import ClipReady
from deployments.last_attempt import LastAttempt
from deployments.patience import patiently
from deployments.translated import exhausted, too_long, translated
from serve_app import logs
from serve_app.engine.checkpoints import CheckpointStore
from serve_app.engine.clip import CheckpointSaved, ClipFailed, ClipRequest, ClipStarted, Preview, StepDone
from serve_app.errors import (
    CheckpointUnavailable,
    ClipCancelled,
    FramesLost,
    LeaseLost,
    ReplicaLost,
    StoreUnavailable,
    WanServeError,
)
from serve_app.jobs.job import MAX_FAILURES, Delivered, Failure, Job, JobStatus, Progress, Stage, StageProgress
from serve_app.jobs.plan import generated_frames
from serve_app.jobs.presets import STABLE_RESOLUTION
from serve_app.jobs.receipt import make_receipt
from serve_app.jobs.recovery import next_try
from serve_app.jobs.retention import Sweeper
from serve_app.jobs.store import JobStore, Lease
from serve_app.settings import Settings
from serve_app.storage import open_store
from serve_app.tracing import Tracing
from serve_app.webhooks.loop import Courier

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.4
"""At most so often a job's progress is written: a few times a second."""
MAX_LOST_CONDUCTORS = 10
"""A job whose conductors die so often in a row, without a new checkpoint, is taken for the cause."""


class MakeAgain(Exception):
    """All clips of the job start anew, at the stable size."""


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=0.1)
class Conductor:
    """Claims jobs as the cluster can chew them and drives each under a lease."""

    async def __init__(
        self, settings: Settings, generators: dict[str, DeploymentHandle], finisher: DeploymentHandle
    ) -> None:
        logs.join()
        self._settings = settings
        self._generators = {model: generator.options(stream=True) for model, generator in generators.items()}
        self._finisher = finisher.options(stream=True)
        self._store = JobStore(settings.resolved_store_url, prefix=settings.store_prefix)
        self._checkpoints = CheckpointStore(settings.resolved_checkpoint_url)
        self._sweeper = Sweeper(self._store, open_store(settings), settings, self._checkpoints)
        self._tracing = Tracing.of(settings, "Conductor")
        self._claims = Claims(self._store, settings, self._generators.keys())
        self._last_attempt = LastAttempt(self._store, max_attempts=settings.max_attempts, lease_s=settings.lease_s)
        self._drives: dict[str, Drive] = {}
        self._courier = Courier.of(settings, self._store)
        queue = measures.QueueWatch(self._store, list(settings.models))
        measures.begin(settings)
        turns = (self._claim, self._beat, self._courier.turn, self._sweeper.turn)
        loops = [*(forever(turn) for turn in turns), forever(queue.read, measures.READ_EVERY_S)]
        self._loops = [asyncio.create_task(loop) for loop in loops]

    # ---- one job ----------------------------------------------------------------------------------------------------

    async def _run(self, job: Job, drive: Drive) -> None:
        """Generate every clip, finish, deliver; what fails is tried again as `next_try` says. Each line that returns was
        written down."""
        finish_attempt = 1
        if job.lost_conductors >= MAX_LOST_CONDUCTORS:
            raise exhausted(job, f"{job.lost_conductors} conductors fell silent while they drove it")
        while True:
            if missing := [clip for clip in drive.clips if clip.ready is None]:
                await self._enter(job, drive, Stage.GENERATING, progress=Progress())
                await self._tell_clips_to_make(drive)
                try:
                    await _all(self._make(job, drive, clip) for clip in missing)
                except MakeAgain:
                    drive.start_anew()
                    continue
            ready = [clip.ready for clip in drive.clips if clip.ready is not None]
            job.gpu_s = sum(clip.receipt.gpu_s for clip in ready)
            await self._enter(job, drive, Stage.FINISHING, gpu_s=job.gpu_s)
            try:
                receipt = make_receipt(job, [clip.receipt for clip in ready])
                delivered = await self._finish(job, drive, ready, receipt)
                break
            except LeaseLost:
                raise
            except Exception as error:
                failure = translated(error)
                if isinstance(failure, FramesLost):  # they are decoded again from the final latents
                    job.wasted_gpu_s += sum(clip.at_risk_gpu_s for clip in drive.clips)
                    drive.let_go()
                try:
                    await self._try_again(job, drive, failure, finish_attempt, self._settings.max_finish_attempts)
                except MakeAgain:
                    drive.start_anew()
                    continue
                finish_attempt += 1
        await self._end(
            job,
            drive,
            JobStatus.SUCCEEDED,
            {"artifacts": [artifact.name for artifact in delivered.artifacts]},
            progress=drive.progress().model_copy(update={"eta_s": 0.0}),
            artifacts=delivered.artifacts,
            receipt=delivered.receipt,
        )

    async def _make(self, job: Job, drive: Drive, clip: ClipDrive) -> None:
        """One clip, tried again as long as its budget lasts, each time from its last checkpoint."""
        while clip.ready is None:
            try:
                async with self._last_attempt.guarded(job, clip):
                    clip.ready = await self._generate(job, drive, clip)
                await self._tell_clips_to_make(drive)
            except LeaseLost:
                raise
            except Exception as error:
                clip.let_go()
                clip.step = 0
                job.wasted_gpu_s += clip.at_risk_gpu_s
                clip.spent_gpu_s = clip.saved_gpu_s
                setbacks = job.setbacks.get(clip.index, 0)
                counted = await self._try_again(
                    job, drive, translated(error), setbacks + 1, self._settings.max_attempts
                )
                # A clip that never began on the replica did not kill it. The first loss counts all the same, since the
                # news of the beginning may have died with the replica.
                if counted and (clip.started or setbacks == 0):
                    job.setbacks[clip.index] = setbacks + 1
                job.attempts += 1
                async with drive.writing:
                    await patiently(self._store.write)(
                        drive.lease, attempts=job.attempts, setbacks=job.setbacks, progress=drive.progress()
                    )

    async def _generate(self, job: Job, drive: Drive, clip: ClipDrive) -> ClipReady:
        """One try at a clip, on the replica that the router picks (routing.py), its steps written as progress."""
        spec, shot, lease = job.spec, clip.shot, drive.lease
        clip.tries += 1
        clip.started, clip.step, clip.spent_gpu_s, clip.saved_gpu_s = False, 0, 0.0, 0.0
        request = ClipRequest(
            clip_id=f"{job.id}.{lease.token}.{clip.index}-{clip.tries}",
            prompt=shot.prompt,
            negative_prompt=shot.negative_prompt,
            width=spec.width,
            height=spec.height,
            frames=generated_frames(shot.frames),
            steps=shot.sample_steps,
            guidance_scale=shot.guidance_scale,
            flow_shift=shot.sample_shift,
            seed=shot.seed,
            deadline=job.deadline,
            profile=spec.profile,
            checkpoint_key=f"{job.id}/clip-{clip.index}",
            estimated_gpu_s=job.estimated_gpu_s / len(drive.clips),
        )
        await self._claims.replicas_to_come(spec.model)
        if len(drive.clips) > 1:
            await self._claims.room_for(request, spec.model)
        clip.stream = self._generators[spec.model].generate.remote(request, drive.trace.traceparent)
        async for event in clip.stream:
            match event:
                case ClipStarted():
                    clip.started = True
                    clip.spent_gpu_s = clip.saved_gpu_s = event.earlier_gpu_s
                    clip.step = event.resumed_from_step
                    clip.saved_step = max(clip.saved_step, event.resumed_from_step)
                case StepDone():
                    clip.step, clip.eta_s, clip.spent_gpu_s = event.step, event.eta_s, event.gpu_s
                    await self._tell_progress(drive, last=event.step == event.steps)
                case CheckpointSaved():
                    clip.saved_gpu_s = event.gpu_s
                    if event.step > clip.saved_step:
                        await self._came_further(job, drive, clip)
                    clip.saved_step = max(clip.saved_step, event.step)
                case Preview():
                    picture = {"step": event.step, "jpeg_base64": base64.b64encode(event.jpeg).decode()}
                    await self._tell(lease, "preview", picture | ({"clip": clip.index} if job.spec.shots else {}))
                case ClipFailed():
                    raise event.error
                case ClipReady():
                    return event
        raise ReplicaLost(f"the generator replica closed the stream of clip {request.clip_id} before its end")

    async def _tell_clips_to_make(self, drive: Drive) -> None:
        if len(drive.clips) > 1:
            to_make = sum(clip.ready is None for clip in drive.clips)
            await patiently(self._store.note_clips_to_make)(drive.lease, to_make)

    async def _tell_progress(self, drive: Drive, *, last: bool) -> None:
        now = time.monotonic()
        if drive.stepping_since is None:
            drive.stepping_since, drive.steps_before = now, drive.progress().step
        if last or now - drive.told_at > PROGRESS_EVERY_S:
            drive.told_at = now
            async with drive.writing:
                progress = drive.progress()
                await self._tell(drive.lease, "progress", progress.model_dump(), progress=progress)

    async def _came_further(self, job: Job, drive: Drive, clip: ClipDrive) -> None:
        """A new checkpoint: what went wrong before it is behind the clip."""
        if job.setbacks.pop(clip.index, 0) or job.lost_conductors:
            job.lost_conductors = 0
            async with drive.writing:
                await patiently(self._store.write)(drive.lease, setbacks=job.setbacks, lost_conductors=0)
        await self._last_attempt.let_go(job.id, clip)

    async def _finish(self, job: Job, drive: Drive, clips: list[ClipReady], receipt: dict[str, Any]) -> Delivered:
        """Join, upscale, encode, mark, check and upload on a finisher replica, what it says written as progress."""
        stream = self._finisher.finish.remote(job, [clip.frames for clip in clips], receipt, drive.trace.traceparent)
        drive.enter_stage()
        try:
            async for update in stream:
                match update:
                    case Stage():
                        drive.enter_stage()
                        await self._enter(job, drive, update, progress=drive.progress())
                    case StageProgress():
                        drive.stage = update
                        await self._tell_progress(drive, last=update.done == update.total)
                    case Delivered():
                        return update
        finally:
            stream.cancel()
            drive.stage = None
        raise ReplicaLost(f"the finisher replica closed the stream of job {job.id} before its end")

    async def _try_again(self, job: Job, drive: Drive, error: WanServeError, attempt: int, max_attempts: int) -> bool:
        """Write the failure into the job's story and wait, or raise where it was the last. Whether the attempt counted.

        Raises `MakeAgain` where all clips are to be made again at the stable size.
        """
        logger.warning("job %s, attempt %d: %s: %s", job.id, attempt, error.code, error)
        move = next_try(error, job, attempt=attempt, max_attempts=max_attempts)
        then = move.in_words if move else "gave up"
        failure = Failure(
            at=time.time(), stage=job.stage, attempt=attempt, code=error.code, message=error.message, then=then
        )
        metrics.FAILURES.add(code=error.code, then="retried" if move else "gave_up")
        job.failures = [*job.failures, failure][-MAX_FAILURES:]
        if move and move.degraded:
            job.degraded = move.degraded
            job.spec = job.spec.model_copy(update={"resolution": STABLE_RESOLUTION})
        async with drive.writing:
            await patiently(self._store.write)(
                drive.lease,
                "retry" if move else None,
                failure.model_dump(),
                failures=job.failures,
                wasted_gpu_s=job.wasted_gpu_s,
                degraded=job.degraded,
                spec=job.spec,
            )
        if move is None:
            raise exhausted(job, error.message) if isinstance(error, ReplicaLost) else error
        if move.degraded:
            raise MakeAgain
        await asyncio.sleep(move.delay_s)
        return move.counts

    async def _enter(self, job: Job, drive: Drive, stage: Stage, **fields: Any) -> None:
        job.stage = stage
        drive.trace.enter(stage.value)
        await patiently(self._store.write)(drive.lease, "stage", {"stage": stage}, stage=stage, **fields)

    async def _tell(self, lease: Lease, event: str, data: dict[str, Any], **fields: Any) -> None:
        """For news that is worth one try: the next step brings newer."""
        try:
            await self._store.write(lease, event, data, **fields)
        except StoreUnavailable as error:
            logger.warning("job %s: %s not written: %s", lease.job_id, event, error)

    # ---- how a job's drive ends -------------------------------------------------------------------------------------

    async def _drive(self, job: Job, drive: Drive) -> None:
        """Run the job and write down how it ended, whatever happens. A lost lease ends the drive without a word."""
        try:
            try:
                async with asyncio.timeout(self._settings.time_limit_s) as limit:
                    await self._run(job, drive)
            except asyncio.CancelledError:
                await self._stopped(job, drive)
            except LeaseLost:
                raise
            except Exception as error:
                if drive.ending is not None:  # it was told to stop while it already failed
                    await self._stopped(job, drive)
                else:
                    await self._failed(
                        job, drive, too_long(self._settings.time_limit_s) if limit.expired() else translated(error)
                    )
            await asyncio.to_thread(self._checkpoints.delete, job.id)
        except LeaseLost as error:
            logger.warning("%s", error)
        except CheckpointUnavailable as error:
            logger.warning("job %s: its checkpoints are left to the sweep: %s", job.id, error)
        finally:
            drive.trace.end(failed="its drive ended here")  # without effect where it has ended by itself
            drive.let_go()
            del self._drives[job.id]

    async def _stopped(self, job: Job, drive: Drive) -> None:
        """The drive's task was cancelled: by the job's user, because this conductor goes away, or for a lost lease."""
        if drive.ending == JobStatus.CANCELLED:
            job.gpu_s = drive.spent_gpu_s
            await self._end(job, drive, JobStatus.CANCELLED, gpu_s=job.gpu_s)
            return
        if drive.ending == JobStatus.QUEUED:
            await self._store.requeue(drive.lease, "its conductor was stopped")
        raise LeaseLost(f"job {job.id} is no longer driven under fencing token {drive.lease.token}")

    async def _failed(self, job: Job, drive: Drive, error: WanServeError) -> None:
        if isinstance(error, ClipCancelled):  # the replica heard of the cancel before this conductor did
            drive.ending = JobStatus.CANCELLED
            await self._stopped(job, drive)
            return
        logger.error("job %s failed: %s: %s", job.id, error.code, error, exc_info=error)
        job.gpu_s = drive.spent_gpu_s
        await self._end(job, drive, JobStatus.FAILED, {"error": error.info.model_dump()}, error=error.info)

    async def _end(
        self, job: Job, drive: Drive, status: JobStatus, data: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        await patiently(self._store.finish)(drive.lease, status, data, **fields)
        measures.job_ended(job, status, job.gpu_s, self._settings.models)
        error = fields.get("error")
        drive.trace.end(failed=error and error.message, facts={"outcome": status.value, "gpu_s": job.gpu_s})

    # ---- all jobs ---------------------------------------------------------------------------------------------------

    async def _claim(self) -> None:
        """Take what the live replicas can chew, or wait for news."""
        found = False
        async for job in self._claims.take(lambda: len(self._drives) < self._settings.max_running_jobs):
            found = True
            clips = [ClipDrive(index, shot) for index, shot in enumerate(job.spec.clips)]
            drive = self._drives[job.id] = Drive(Lease(job.id, job.fencing_token), clips)
            drive.trace = trace_of(job, self._tracing)
            with logs.about(job.id):
                drive.task = asyncio.create_task(self._drive(job, drive))
        if not found:
            await self._store.wait("work", timeout_s=0.5)

    async def _beat(self) -> None:
        """Renew leases, stop what was cancelled or lost, and queue again what other conductors dropped."""
        drives = list(self._drives.values())
        answers = await self._store.heartbeat([drive.lease for drive in drives], lease_s=self._settings.lease_s)
        for drive, answer in zip(drives, answers, strict=True):
            if answer != "ok" and drive.task and drive.ending is None:
                drive.ending = JobStatus.CANCELLED if answer == "cancel" else None
                drive.task.cancel()
            for clip in drive.clips:
                await self._last_attempt.renew(drive.lease.job_id, clip)
        for job_id in await self._store.reap():
            logger.warning("job %s is queued again: its conductor fell silent", job_id)
        await self._store.wait("cancel", timeout_s=self._settings.lease_s / 4)

    async def __del__(self) -> None:
        """Give every job back, so that the next conductor can go on at once."""
        if not hasattr(self, "_loops"):
            return
        for loop in self._loops:
            loop.cancel()
        for drive in self._drives.values():
            drive.ending = JobStatus.QUEUED
            if drive.task:
                drive.task.cancel()
        tasks = [drive.task for drive in self._drives.values() if drive.task]
        if tasks:
            await asyncio.wait(tasks, timeout=3)
        await asyncio.to_thread(self._tracing.close)
        await self._courier.close()
        await self._store.close()


async def _all(makings: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all at once. The first failure ends the others, and is raised when they have ended."""
    tasks = [asyncio.create_task(making) for making in makings]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
