"""A clip on its last attempt runs apart from all that may kill its replica: what a poison job takes down gets through."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.drive import ClipDrive
from deployments.patience import patiently
from serve_app.jobs.job import Job
from serve_app.jobs.store import JobStore

LOCK = "last-attempt"


class LastAttempt:
    """The lock of clips whose attempts failed, in the store, kept for `lease_s` and renewed.

    Any of them may be the cause of its failures. They share the lock, until one is on the last of `max_attempts`
    attempts: that one has it alone, anywhere in the cluster, until it has come further.
    """

    def __init__(self, store: JobStore, *, max_attempts: int, lease_s: float) -> None:
        self._store = store
        self._max_attempts = max_attempts
        self._lease_s = lease_s

    @asynccontextmanager
    async def guarded(self, job: Job, clip: ClipDrive) -> AsyncIterator[None]:
        """Run the block when the clip may run: at once where no attempt at it has failed since it last came further."""
        try:
            if setbacks := job.setbacks.get(clip.index, 0):
                clip.lock = "shared" if setbacks < self._max_attempts - 1 else "alone"
                while not await patiently(self._hold)(job.id, clip):  # noqa: ASYNC110 - another process may hold it
                    await asyncio.sleep(1.0)
            yield
        finally:
            await self.let_go(job.id, clip)

    async def let_go(self, job_id: str, clip: ClipDrive) -> None:
        """Release the lock, if the clip has it: it has come further, or its attempt is over."""
        if clip.lock is not None:
            clip.lock = None
            await patiently(self._store.release)(LOCK, _holder(job_id, clip))

    async def renew(self, job_id: str, clip: ClipDrive) -> None:
        """Hold on to the lock, if the clip has it. Raises StoreUnavailable."""
        if clip.lock is not None:
            await self._hold(job_id, clip)

    async def _hold(self, job_id: str, clip: ClipDrive) -> bool:
        return await self._store.hold(LOCK, _holder(job_id, clip), for_s=self._lease_s, shared=clip.lock == "shared")


def _holder(job_id: str, clip: ClipDrive) -> str:
    return f"{job_id}/{clip.index}"
