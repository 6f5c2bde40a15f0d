"""One clip at a time may be on its last attempt: one that kills its replicas must not take down, for good, those beside it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deployments.drive import ClipDrive
from deployments.patience import patiently
from serve_app.jobs.job import Job
from serve_app.jobs.store import JobStore

LOCK = "last-attempt"


class LastAttempt:
    """The lock of clips on their last of `max_attempts` attempts, in the store, kept for `lease_s` and renewed."""

    def __init__(self, store: JobStore, *, max_attempts: int, lease_s: float) -> None:
        self._store = store
        self._max_attempts = max_attempts
        self._lease_s = lease_s

    @asynccontextmanager
    async def alone(self, job: Job, clip: ClipDrive) -> AsyncIterator[None]:
        """Until a clip on its last attempt has come further, or the block ends, no other such clip runs anywhere."""
        if 0 < job.setbacks.get(clip.index, 0) >= self._max_attempts - 1:
            while not await patiently(self._hold)(job.id, clip):  # noqa: ASYNC110 - another process may hold it
                await asyncio.sleep(1.0)
            clip.alone = True
        try:
            yield
        finally:
            await self.let_others(job.id, clip)

    async def let_others(self, job_id: str, clip: ClipDrive) -> None:
        """Release the lock, if the clip holds it."""
        if clip.alone:
            clip.alone = False
            await patiently(self._store.release)(LOCK, _holder(job_id, clip))

    async def renew(self, job_id: str, clip: ClipDrive) -> None:
        """Hold on to the lock, if the clip holds it. Raises StoreUnavailable."""
        if clip.alone:
            await self._hold(job_id, clip)

    async def _hold(self, job_id: str, clip: ClipDrive) -> bool:
        return await self._store.hold(LOCK, _holder(job_id, clip), for_s=self._lease_s)


def _holder(job_id: str, clip: ClipDrive) -> str:
    return f"{job_id}/{clip.index}"
