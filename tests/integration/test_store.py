"""The JobStore against a real Valkey server."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serve_app.errors import ErrorInfo, JobFinished, JobNotFinished, JobNotFound, LeaseLost, QueueFull, StoreUnavailable
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import Job, JobEvent, JobStatus, Progress, Stage
from serve_app.jobs.presets import DEFAULT_MODEL_NAME, JobType
from serve_app.jobs.replica import ClipReport, ReplicaReport
from serve_app.jobs.store import LIBRARY, VERSION, JobStore, Lease
from serve_app.scheduling.claim import ANY_DEADLINE, Horizons
from serve_app.settings import embedded_url
from tests.factories import make_job, make_spec

INF = float("inf")


async def submit(store: JobStore, job: Job) -> Job:
    await store.submit(job, max_queued=1000)
    return job


async def claim(store: JobStore, horizon: float = INF, lease_s: float = 30.0, model: str = DEFAULT_MODEL_NAME) -> Job:
    job = await store.claim(model=model, horizons=Horizons(horizon, INF), lease_s=lease_s)
    assert job is not None
    return job


def lease_of(job: Job) -> Lease:
    return Lease(job.id, job.fencing_token)


async def event_names(store: JobStore, job_id: str) -> list[str]:
    return [event.name async for event in store.follow(job_id)]


async def test_a_submitted_job_reads_back_equal(store: JobStore) -> None:
    job = await submit(store, make_job(spec=make_spec(prompt="ein roter Kreis, 红色的圆 \u2028", seed=2**63 - 1)))
    assert await store.get(job.id) == job


async def test_unknown_job(store: JobStore) -> None:
    with pytest.raises(JobNotFound, match="'nothing'"):
        await store.get("nothing")


async def test_claims_come_by_deadline_and_within_the_horizon(store: JobStore) -> None:
    late = await submit(store, make_job(deadline_in_s=300))
    soon = await submit(store, make_job(deadline_in_s=10))
    assert await store.claim(horizons=Horizons(time.time() + 5, INF), lease_s=9) is None
    assert (await claim(store, horizon=time.time() + 100)).id == soon.id
    assert await store.claim(horizons=Horizons(time.time() + 100, INF), lease_s=9) is None
    claimed = await claim(store)
    assert (claimed.id, claimed.status, claimed.attempts) == (late.id, JobStatus.RUNNING, 1)
    assert claimed.started_at is not None
    assert await store.claim(horizons=ANY_DEADLINE, lease_s=9) is None


async def test_a_job_that_cannot_be_on_time_yields(store: JobStore) -> None:
    late = await submit(store, make_job(deadline_in_s=1, estimated_gpu_s=2))
    later = await submit(store, make_job(deadline_in_s=0.5, estimated_gpu_s=2))
    fine = await submit(store, make_job(deadline_in_s=60, estimated_gpu_s=2))
    assert (await claim(store)).id == fine.id
    assert await store.queue_length() == 2
    assert await store.claim(horizons=Horizons(INF, -INF), lease_s=9) is None
    assert [(await claim(store)).id, (await claim(store)).id] == [later.id, late.id]
    assert await store.queue_length() == 0


async def test_each_model_has_queues_of_its_own(store: JobStore) -> None:
    small, large = [
        await submit(store, make_job(spec=make_spec(model=model), deadline_in_s=30)) for model in ("small", "large")
    ]
    late = await submit(store, make_job(spec=make_spec(model="large"), deadline_in_s=1, estimated_gpu_s=9))
    assert await store.queue_lengths() == {"small": 1, "large": 2}
    assert [(await claim(store, model="large")).id for _ in range(2)] == [large.id, late.id]
    assert await store.claim(model="large", horizons=ANY_DEADLINE, lease_s=9) is None
    assert {(job.id, job.model) for job in await store.running()} == {(large.id, "large"), (late.id, "large")}
    await store.requeue(lease_of(await store.get(late.id)), "try again")
    assert await store.queue_lengths() == {"small": 1, "large": 1}
    await store.cancel(small.id)
    assert await store.queue_lengths() == {"large": 1}


async def test_the_work_that_waits_is_told_by_deadline(store: JobStore) -> None:
    jobs = [await submit(store, make_job(deadline_in_s=seconds, estimated_gpu_s=5)) for seconds in (300, 30, 1, 60)]
    await store.claim(horizons=Horizons(time.time() + 40, -INF), lease_s=9)
    count, works = await store.queued(DEFAULT_MODEL_NAME, limit=2)
    assert count == 3
    assert [(work.id, work.deadline, work.estimated_gpu_s, work.stage) for work in works] == [
        (job.id, job.deadline, 5.0, None) for job in (jobs[2], jobs[3])
    ]
    assert await store.queued("another", limit=9) == (0, [])


async def test_two_conductors_never_claim_the_same_job(store: JobStore) -> None:
    jobs = {(await submit(store, make_job())).id for _ in range(40)}
    claimed = await asyncio.gather(*(store.claim(horizons=ANY_DEADLINE, lease_s=9) for _ in range(60)))
    got = [job for job in claimed if job]
    assert sorted(job.id for job in got) == sorted(jobs)
    assert len({job.fencing_token for job in got}) == 40


async def test_a_superseded_lease_writes_nothing(store: JobStore) -> None:
    await submit(store, make_job())
    first = await claim(store, lease_s=0.01)
    await asyncio.sleep(0.05)
    assert list(await store.reap()) == [first.id]
    second = await claim(store)
    assert (second.id, second.attempts, second.lost_conductors) == (first.id, 2, 1)
    assert second.fencing_token > first.fencing_token
    for attempt in (
        store.write(lease_of(first), stage=Stage.FINISHING),
        store.finish(lease_of(first), JobStatus.SUCCEEDED),
        store.requeue(lease_of(first), "late"),
    ):
        with pytest.raises(LeaseLost, match=str(first.fencing_token)):
            await attempt
    assert await store.get(first.id) == second
    assert await store.heartbeat([lease_of(first), lease_of(second)], lease_s=9) == ["lost", "ok"]


async def test_heartbeats_keep_a_lease(store: JobStore) -> None:
    await submit(store, make_job())
    job = await claim(store, lease_s=0.2)
    for _ in range(4):
        await asyncio.sleep(0.1)
        assert await store.heartbeat([lease_of(job)], lease_s=0.2) == ["ok"]
        assert list(await store.reap()) == []


async def test_life_of_a_job_as_events(store: JobStore) -> None:
    job = await submit(store, make_job())
    following = asyncio.create_task(event_names(store, job.id))
    lease = lease_of(await claim(store))
    await store.write(lease, "stage", {"stage": "generating"}, stage=Stage.GENERATING)
    await store.write(lease, "progress", {"step": 1}, progress=Progress(step=1, steps=25))
    await store.finish(lease, JobStatus.SUCCEEDED, gpu_s=1.5)
    expected = ["queued", "running", "stage", "progress", "succeeded"]
    assert await asyncio.wait_for(following, 5) == expected
    assert await event_names(store, job.id) == expected
    done = await store.get(job.id)
    assert (done.status, done.gpu_s, done.progress.step, done.stage) == (JobStatus.SUCCEEDED, 1.5, 1, None)
    assert done.finished_at is not None


async def test_following_resumes_after_an_id(store: JobStore) -> None:
    job = await submit(store, make_job())
    lease = lease_of(await claim(store))
    for step in range(1, 1200):
        await store.write(lease, "progress", {"step": step})
    seen = []
    async for event in store.follow(job.id):
        seen.append(event)
        if len(seen) == 700:
            break
    await store.finish(lease, JobStatus.FAILED, error=ErrorInfo(code="x", message="y"))
    seen += [event async for event in store.follow(job.id, seen[-1].id)]
    assert [event.data["step"] for event in seen if event.name == "progress"] == list(range(1, 1200))
    assert [event async for event in store.follow(job.id, seen[-1].id)] == []


async def test_previews_go_to_those_who_ask_and_are_made_only_then(store: JobStore) -> None:
    job = await submit(store, make_job())
    lease = lease_of(await claim(store))
    assert await store.watched([job.id, "other"]) == [False, False]
    following = asyncio.create_task(collect(store.follow(job.id, previews=True)))
    while not (await store.watched([job.id]))[0]:  # noqa: ASYNC110 (it is set by another process in life)
        await asyncio.sleep(0.01)
    await store.write(lease, "preview", {"step": 5, "jpeg_base64": "..."})
    await store.finish(lease, JobStatus.SUCCEEDED)
    assert [event.name for event in await following] == ["queued", "running", "preview", "succeeded"]
    assert await event_names(store, job.id) == ["queued", "running", "succeeded"]


async def collect(events: AsyncIterator[JobEvent]) -> list[JobEvent]:
    return [event async for event in events]


async def test_cancel_in_each_state(store: JobStore) -> None:
    queued = await submit(store, make_job())
    assert (await store.cancel(queued.id)).job.status == JobStatus.CANCELLED
    assert await store.claim(horizons=ANY_DEADLINE, lease_s=9) is None
    with pytest.raises(JobFinished, match="cancelled already"):
        await store.cancel(queued.id)
    await submit(store, make_job())
    running = await claim(store)
    assert (await store.cancel(running.id)).job.cancel_requested
    assert await store.heartbeat([lease_of(running)], lease_s=9) == ["cancel"]
    await store.finish(lease_of(running), JobStatus.CANCELLED)
    assert (await store.get(running.id)).status == JobStatus.CANCELLED
    with pytest.raises(JobNotFound):
        await store.cancel("nothing")


async def test_a_cancelled_job_whose_conductor_died_ends_cancelled(store: JobStore) -> None:
    await submit(store, make_job())
    job = await claim(store, lease_s=0.01)
    await store.cancel(job.id)
    await asyncio.sleep(0.05)
    await store.reap()
    assert (await store.get(job.id)).status == JobStatus.CANCELLED


async def test_requeue_keeps_the_place_and_counts_no_attempt(store: JobStore) -> None:
    first = await submit(store, make_job(deadline_in_s=10))
    await submit(store, make_job(deadline_in_s=20))
    await store.requeue(lease_of(await claim(store)), "drained")
    again = await claim(store)
    assert (again.id, again.attempts, again.lost_conductors) == (first.id, 1, 0)


async def test_lists_by_owner_status_and_type_in_pages(store: JobStore) -> None:
    mine = []
    for n in range(7):
        type = JobType.IMAGE_FAST if n % 2 else JobType.VIDEO_FAST
        mine.append(await submit(store, make_job("me", spec=make_spec(type))))
        await asyncio.sleep(0.002)  # ids sort by the millisecond
    await submit(store, make_job("you"))
    newest_first = [job.id for job in reversed(mine)]
    page = await store.page(owner="me", limit=3)
    assert [job.id for job in page] == newest_first[:3]
    page = await store.page(owner="me", limit=10, before=page[-1].id)
    assert [job.id for job in page] == newest_first[3:]
    await store.cancel(mine[1].id)
    fast = await store.page(owner="me", type=JobType.IMAGE_FAST, status=JobStatus.QUEUED)
    assert [job.id for job in fast] == [mine[5].id, mine[3].id]
    assert [job.id for job in await store.page(owner="me", status=JobStatus.CANCELLED)] == [mine[1].id]


async def test_delete_leaves_nothing(store: JobStore) -> None:
    before = set(await store._redis.keys(f"{store._prefix}*"))
    job = await submit(store, make_job())
    with pytest.raises(JobNotFinished):
        await store.delete(job.id)
    await store.cancel(job.id)
    await store.delete(job.id)
    assert set(await store._redis.keys(f"{store._prefix}*")) == before
    with pytest.raises(JobNotFound):
        await store.delete(job.id)


async def test_a_full_queue_refuses_and_keeps_nothing(store: JobStore) -> None:
    for _ in range(3):
        await store.submit(make_job(), max_queued=3)
    refused = make_job()
    with pytest.raises(QueueFull, match="3 jobs"):
        await store.submit(refused, max_queued=3)
    with pytest.raises(JobNotFound):
        await store.get(refused.id)


async def test_running_jobs_and_replicas(store: JobStore) -> None:
    await submit(store, make_job())
    job = await claim(store)
    await store.write(lease_of(job), stage=Stage.GENERATING)
    (running,) = await store.running()
    assert (running.id, running.deadline, running.stage) == (job.id, job.deadline, Stage.GENERATING)
    clip = ClipReport(clip_id=f"{job.id}/0", job_id=job.id, deadline=job.deadline, step=1, steps=25, remaining_s=3.0)
    report = ReplicaReport(id="a", node="n", device="cpu", model="wan-1.3b", source="tiny", trained=False, clips=[clip])
    await store.report_replica(report)
    assert await store.replicas() == [report]


async def test_an_unreachable_server_is_said_so_at_once(short_dir: Path) -> None:
    store = JobStore(f"unix://{short_dir}/none.sock")
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match="did not answer"):
        await store.ping()
    assert time.monotonic() - started < 2
    await store.close()


async def test_nothing_acknowledged_is_lost_to_a_kill(short_dir: Path) -> None:
    """SIGKILL the server right after a submit; a new one over the same folder knows the job; followers go on."""
    folder = short_dir / "killed"
    server = EmbeddedStore(folder)
    store = JobStore(server.url)
    job = await submit(store, make_job())
    following = asyncio.create_task(event_names(store, job.id))
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    with pytest.raises(StoreUnavailable):
        await store.get(job.id)
    server = EmbeddedStore(folder)
    try:
        assert await store.get(job.id) == job
        following.cancel()
        await store.cancel(job.id)
        assert await event_names(store, job.id) == ["queued", "cancelled"]
    finally:
        await store.close()
        server.stop()


def test_one_owner_a_folder(short_dir: Path) -> None:
    first = EmbeddedStore(short_dir / "one")
    with pytest.raises(RuntimeError, match="in use by another wan-serve"):
        EmbeddedStore(short_dir / "one", start_timeout_s=0.3)
    pid = first.pid
    first.stop()
    assert not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    EmbeddedStore(short_dir / "one").stop()


def test_a_path_too_long_for_a_socket_is_named() -> None:
    with pytest.raises(ValueError, match="shorter data_dir or set store_url"):
        embedded_url(Path("/" + "x" * 120))


async def test_two_versions_of_the_library_share_a_store(store: JobStore) -> None:
    older = LIBRARY.replace(VERSION, "older001")
    await store._redis.function_load(older, replace=True)
    first = await submit(store, make_job())
    assert await store._redis.fcall("wan_older001_claim", 1, store._prefix, DEFAULT_MODEL_NAME, "+inf", "+inf", 30)
    assert (await store.get(first.id)).status == JobStatus.RUNNING


async def test_a_released_lock_is_free_at_once_and_only_for_its_holder(store: JobStore) -> None:
    assert await store.hold("last-attempt", "a", for_s=30)
    await store.release("last-attempt", "b")
    assert not await store.hold("last-attempt", "b", for_s=30)
    await store.release("last-attempt", "a")
    assert await store.hold("last-attempt", "b", for_s=30)


async def test_who_wants_a_lock_alone_waits_for_its_sharers_and_keeps_further_ones_out(store: JobStore) -> None:
    assert await store.hold("last-attempt", "a", for_s=30, shared=True)
    assert await store.hold("last-attempt", "b", for_s=30, shared=True)
    assert not await store.hold("last-attempt", "alone", for_s=30)
    assert not await store.hold("last-attempt", "late", for_s=30, shared=True)
    assert await store.hold("last-attempt", "a", for_s=30, shared=True), "a sharer renews"
    await store.release("last-attempt", "a")
    assert not await store.hold("last-attempt", "alone", for_s=30)
    await store.release("last-attempt", "b")
    assert await store.hold("last-attempt", "alone", for_s=30)
    await store.release("last-attempt", "alone")
    assert await store.hold("last-attempt", "late", for_s=30, shared=True)


async def test_a_sharer_becomes_the_only_holder_and_a_silent_one_is_out(store: JobStore) -> None:
    assert await store.hold("last-attempt", "silent", for_s=0.1, shared=True)
    assert await store.hold("last-attempt", "a", for_s=30, shared=True)
    assert not await store.hold("last-attempt", "a", for_s=30)
    await asyncio.sleep(0.2)
    assert await store.hold("last-attempt", "a", for_s=30)
    assert not await store.hold("last-attempt", "silent", for_s=30, shared=True)
