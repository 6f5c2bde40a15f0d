"""Several replicas and several models: a video's clips are made at once, where the least work waits, and joined to the exact
frame; a killed replica harms none; each job type runs on its model's replicas."""

import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import pytest
import yaml

from serve_app.api.schemas import JobView
from serve_app.client import Client
from serve_app.jobs.job import JobStatus
from serve_app.jobs.receipt import RECEIPT_NAME
from serve_app.jobs.replica import ReplicaReport
from serve_app.jobs.store import JobStore
from serve_app.settings import Settings
from tests.cluster.running_service import RunningService, write_config
from tests.media_content import shown_sha256

SHOTS = [{"prompt": "a slow river", "seconds": 1.5}] * 4
FRAMES = 4 * 24 - 3 * 8
LONG = {"type": "video_fast", "shots": SHOTS, "sample_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """Two generator replicas of one model, and one of another."""
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        models = {
            "models": {"wan-1.3b": {"source": "tiny"}, "other": {"source": "tiny"}},
            "job_types": {"image_high": {"model": "other"}},
        }
        path = write_config(Path(folder), checkpoint_every_s=0.3, **models)
        config = yaml.safe_load(path.read_text())
        deployments = config["applications"][0]["deployments"]
        [generator] = [one for one in deployments if one["name"] == "Generator"]
        deployments.append(generator | {"name": "Generator-other"})
        generator["num_replicas"] = 2
        path.write_text(yaml.safe_dump(config))
        service = RunningService(path)
        while len(reports(service)) < 3:
            time.sleep(0.1)
        yield service
        assert service.stop() == []


def reports(service: RunningService) -> Sequence[ReplicaReport]:
    """What the generator replicas say of themselves now."""

    async def ask() -> Sequence[ReplicaReport]:
        settings = Settings(data_dir=service.config.parent / "data")
        store = JobStore(settings.resolved_store_url, prefix=settings.store_prefix)
        try:
            return await store.replicas()
        finally:
            await store.close()

    return asyncio.run(ask())


def clips_by_replica(service: RunningService, job_id: str) -> dict[str, int]:
    """How many clips of the job each generator replica holds now."""
    return {report.id: sum(clip.job_id == job_id for clip in report.clips) for report in reports(service)}


def files(client: Client, job: JobView, folder: Path) -> dict[str, Path]:
    return {path.name: path for path in client.fetch(job.id, folder)}


def test_clips_run_on_several_replicas_and_become_one_exact_file(
    client: Client, service: RunningService, tmp_path: Path
) -> None:
    job = client.submit(formats=["mp4", "gif", "contact_sheet"], **LONG)
    assert (job.video_length, job.seconds, len(job.shots)) == (FRAMES, FRAMES / 16, 4)
    job = client.wait(job.id)
    assert job.status == JobStatus.SUCCEEDED, (job.error, job.failures)
    assert (job.progress.step, job.progress.steps) == (16, 16)
    found = files(client, job, tmp_path)
    assert set(found) == {"video.mp4", "preview.gif", "poster.jpg", "contact_sheet.jpg", RECEIPT_NAME}
    with av.open(str(found["video.mp4"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    assert job.receipt is not None
    made_by = Counter(clip["replica"] for clip in job.receipt["clips"])
    assert len(made_by) == 2, "both replicas of the model made clips"
    others = {report.id for report in reports(service) if report.model == "other"}
    assert not others & set(made_by)
    assert job.receipt["steps"] == 16


def test_a_killed_replica_costs_its_clips_a_moment(client: Client, service: RunningService, tmp_path: Path) -> None:
    quiet = client.wait(client.submit(**LONG).id)
    job_id = client.submit(**LONG).id
    for event in client.events(job_id):
        if event.name == "progress" and event.data["step"] >= 4:
            break
    service.replica("Generator").kill()
    job = client.wait(job_id)
    assert job.status == JobStatus.SUCCEEDED, (job.error, job.failures)
    assert {failure.code for failure in job.failures} == {"replica_lost"}
    for folder in ("quiet", "killed"):
        (tmp_path / folder).mkdir()
    one, other = (files(client, each, tmp_path / name) for each, name in ((quiet, "quiet"), (job, "killed")))
    assert shown_sha256(one["video.mp4"].read_bytes()) == shown_sha256(other["video.mp4"].read_bytes())


def test_a_cancel_ends_every_clip(client: Client, service: RunningService) -> None:
    job_id = client.submit(**LONG | {"sample_steps": 100}).id
    for event in client.events(job_id):
        if event.name == "progress":
            break
    client.cancel(job_id)
    assert client.wait(job_id).status == JobStatus.CANCELLED
    while any(clips_by_replica(service, job_id).values()):
        time.sleep(0.1)


def test_each_job_type_runs_on_the_replicas_of_its_model(client: Client, service: RunningService) -> None:
    jobs = {type: client.submit("a red circle", type, sample_steps=4) for type in ("image_fast", "image_high")}
    assert [job.model for job in jobs.values()] == ["wan-1.3b", "other"]
    models = {report.id: report.model for report in reports(service)}
    for job in jobs.values():
        ended = client.wait(job.id)
        assert ended.receipt is not None, (ended.error, ended.failures)
        assert models[ended.receipt["replica"]] == job.model
