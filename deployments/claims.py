"""Which jobs a conductor takes: for each model the one with the earliest deadline that fits what its live replicas can chew."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence

import ray

from deployments.patience import patiently
from serve_app.engine.clip import ClipRequest
from serve_app.jobs.claimed import claimed_work
from serve_app.jobs.job import Job
from serve_app.jobs.replica import ReplicaReport
from serve_app.jobs.store import JobStore, JobWork
from serve_app.scheduling import placement
from serve_app.scheduling.claim import claim_horizons
from serve_app.settings import Settings


class Claims:
    """Claims jobs of these models under leases of `settings.lease_s`."""

    def __init__(self, store: JobStore, settings: Settings, models: Collection[str]) -> None:
        self._store = store
        self._settings = settings
        self._models = models
        self._cluster = ray.get_runtime_context().get_session_name()
        self._waiting = {model: placement.Waiting(settings.look_ahead_s) for model in models}

    async def take(self, may_drive_more: Callable[[], bool]) -> AsyncIterator[Job]:
        """A job of each model that has one which fits, as long as more may be driven. Raises StoreUnavailable."""
        replicas, running = await self._store.replicas(), await self._store.running()
        own = [replica for replica in replicas if replica.cluster == self._cluster]
        placement.HERE.hear(
            {replica.id: {clip.clip_id: clip.remaining_s for clip in replica.clips} for replica in own},
            time.monotonic(),
        )
        for model, waiting in self._waiting.items():
            there = [replica.id for replica in own if replica.model == model]
            waiting.let_go(placement.HERE.backlog_s(there), time.monotonic())
        # During an upgrade two clusters share a store: the one whose replicas are still to come leaves the jobs to the other.
        elsewhere = {replica.model for replica in replicas} - {replica.model for replica in own}
        for model in set(self._models) - elsewhere:
            if may_drive_more() and (job := await self._take_one(model, own, running)):
                yield job

    async def _take_one(self, model: str, own: Sequence[ReplicaReport], running: Sequence[JobWork]) -> Job | None:
        work = claimed_work(model, own, running)
        horizons = claim_horizons(work.replicas, work.unplaced, self._settings.look_ahead_s, time.time())
        return await self._store.claim(model=model, horizons=horizons, lease_s=self._settings.lease_s)

    async def room_for(self, clip: ClipRequest, model: str) -> None:
        """Wait until a replica of the model has little enough to do.

        For the clips of a long video: were all sent at once, those that are there would keep them from those that come.
        """
        may_go = asyncio.get_running_loop().create_future()

        def let_go() -> bool:
            wanted = not may_go.done()
            if wanted:
                may_go.set_result(None)
            return wanted

        self._waiting[model].add(clip.clip_id, clip.deadline, clip.estimated_gpu_s, let_go)
        await may_go

    async def replicas_to_come(self, model: str) -> None:
        """Wait for the first replica of a model that BacklogPolicy scales from zero.

        Serve starts a single one for a request that waits, and asks no policy until that is there (2.60, autoscaling_policy.py,
        _get_cold_start_scale_up_replicas). Without BacklogPolicy it is the request that starts it.
        """
        while not await self._has_replica(model) and await patiently(self._store.has_scaler)(model):  # noqa: ASYNC110
            await asyncio.sleep(0.5)

    async def _has_replica(self, model: str) -> bool:
        replicas = await patiently(self._store.replicas)()
        return any(replica.model == model and replica.cluster == self._cluster for replica in replicas)
