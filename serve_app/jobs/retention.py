"""What is kept for how long: finished jobs expire, and what no job owns is removed.

A job's life after its end: for `orphan_grace_s` everything stays; then it is *settled* (its progress events go, and the
files of attempts that do not count); after `retention_s` it expires: files, checkpoints, then record and events, so that
a sweep that is cut short forgets nothing it has not removed.
"""

import asyncio
import logging
import secrets
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from serve_app.errors import JobNotFound, WanServeError
from serve_app.jobs.job import JOB_ID, JobStatus, drawn_at
from serve_app.jobs.store import EndedJob, JobStore
from serve_app.settings import Settings
from serve_app.storage import ArtifactStore

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0
HOLD_S = 180.0
"""A conductor that did not sweep for so long leaves it to another. Two at once would do double work, not harm."""
BATCH = 100
"""Jobs that are asked for at once."""
AT_ONCE = 8
"""Requests to the artifact store at one time: it serves users too."""
PAGE = 1000
"""Folders of the artifact store that one sweep looks at; the next goes on behind them."""
IDENTITY = "store-identity"
"""Folder of the artifact store that names the job store whose files these are."""

Item = TypeVar("Item")


class StoredCheckpoint(Protocol):
    """A checkpoint's name."""

    @property
    def key(self) -> str:
        """`{job_id}/...`"""


class Checkpoints(Protocol):
    """A store of checkpoints. Calls block."""

    def list(self) -> Sequence[StoredCheckpoint]:
        """All checkpoints."""

    def delete(self, prefix: str) -> None:
        """Remove those of a job, given its id."""


@dataclass
class Swept:
    """What a sweep removed."""

    expired: int = 0
    """Jobs, with all that they had."""
    settled: int = 0
    """Jobs whose progress events and superseded files are gone."""
    orphans: int = 0
    """Artifact folders of no job."""
    checkpoints: int = 0
    """Jobs, finished or unknown, that had checkpoints."""


class Sweeper:
    """Keeps the stores small. Each conductor has one; those whose `JobStore` is the same take turns by a lock."""

    def __init__(
        self, store: JobStore, artifacts: ArtifactStore, settings: Settings, checkpoints: Checkpoints | None = None
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._settings = settings
        self._checkpoints = checkpoints
        self._name = secrets.token_hex(8)
        self._looked_at = 0
        self._few = asyncio.Semaphore(AT_ONCE)

    async def turn(self) -> None:
        """A sweep, then a pause."""
        try:
            swept = await self.sweep()
            if swept != Swept():
                logger.info("%s", swept)
        finally:
            await asyncio.sleep(SWEEP_EVERY_S)

    async def sweep(self) -> Swept:
        """Remove all that has expired, in batches, and look at one page of the artifact store for orphans.

        Does nothing while another sweeper is at it. What cannot be removed is logged and tried again in the next sweep.
        Raises `StoreUnavailable`, `StorageUnavailable`.
        """
        swept = Swept()
        swept.expired = await self._expire()
        swept.settled = await self._settle()
        if await self._mine():
            owned = await self._artifacts_are_ours()
            swept.orphans = await self._remove_orphans() if owned else 0
            swept.checkpoints = await self._remove_checkpoints(unknown_too=owned)
        return swept

    async def _mine(self) -> bool:
        return await self._store.hold("sweep", self._name, for_s=HOLD_S)

    # ---- what jobs own ----------------------------------------------------------------------------------------------

    async def _expire(self) -> int:
        retention_s, most = self._settings.retention_s, self._settings.max_finished_jobs
        done = failed = 0
        while await self._mine():
            ids = await self._store.expired(retention_s=retention_s, most=most, skip=failed, limit=BATCH)
            if not ids:
                break
            failures = await self._each(self._remove, ids)
            done, failed = done + len(ids) - failures, failed + failures
        return done

    async def _remove(self, job_id: str) -> None:
        await asyncio.to_thread(self._artifacts.delete, job_id)
        if self._checkpoints:
            await asyncio.to_thread(self._checkpoints.delete, job_id)
        with suppress(JobNotFound):  # its owner was quicker
            await self._store.delete(job_id)

    async def _settle(self) -> int:
        done = failed = 0
        while await self._mine():
            jobs = await self._store.unsettled(age_s=self._settings.orphan_grace_s, skip=failed, limit=BATCH)
            if not jobs:
                break
            failures = await self._each(self._settle_one, jobs)
            done, failed = done + len(jobs) - failures, failed + failures
        return done

    async def _settle_one(self, job: EndedJob) -> None:
        succeeded = job.status == JobStatus.SUCCEEDED
        if job.superseded or (job.fencing_token and not succeeded):
            for token in await asyncio.to_thread(self._artifacts.list, job.id):
                if not (succeeded and token == str(job.fencing_token)):
                    await asyncio.to_thread(self._artifacts.delete, f"{job.id}/{token}")
        await self._store.settle(job.id)

    # ---- what no job owns -------------------------------------------------------------------------------------------

    async def _artifacts_are_ours(self) -> bool:
        """Whether a file there without a job is garbage. In a place that another job store uses (or used: this one was
        emptied or newly set up), it may be somebody's delivered video."""
        identity = await self._store.identity()
        named = await asyncio.to_thread(self._artifacts.list, IDENTITY)
        if not named:
            with tempfile.NamedTemporaryFile() as empty:
                # a bucket may be limited to the types that jobs deliver
                await asyncio.to_thread(self._artifacts.put, f"{IDENTITY}/{identity}", Path(empty.name), "image/png")
            named = await asyncio.to_thread(self._artifacts.list, IDENTITY)
        if list(named) == [identity]:
            return True
        logger.warning(
            "files without a job are not removed: the artifact store belongs to job store %s, this is %s. Give each "
            "service a place of its own, or, if the other job store is gone, remove what lies in %s/",
            " and ".join(named), identity, IDENTITY,
        )  # fmt: skip
        return False

    async def _remove_orphans(self) -> int:
        names = await asyncio.to_thread(self._artifacts.list, "", skip=self._looked_at, limit=PAGE)
        orphans = [id for id, status in (await self._known(names)).items() if status is None]
        removed = len(orphans) - await self._each(self._remove_folder, orphans)
        self._looked_at = self._looked_at + len(names) - removed if len(names) == PAGE else 0
        return removed

    async def _remove_folder(self, job_id: str) -> None:
        await asyncio.to_thread(self._artifacts.delete, job_id)

    async def _remove_checkpoints(self, *, unknown_too: bool) -> int:
        if self._checkpoints is None:
            return 0
        stored = await asyncio.to_thread(self._checkpoints.list)
        jobs = await self._known({checkpoint.key.split("/")[0] for checkpoint in stored})
        useless = [id for id, status in jobs.items() if (status.is_final if status else unknown_too)]
        for job_id in useless:
            await asyncio.to_thread(self._checkpoints.delete, job_id)
        return len(useless)

    async def _known(self, names: Sequence[str] | set[str]) -> dict[str, JobStatus | None]:
        """The status, or None, of each of `names` that is a job id and older than the grace; others are not ours to touch."""
        before = time.time() - self._settings.orphan_grace_s
        ids = [name for name in names if JOB_ID.fullmatch(name) and drawn_at(name) < before]
        return await self._store.statuses(ids)

    # ---- plumbing ---------------------------------------------------------------------------------------------------

    async def _each(self, remove: Callable[[Item], Coroutine[Any, Any, None]], items: Sequence[Item]) -> int:
        """Call `remove` on all, a few at a time; how many failed in a way that waiting does not help."""

        async def one(item: Item) -> None:
            async with self._few:
                await remove(item)

        results = await asyncio.gather(*(one(item) for item in items), return_exceptions=True)
        failures = [result for result in results if result is not None]
        for failure in failures:
            if not isinstance(failure, WanServeError) or failure.retryable:
                raise failure
            logger.error("not removed: %s %s", failure.message, failure.hint)
        return len(failures)
