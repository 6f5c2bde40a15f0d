"""What is kept for how long, on a real store and real files: expiry, settling, orphans, and bounded memory."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve_app.errors import JobNotFound, StorageError, StorageUnavailable
from serve_app.jobs import retention
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import Job, JobStatus, Progress, Stage, new_job_id
from serve_app.jobs.replica import ReplicaReport
from serve_app.jobs.retention import IDENTITY, Sweeper, Swept
from serve_app.jobs.store import JobStore, Lease, Once
from serve_app.scheduling.claim import ANY_DEADLINE
from serve_app.settings import Settings
from serve_app.storage import ArtifactStore
from serve_app.storage.local import LocalStore
from serve_app.storage.supabase import SupabaseStore
from tests.factories import make_job
from tests.supabase_server import SupabaseServer

SOON = 0.01
"""A retention or grace that is over at once; tests sleep past it."""


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "artifacts")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[SupabaseStore]:
    monkeypatch.setattr("serve_app.storage.supabase.BACKOFF", lambda state: 0.0)
    with SupabaseServer() as server:
        yield SupabaseStore(
            Settings(
                storage="supabase",
                supabase_url=server.url,
                supabase_key=server.key,
                storage_timeout_s=5,
                storage_attempts=2,
            )
        )


@pytest.fixture(params=["local", "bucket"])
def artifacts(request: pytest.FixtureRequest) -> ArtifactStore:
    store: ArtifactStore = request.getfixturevalue(request.param)
    return store


@dataclass
class Key:
    key: str


class CheckpointFolder:
    """Checkpoints as names."""

    def __init__(self, *keys: str) -> None:
        self.keys = list(keys)

    def list(self) -> list[Key]:
        return [Key(key) for key in self.keys]

    def delete(self, prefix: str) -> None:
        self.keys = [key for key in self.keys if not key.startswith(f"{prefix}/")]


def sweeper(
    store: JobStore, artifacts: ArtifactStore, checkpoints: CheckpointFolder | None = None, **settings: float | None
) -> Sweeper:
    return Sweeper(store, artifacts, Settings(**settings), checkpoints)


def put(artifacts: ArtifactStore, key: str) -> None:
    artifacts.put(key, Path(__file__), "image/png")


async def finish(
    store: JobStore, artifacts: ArtifactStore, status: JobStatus = JobStatus.SUCCEEDED, *, tokens: int = 1
) -> Job:
    """A job that was claimed `tokens` times, left a file each time, and ended."""
    job = make_job()
    await store.submit(job, max_queued=100)
    for attempt in range(tokens):
        claimed = await store.claim(horizons=ANY_DEADLINE, lease_s=60)
        assert claimed is not None
        lease = Lease(claimed.id, claimed.fencing_token)
        put(artifacts, f"{lease.job_id}/{lease.token}/image.png")
        if attempt < tokens - 1:
            await store.requeue(lease, "drained")
    await store.write(lease, "stage", {"stage": "generating"}, stage=Stage.GENERATING)
    for step in range(3):
        await store.write(lease, "progress", {"step": step}, progress=Progress(step=step, steps=3))
    await store.finish(lease, status)
    return await store.get(job.id)


def old_id() -> str:
    """A job id that was drawn two hours ago."""
    return f"{int((time.time() - 7200) * 1000):012x}{new_job_id()[12:]}"


async def names(store: JobStore, job_id: str) -> list[str]:
    return [event.name async for event in store.follow(job_id)]


# ---- expiry ---------------------------------------------------------------------------------------------------------


async def test_a_finished_job_expires_with_all_that_it_had(store: JobStore, artifacts: ArtifactStore) -> None:
    done = [await finish(store, artifacts, status) for status in (JobStatus.SUCCEEDED, JobStatus.FAILED)]
    cancelled = make_job()
    await store.submit(cancelled, max_queued=10)
    await store.cancel(cancelled.id)
    waiting = make_job()
    await store.submit(waiting, max_queued=10)
    checkpoints = CheckpointFolder(f"{done[0].id}/clip-0", f"{waiting.id}/clip-0")
    await asyncio.sleep(0.05)
    assert (await sweeper(store, artifacts, retention_s=100).sweep()).expired == 0
    assert artifacts.list(done[0].id) == [str(done[0].fencing_token)]

    store_again = sweeper(store, artifacts, checkpoints, retention_s=SOON)
    store_again._name = "the next holder"
    assert await store_again.sweep() == Swept()  # the first one holds the lock
    await store._redis.unlink(store._key("lock", "sweep"))
    assert (await store_again.sweep()).expired == 3
    for job in (*done, cancelled):
        with pytest.raises(JobNotFound):
            await store.get(job.id)
    assert await store.get(waiting.id) == waiting
    assert [job.id for job in await store.page(owner="anonymous")] == [waiting.id]
    assert list(artifacts.list()) == [IDENTITY]
    assert checkpoints.keys == [f"{waiting.id}/clip-0"]
    await store.cancel(waiting.id)
    await store.delete(waiting.id)
    left = {key async for key in store._redis.scan_iter(f"{store._prefix}:*")}
    assert left == {store._key(name).encode() for name in ("fencing_token", "identity", "lock:sweep")}


async def test_with_no_retention_jobs_stay_but_not_too_many(store: JobStore, local: LocalStore) -> None:
    jobs = [await finish(store, local) for _ in range(5)]
    await asyncio.sleep(0.02)
    assert (await sweeper(store, local, retention_s=None).sweep()).expired == 0
    await store._redis.unlink(store._key("lock", "sweep"))
    assert (await sweeper(store, local, retention_s=None, max_finished_jobs=2).sweep()).expired == 3
    assert [job.id for job in await store.page(owner="anonymous")] == [jobs[4].id, jobs[3].id]
    assert set(local.list()) == {jobs[3].id, jobs[4].id, IDENTITY}


class Stuck(LocalStore):
    """A folder in which some jobs' files cannot be removed."""

    stuck: tuple[str, ...] = ()
    kind: type[StorageError] = StorageError

    def delete(self, prefix: str) -> None:
        if prefix in self.stuck:
            raise self.kind(f"removing {prefix}: permission denied")
        super().delete(prefix)


async def test_a_job_whose_files_stay_keeps_its_record_and_holds_up_no_other(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    artifacts = Stuck(tmp_path)
    jobs = [await finish(store, artifacts) for _ in range(7)]
    artifacts.stuck = (jobs[0].id, jobs[1].id, jobs[3].id)
    await asyncio.sleep(0.05)
    sweeping = sweeper(store, artifacts, retention_s=SOON)
    assert (await sweeping.sweep()).expired == 4
    assert {job.id for job in await store.page(owner="anonymous")} == set(artifacts.stuck)
    artifacts.stuck = ()
    assert (await sweeping.sweep()).expired == 3


async def test_a_storage_that_is_away_costs_no_record(store: JobStore, tmp_path: Path) -> None:
    artifacts = Stuck(tmp_path)
    artifacts.kind = StorageUnavailable
    job = await finish(store, artifacts)
    artifacts.stuck = (job.id,)
    await asyncio.sleep(0.05)
    sweeping = sweeper(store, artifacts, retention_s=SOON)
    with pytest.raises(StorageUnavailable):
        await sweeping.sweep()
    assert await store.get(job.id) == job
    artifacts.stuck = ()
    assert (await sweeping.sweep()).expired == 1


async def test_sweepers_take_turns_and_a_silent_one_loses_its_own(store: JobStore) -> None:
    assert await store.hold("sweep", "a", for_s=30)
    assert await store.hold("sweep", "a", for_s=0.1)
    assert not await store.hold("sweep", "b", for_s=30)
    assert await store.hold("other", "b", for_s=30)
    await asyncio.sleep(0.2)
    assert await store.hold("sweep", "b", for_s=30)
    assert not await store.hold("sweep", "a", for_s=30)


# ---- settling -------------------------------------------------------------------------------------------------------


async def test_after_the_grace_the_story_stays_and_the_steps_go(store: JobStore, local: LocalStore) -> None:
    job = await finish(store, local)
    whole = [event async for event in store.follow(job.id)]
    assert (await sweeper(store, local, orphan_grace_s=100).sweep()).settled == 0
    assert len(await names(store, job.id)) == 7
    await store._redis.unlink(store._key("lock", "sweep"))
    await asyncio.sleep(0.05)
    sweeping = sweeper(store, local, orphan_grace_s=SOON)
    assert (await sweeping.sweep()).settled == 1
    story = [event async for event in store.follow(job.id)]
    assert [event.name for event in story] == ["queued", "running", "stage", "succeeded"]
    assert [event for event in whole if event.name != "progress"] == story
    assert [event async for event in store.follow(job.id, whole[4].id)] == [whole[-1]]
    assert [event async for event in store.follow(job.id, whole[-1].id)] == []
    assert await store.get(job.id) == job
    assert (await sweeping.sweep()).settled == 0


async def test_files_of_attempts_that_do_not_count_go(store: JobStore, artifacts: ArtifactStore) -> None:
    succeeded = await finish(store, artifacts, tokens=3)
    failed = await finish(store, artifacts, JobStatus.FAILED, tokens=2)
    once = await finish(store, artifacts)
    await store.submit(running := make_job(), max_queued=10)
    claimed = await store.claim(horizons=ANY_DEADLINE, lease_s=60)
    assert claimed is not None
    put(artifacts, f"{running.id}/{claimed.fencing_token}/image.png")
    assert len(artifacts.list(succeeded.id)) == 3
    await asyncio.sleep(0.05)
    assert (await sweeper(store, artifacts, orphan_grace_s=SOON).sweep()).settled == 3
    assert artifacts.list(succeeded.id) == [str(succeeded.fencing_token)]
    assert artifacts.list(failed.id) == []
    assert artifacts.list(once.id) == [str(once.fencing_token)]
    assert artifacts.list(running.id) == [str(claimed.fencing_token)]


# ---- orphans --------------------------------------------------------------------------------------------------------


async def test_folders_that_no_job_owns_go_once_they_are_old(store: JobStore, artifacts: ArtifactStore) -> None:
    job = await finish(store, artifacts)
    orphan, young = old_id(), new_job_id()
    for key in (f"{orphan}/3/video.mp4", f"{orphan}/4/video.mp4", f"{young}/1/a.png", "somebodys/notes.txt"):
        put(artifacts, key)
    assert (await sweeper(store, artifacts).sweep()).orphans == 1
    assert set(artifacts.list()) == {job.id, young, "somebodys", IDENTITY}
    assert artifacts.list("somebodys") == ["notes.txt"]


async def test_a_sweep_looks_at_a_page_and_the_next_goes_on(
    store: JobStore, local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "PAGE", 4)
    kept = [old_id() for _ in range(6)]
    for number, job_id in enumerate(kept):
        await store.submit(make_job(id=job_id), max_queued=10)
        put(local, f"{job_id}/1/a.png")
        for _ in range(number % 3):
            put(local, f"{old_id()}/1/a.png")
    sweeping = sweeper(store, local)
    found = [(await sweeping.sweep()).orphans for _ in range(5)]
    assert sum(found) == 6
    assert max(found) <= 4
    assert set(local.list()) == {*kept, IDENTITY}
    put(local, f"{old_id()}/1/a.png")
    assert sum([(await sweeping.sweep()).orphans for _ in range(4)]) == 1  # it begins again at the top


async def test_another_stores_files_are_never_orphans(
    store: JobStore, valkey: EmbeddedStore, artifacts: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    await sweeper(store, artifacts).sweep()
    old = old_id()
    await store.submit(make_job(id=old), max_queued=10)
    put(artifacts, f"{old}/1/video.mp4")
    other = JobStore(valkey.url, prefix=new_job_id())  # another service, or this one after its store was emptied
    checkpoints = CheckpointFolder(f"{old}/clip-0")
    assert await sweeper(other, artifacts, checkpoints).sweep() == Swept()
    assert "are not removed" in caplog.text
    assert artifacts.list(old) == ["1"]
    assert checkpoints.keys == [f"{old}/clip-0"]
    await other.close()


async def test_checkpoints_of_finished_and_unknown_jobs_go(store: JobStore, local: LocalStore) -> None:
    ids = {name: old_id() for name in ("queued", "cancelled", "unknown")}
    for name in ("queued", "cancelled"):
        await store.submit(make_job(id=ids[name]), max_queued=10)
    await store.cancel(ids["cancelled"])
    young = new_job_id()
    checkpoints = CheckpointFolder(*(f"{id}/clip-{n}" for id in (*ids.values(), young) for n in (0, 1)), "other/thing")
    assert (await sweeper(store, local, checkpoints).sweep()).checkpoints == 2
    assert checkpoints.keys == [f"{id}/clip-{n}" for id in (ids["queued"], young) for n in (0, 1)] + ["other/thing"]


# ---- memory ---------------------------------------------------------------------------------------------------------

JOBS = 3000
WORKERS = 24


async def memory(store: JobStore) -> int:
    await store._redis.memory_purge()
    return int((await store._redis.info("memory"))["used_memory"])


async def a_life(store: JobStore, number: int) -> None:
    once = Once(f"me:{number}", "f", 1)
    await store.submit(make_job(), max_queued=JOBS, once=once)
    job = await store.claim(horizons=ANY_DEADLINE, lease_s=60)
    assert job is not None
    lease = Lease(job.id, job.fencing_token)
    for step in range(3):
        await store.write(lease, "progress", {"step": step}, progress=Progress(step=step, steps=3))
    report = ReplicaReport(
        id=f"replica {number}", node="n", device="cpu", model="wan-1.3b", source="tiny", trained=False
    )
    await store._call("report_replica", report.id, 0.5, report.model_dump_json())
    await store.finish(lease, JobStatus.SUCCEEDED, receipt={"seed": number})


async def test_memory_comes_back_to_where_it_was(short_dir: Path, local: LocalStore) -> None:
    """Thousands of jobs with keys, events and replicas, swept all the while: keys and bytes end where they began."""
    server = EmbeddedStore(short_dir / "memory")
    store = JobStore(server.url)
    sweeping = sweeper(store, local, retention_s=0.5, orphan_grace_s=0.2)
    try:
        await asyncio.gather(*(a_life(store, -n) for n in range(1, WORKERS + 1)))  # connections and buffers are warm
        await asyncio.sleep(1.1)
        await sweeping.sweep()
        await store.replicas()
        keys, used = await store._redis.dbsize(), await memory(store)
        numbers = iter(range(JOBS))

        async def work() -> None:
            for number in numbers:
                await a_life(store, number)

        highest, workers = 0, asyncio.gather(*(work() for _ in range(WORKERS)))
        while not workers.done():
            await sweeping.sweep()
            highest = max(highest, await store._redis.dbsize())
            await asyncio.sleep(0.1)
        await workers
        assert keys < highest < 2.5 * JOBS  # swept while it ran: without, 3 keys a job
        await asyncio.sleep(1.1)
        await sweeping.sweep()
        await store.replicas()
        for _ in range(100):  # keys with an expiry go within moments
            if (left := await store._redis.dbsize()) <= keys:
                break
            await asyncio.sleep(0.1)
        assert left <= keys
        assert await store._redis.zcard(store._key("replicas")) == 0
        assert await memory(store) < used + 500_000
    finally:
        await store.close()
        server.stop()
