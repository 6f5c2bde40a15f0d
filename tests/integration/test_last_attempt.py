"""The lock of clips whose attempts failed, on a real store: what may kill a replica is kept from who has one attempt left."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from deployments.drive import ClipDrive
from deployments.last_attempt import LastAttempt
from serve_app.jobs.job import Job
from serve_app.jobs.store import JobStore
from tests.factories import make_job


def failed(times: int) -> tuple[Job, ClipDrive]:
    job = make_job(setbacks={0: times} if times else {})
    return job, ClipDrive(0, job.spec.clips[0])


@pytest.fixture
def last_attempt(store: JobStore) -> LastAttempt:
    return LastAttempt(store, max_attempts=3, lease_s=30)


async def runs(lock: LastAttempt, job: Job, clip: ClipDrive) -> bool:
    """Whether the clip may run now; it holds on to nothing afterwards."""
    try:
        async with asyncio.timeout(0.3), lock.guarded(job, clip):
            return True
    except TimeoutError:
        return False


@pytest.mark.parametrize(
    ("held", "asks", "together"),
    [(0, 2, True), (2, 0, True), (1, 1, True), (1, 2, False), (2, 1, False), (2, 2, False)],
)
async def test_who_runs_beside_whom(last_attempt: LastAttempt, held: int, asks: int, together: bool) -> None:
    async with last_attempt.guarded(*failed(held)):
        assert await runs(last_attempt, *failed(asks)) == together
    assert await runs(last_attempt, *failed(asks)), "the lock is free again"


async def test_a_clip_that_came_further_lets_the_others_run(last_attempt: LastAttempt) -> None:
    job, clip = failed(2)
    async with AsyncExitStack() as running:
        await running.enter_async_context(last_attempt.guarded(job, clip))
        assert not await runs(last_attempt, *failed(1))
        await last_attempt.let_go(job.id, clip)
        assert await runs(last_attempt, *failed(1))


async def test_only_one_attempt_needs_no_lock(store: JobStore) -> None:
    lock = LastAttempt(store, max_attempts=1, lease_s=30)
    async with lock.guarded(*failed(0)):
        assert await runs(lock, *failed(0))
