"""Real kills (SIGKILL) of each part of a running service, and faults of its storage: every job ends as it should."""

import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve_app.api.schemas import JobView
from serve_app.client import Client
from serve_app.jobs.job import JobEvent, JobStatus
from serve_app.jobs.receipt import RECEIPT_NAME
from tests.cluster.running_service import RunningService, write_config
from tests.media_content import shown_sha256
from tests.supabase_server import Answer, Cut, Hang, SupabaseServer


@pytest.fixture(scope="module")
def storage() -> Iterator[SupabaseServer]:
    with SupabaseServer() as server:
        yield server


@pytest.fixture(scope="module")
def service(storage: SupabaseServer) -> Iterator[RunningService]:
    """Its artifacts go to Supabase's stand-in; checkpoints are so frequent that each second has one."""
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        config = write_config(
            Path(folder),
            storage="supabase",
            supabase_url=storage.url,
            supabase_key=storage.key,
            storage_timeout_s=2.0,
            storage_attempts=2,
            checkpoint_every_s=1.0,
        )
        service = RunningService(config)
        yield service
        assert service.stop() == []


def submit(client: Client, steps: int = 20, frames: int = 41) -> str:
    """A video of some seconds."""
    return client.submit("a lighthouse at dusk", "video_fast", sample_steps=steps, video_length=frames, seed=1).id


def until(client: Client, job_id: str, name: str, **data: object) -> JobEvent:
    for event in client.events(job_id):
        if event.name == name and data.items() <= event.data.items():
            return event
    raise AssertionError(f"job {job_id} ended before {name}")


def succeeded(client: Client, job_id: str) -> JobView:
    job = client.wait(job_id)
    assert job.status == JobStatus.SUCCEEDED, (job.error, job.failures)
    return job


def shown(client: Client, job: JobView) -> list[str]:
    """What the job's pictures and videos show."""
    with tempfile.TemporaryDirectory() as folder:
        paths = client.fetch(job.id, Path(folder))
        return [shown_sha256(path.read_bytes()) for path in paths if path.name != RECEIPT_NAME]


def test_a_killed_replicas_clip_goes_on_from_its_checkpoint_to_the_same_bits(
    client: Client, service: RunningService
) -> None:
    quiet = succeeded(client, submit(client, steps=60))
    job_id = submit(client, steps=60)
    for event in client.events(job_id):
        if event.name == "progress" and event.data["step"] >= 40:
            break
    service.replica("Generator").kill()
    job = succeeded(client, job_id)
    assert [failure.code for failure in job.failures] == ["replica_lost"]
    assert job.receipt is not None
    assert job.receipt["resumed_from_steps"]
    assert shown(client, job) == shown(client, quiet)


def test_a_dead_conductor_loses_its_lease_not_its_jobs(client: Client, service: RunningService) -> None:
    job_id = submit(client)
    until(client, job_id, "progress")
    service.replica("Conductor").kill()
    succeeded(client, job_id)
    assert [event.name for event in client.events(job_id)].count("running") == 2


def test_a_dead_ingress_interrupts_no_stream_for_good(client: Client, service: RunningService) -> None:
    job_id = submit(client)
    events: list[JobEvent] = []
    following = threading.Thread(target=lambda: events.extend(client.events(job_id)))
    following.start()
    until(client, job_id, "progress")
    service.replica("Ingress").kill()
    following.join(120)
    assert not following.is_alive()
    assert events[-1].name == "succeeded"
    with Client(service.url) as fresh:
        assert events == list(fresh.events(job_id))


def test_a_dead_finisher_does_not_cost_the_frames(client: Client, service: RunningService) -> None:
    finisher = service.replica("Finisher")
    job_id = submit(client, steps=2, frames=81)
    until(client, job_id, "stage", stage="finishing")
    finisher.kill()
    job = succeeded(client, job_id)
    # None where the files were delivered before the kill, two where the router tried the dead replica once more.
    assert {(failure.stage, failure.code) for failure in job.failures} <= {("finishing", "replica_lost")}
    stages = [event.data["stage"] for event in client.events(job_id) if event.name == "stage"]
    assert stages.count("generating") == 1


def test_a_dead_store_degrades_and_recovers(client: Client, service: RunningService) -> None:
    job_id = submit(client)
    until(client, job_id, "progress")
    (valkey,) = (process for process in service.processes() if process.name() == "valkey-server")
    valkey.kill()
    answers = [httpx.get(f"{service.url}/v1/jobs/{job_id}").status_code for _ in range(5)]
    assert set(answers) <= {200, 503}
    while httpx.get(f"{service.url}/readyz").status_code != 200:
        time.sleep(0.1)
    succeeded(client, job_id)


@pytest.mark.parametrize("fault", [Answer(500), Answer(503), Hang(), Cut()], ids=["500", "503", "hang", "cut"])
def test_storage_faults_cost_tries_not_frames(
    client: Client, storage: SupabaseServer, fault: Answer | Hang | Cut
) -> None:
    storage.faults.extend([fault] * 4)  # two for each try; the sweep of old files may meet one too
    job_id = submit(client, steps=1, frames=1)
    job = succeeded(client, job_id)
    assert "storage_unavailable" in {failure.code for failure in job.failures}
    steps = [
        event.data["step"]
        for event in client.events(job_id)
        if event.name == "progress" and event.data["stage"] is None
    ]
    assert steps == [1], "denoised once; lost frames are decoded again from the final latents"


def test_a_refused_key_ends_the_job_with_what_to_do(client: Client, storage: SupabaseServer) -> None:
    right_key, storage.key = storage.key, "another key"
    try:
        job = client.wait(submit(client, steps=1, frames=1))
    finally:
        storage.key = right_key
    assert job.status == JobStatus.FAILED
    assert job.error is not None
    assert job.error.code == "storage_error"
    assert "supabase_key" in job.error.hint


def test_a_poison_job_is_stopped_after_three_attempts(client: Client, service: RunningService) -> None:
    """Its replica dies each time before anything was saved; a job beside it gets through, and the service goes on."""
    beside_id = submit(client, steps=60)
    until(client, beside_id, "progress")
    job_id = client.submit("a poisoned apple", "image_high", sample_steps=100).id
    killed = kill_each_replica_of(client, service, job_id)
    job = client.get(job_id)
    assert job.error is not None
    assert job.error.code == "attempts_exhausted"
    # A try that was sent to the dead replica before the router heard of its end never began, and does not count.
    assert {failure.code for failure in job.failures} == {"replica_lost"}
    assert job.failures[-1].attempt == 3
    assert len(killed) >= 3
    assert succeeded(client, beside_id).failures
    succeeded(client, submit(client, steps=1, frames=1))


def kill_each_replica_of(client: Client, service: RunningService, job_id: str) -> set[int]:
    """Each time that the job steps, kill the replica that does it, until the job ends. The processes that were killed."""
    killed: set[int] = set()
    stepping_again = True
    for event in client.events(job_id):
        if event.name == "retry":
            stepping_again = True
        elif stepping_again and event.name == "progress" and event.data["step"] > 0:
            replica = service.replica("Generator")
            replica.kill()
            killed.add(replica.pid)
            stepping_again = False
    return killed
