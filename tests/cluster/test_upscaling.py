"""Upscaling in a running service: files of the larger size, and real kills (SIGKILL) and a cancel in the midst of it."""

import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from serve_app.api.schemas import JobView
from serve_app.client import Client
from serve_app.jobs.job import JobEvent, JobStatus
from serve_app.jobs.receipt import RECEIPT_NAME
from tests.cluster.running_service import RunningService, write_config
from tests.media_content import decode_rgb, psnr_db, shown_sha256
from tests.networks import save_enlarging

VIDEO = {"prompt": "a slow river", "type": "video_fast", "sample_steps": 2, "video_length": 21, "seed": 3}


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """Two upscaler replicas, with a network that doubles each pixel and takes some tenths of a second for it."""
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        network = save_enlarging(Path(folder) / "double.onnx", 2, convolutions=1)
        path = write_config(Path(folder), upscale_model=str(network), upscale_tile_px=512)
        config = yaml.safe_load(path.read_text())
        config["applications"][0]["deployments"].append({"name": "Upscaler", "num_replicas": 2})
        path.write_text(yaml.safe_dump(config))
        service = RunningService(path)
        yield service
        assert service.stop() == []


def until_upscaling(client: Client, job_id: str) -> JobEvent:
    """The first event that tells of upscaled frames."""
    for event in client.events(job_id):
        stage = event.data.get("stage")
        if event.name == "progress" and stage and stage["unit"] == "frames":
            assert 0 < stage["done"] < stage["total"]
            return event
    raise AssertionError(f"job {job_id} ended before it was upscaled")


def succeeded(client: Client, job_id: str) -> JobView:
    job = client.wait(job_id)
    assert job.status == JobStatus.SUCCEEDED, (job.error, job.failures)
    return job


def files(client: Client, job: JobView) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in client.fetch(job.id, Path(folder))}


@pytest.fixture(scope="module")
def quiet(service: RunningService) -> str:
    """What the upscaled video shows when nothing is killed."""
    with Client(service.url) as client:
        job = succeeded(client, client.submit(upscale=2, **VIDEO).id)
        return shown_sha256(files(client, job)["video.mp4"])


def test_files_are_larger_and_show_the_same(client: Client) -> None:
    plain = client.submit(**VIDEO | {"video_length": 9})
    larger = client.submit(upscale=2, formats=["mp4", "gif", "contact_sheet"], **VIDEO | {"video_length": 9})
    assert (plain.upscale, larger.upscale) == (None, 2)
    assert larger.deadline - larger.created_at > plain.deadline - plain.created_at
    plain, larger = succeeded(client, plain.id), succeeded(client, larger.id)
    sizes = {artifact.name: (artifact.width, artifact.height) for artifact in larger.artifacts}
    assert sizes == {
        "video.mp4": (1280, 960),
        "preview.gif": (320, 240),
        "poster.jpg": (1280, 960),
        "contact_sheet.jpg": (1292, 728),
        RECEIPT_NAME: (None, None),
    }
    shown, small = (brightness(files(client, job)["video.mp4"]) for job in (larger, plain))
    assert psnr_db(shown, small.repeat(2, 1).repeat(2, 2)) > 33
    assert larger.receipt is not None
    assert larger.receipt["upscale"]["model"] == "double.onnx"
    assert larger.receipt["upscale"]["factor"] == 2
    told = [event.data["stage"] for event in client.events(larger.id) if event.name == "progress"]
    frames, sent = ([one for one in told if one and one["unit"] == unit] for unit in ("frames", "bytes"))
    assert (frames[-1]["done"], frames[-1]["total"]) == (9, 9)
    assert sent[-1]["done"] == sent[-1]["total"] == sum(artifact.size_bytes for artifact in larger.artifacts)
    assert larger.progress.stage is None


def test_a_picture_is_upscaled_by_four(client: Client) -> None:
    job = succeeded(client, client.submit("a red apple", "image_fast", sample_steps=1, upscale=4).id)
    assert [(artifact.width, artifact.height) for artifact in job.artifacts] == [(2560, 1920), (None, None)]


def test_a_killed_upscaler_loses_nothing(client: Client, service: RunningService, quiet: str) -> None:
    job_id = client.submit(upscale=2, **VIDEO).id
    until_upscaling(client, job_id)
    service.replica("Upscaler").kill()
    job = succeeded(client, job_id)
    assert job.failures == [], "the blocks went again, unseen by the job"
    assert shown_sha256(files(client, job)["video.mp4"]) == quiet


def test_a_killed_finisher_loses_no_frames_and_leaves_no_ffmpeg(
    client: Client, service: RunningService, quiet: str
) -> None:
    job_id = client.submit(upscale=2, **VIDEO).id
    until_upscaling(client, job_id)
    finisher = service.replica("Finisher")
    assert encoding_for(finisher.pid)
    finisher.kill()
    give_up_at = time.monotonic() + 30
    while encoding_for(finisher.pid):
        assert time.monotonic() < give_up_at, "its FFmpeg runs on"
        time.sleep(0.1)
    job = succeeded(client, job_id)
    assert {(failure.stage, failure.code) for failure in job.failures} == {("finishing", "replica_lost")}
    stages = [event.data["stage"] for event in client.events(job_id) if event.name == "stage"]
    assert stages.count("generating") == 1
    assert shown_sha256(files(client, job)["video.mp4"]) == quiet


def test_a_killed_conductors_finisher_begins_again_and_does_not_go_on_twice(
    client: Client, service: RunningService, quiet: str
) -> None:
    job_id = client.submit(upscale=2, **VIDEO).id
    until_upscaling(client, job_id)
    finisher = service.replica("Finisher")
    service.replica("Conductor").kill()
    job = succeeded(client, job_id)
    assert [event.name for event in client.events(job_id)].count("running") == 2
    assert shown_sha256(files(client, job)["video.mp4"]) == quiet
    give_up_at = time.monotonic() + 30
    while encoding_for(finisher.pid):
        assert time.monotonic() < give_up_at, "the work for the dead conductor runs on"


def test_a_cancel_ends_upscaling(client: Client, service: RunningService) -> None:
    job_id = client.submit(upscale=2, **VIDEO | {"video_length": 81, "sample_steps": 1}).id
    until_upscaling(client, job_id)
    finisher, upscaler = service.replica("Finisher"), service.replica("Upscaler")
    client.cancel(job_id)
    assert client.wait(job_id).status == JobStatus.CANCELLED
    give_up_at = time.monotonic() + 30
    while encoding_for(finisher.pid) or is_working(upscaler):
        assert time.monotonic() < give_up_at, "something of it runs on"
    assert client.get(job_id).artifacts == []


def brightness(video: bytes) -> np.ndarray:
    """Its frames without colours, which 4:2:0 holds at half the size: the test model's noise loses them."""
    return (decode_rgb(io.BytesIO(video)) @ np.array([0.2126, 0.7152, 0.0722])).astype(np.uint8)


def encoding_for(pid: int) -> list[psutil.Process]:
    """The FFmpegs that write for the process of that id."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or [""]
        if "ffmpeg" in command[0] and any(f"wan-serve-{pid}-" in part for part in command):
            found.append(process)
    return found


def is_working(process: psutil.Process) -> bool:
    """Whether it uses a core by half or more."""
    return process.cpu_percent(interval=1.0) > 50
