"""CPU replicas that turn frames into delivered files."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import metrics
from deployments.thread_work import News, ThreadWork
from deployments.upscaling import Upscaling
from serve_app import logs
from serve_app.errors import StoreUnavailable, UnusableOutput
from serve_app.jobs.job import Artifact, Delivered, Job, Stage
from serve_app.jobs.presets import UNSTABLE_RESOLUTION
from serve_app.jobs.store import JobStore, Lease
from serve_app.media.defects import find_defect
from serve_app.media.finish import make_files
from serve_app.media.provenance import ready_certificate
from serve_app.media.scratch import scratch_folder, sweep_scratch
from serve_app.settings import Settings
from serve_app.storage import open_store
from serve_app.storage.keys import artifact_key
from serve_app.tracing import Tracing

logger = logging.getLogger(__name__)

STANDING_EVERY_S = 2.0
AT_ONCE, UPSCALED_VIDEOS_AT_ONCE = 4, 2
"""Jobs that a replica works on. Videos that are upscaled wait for the upscaler most of the time, for minutes; the others must not wait
for them."""


# More jobs than are worked on: each kind waits in a line of its own at the replica.
@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=32)
class Finisher:
    """Upscales, encodes, marks, checks and uploads a job's files. Does not start without a certificate that it can sign with."""

    def __init__(self, settings: Settings, upscaler: DeploymentHandle | None = None) -> None:
        logs.join()
        self._settings = settings
        self._certificate = ready_certificate(settings)
        self._tracing = Tracing.of(settings, "Finisher")
        self._artifacts = open_store(settings)
        self._store = JobStore(settings.resolved_store_url, prefix=settings.store_prefix)
        self._upscaling = Upscaling(upscaler) if upscaler else None
        self._pool, self._upscaled_videos = ThreadPoolExecutor(AT_ONCE), ThreadPoolExecutor(UPSCALED_VIDEOS_AT_ONCE)
        sweep_scratch()

    async def finish(
        self, job: Job, frames: list[ray.ObjectRef], receipt: dict[str, Any], traceparent: str | None = None
    ) -> AsyncIterator[News | Delivered]:
        """Make and deliver the files of a job's clips, and its `receipt`, under `{job_id}/{fencing_token}/`.

        Yields how far it is, `Stage.UPLOADING` once the files are made and checked, and at the end what was delivered. Closing the
        stream ends the work at the next block of frames or chunk of an upload.
        """
        spec = job.spec
        if spec.upscale and self._upscaling:
            receipt = receipt | {"upscale": {"factor": spec.upscale, **await self._upscaling.about()}}
        pool = self._upscaled_videos if spec.upscale and not spec.is_image else self._pool
        with scratch_folder() as folder:
            work = ThreadWork()
            watching = asyncio.create_task(self._watch(job, work))
            deliver = partial(self._deliver, work, job, frames, receipt, Path(folder), traceparent=traceparent)
            try:
                async with aclosing(work.run(pool, deliver)) as updates:
                    async for update in updates:
                        yield update
            finally:
                watching.cancel()

    def _deliver(
        self,
        work: ThreadWork,
        job: Job,
        frames: list[ray.ObjectRef],
        receipt: dict[str, Any],
        folder: Path,
        *,
        traceparent: str | None,
    ) -> Delivered:
        job_type = job.spec.type.value
        with logs.about(job.id):
            with self._tracing.span("encode", traceparent), metrics.ENCODE.timed(type=job_type):
                artifacts = make_files(
                    job.spec,
                    _clips(work, job, frames),
                    folder,
                    self._settings,
                    receipt=receipt,
                    certificate=self._certificate,
                    upscale=partial(self._upscaling.upscaled, work) if self._upscaling else None,
                    report=partial(work.tell_progress, "frames"),
                )
            work.tell(Stage.UPLOADING)
            with self._tracing.span("upload", traceparent), metrics.UPLOAD.timed(type=job_type):
                self._upload(work, job, artifacts, folder)
        return Delivered(artifacts=artifacts, receipt=receipt)

    def _upload(self, work: ThreadWork, job: Job, artifacts: list[Artifact], folder: Path) -> None:
        sent, total = 0, sum(artifact.size_bytes for artifact in artifacts)
        for artifact in artifacts:
            key = artifact_key(job.id, job.fencing_token, artifact.name)

            def tell(stored: int, before: int = sent) -> None:
                work.tell_progress("bytes", before + stored, total)

            self._artifacts.put(key, folder / artifact.name, artifact.content_type, tell)
            sent += artifact.size_bytes
        logger.info("job %s: %d files delivered, %.1f MB", job.id, len(artifacts), total / 1e6)

    async def _watch(self, job: Job, work: ThreadWork) -> None:
        """Stop the work once nobody drives the job any more under its fencing token.

        A conductor closes the stream by itself; this is for one that was killed or hangs, since upscaling may go on for minutes.
        """
        lease = Lease(job.id, job.fencing_token)
        while True:
            await asyncio.sleep(STANDING_EVERY_S)
            with suppress(StoreUnavailable):
                (standing,) = await self._store.standings([lease])
                if standing != "ok":
                    logger.warning("job %s is no longer finished here: its lease is %s", job.id, standing)
                    work.stop()
                    return


def _clips(work: ThreadWork, job: Job, frames: list[ray.ObjectRef]) -> Iterator[np.ndarray]:
    """The frames of each clip, when its turn comes. Raises UnusableOutput for what the unstable size may have spoilt."""
    for frames_ref in frames:
        clip = work.ask(_fetched(frames_ref)).result()
        if job.spec.resolution == UNSTABLE_RESOLUTION and (defect := find_defect(clip)):
            raise UnusableOutput(defect)
        yield clip
        del clip


async def _fetched(frames: ray.ObjectRef) -> np.ndarray:
    return await frames
