"""The whole service: a real Ray cluster, Serve, Valkey, FFmpeg and HTTP."""

import base64
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import httpx
import pytest
from httpx_sse import connect_sse
from PIL import Image

from serve_app.client import Client
from serve_app.errors import JobFinished
from serve_app.jobs.job import JobStatus
from serve_app.media.verify import read_provenance
from tests.cluster.running_service import ROOT, RunningService, write_config
from tests.media_content import shown_sha256

SMALL = {"sample_steps": 2, "video_length": 5}


def test_a_picture_from_prompt_to_file(client: Client, tmp_path: Path) -> None:
    job = client.submit("a red apple on a wooden table", "image_fast", seed=3)
    names = [event.name for event in client.events(job.id)]
    assert names[:3] == ["queued", "running", "stage"]
    assert names[-1] == "succeeded"
    assert "progress" in names
    path, receipt = client.fetch(job.id, tmp_path)
    with Image.open(path) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (640, 480), "RGB")
    done = client.get(job.id)
    assert done.status == JobStatus.SUCCEEDED
    assert done.receipt is not None
    assert done.receipt["trained"] is False
    assert json.loads(receipt.read_text()) == done.receipt
    assert read_provenance(path, receipt=receipt).job_id == job.id
    assert done.notice is not None
    assert done.gpu_s > 0


def test_a_video_of_the_presets_true_size(client: Client, tmp_path: Path) -> None:
    job = client.wait(client.submit("a sailing boat crosses a calm bay", "video_fast").id)
    assert job.status == JobStatus.SUCCEEDED, job.error
    video, poster, _ = client.fetch(job.id, tmp_path)
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        context = stream.codec_context
        assert (frames, stream.average_rate, context.name) == (41, 16, "h264")
        assert (context.width, context.height, context.pix_fmt) == (640, 480, "yuv420p")
    assert Image.open(poster).size == (640, 480)
    assert job.artifacts[0].duration_s == pytest.approx(41 / 16)


def test_previews_come_to_a_stream_that_asks_for_them(client: Client, service: RunningService) -> None:
    job = client.submit("a hill in the mist", "video_high", sample_steps=60)
    url = f"{service.url}/v1/jobs/{job.id}/events?preview=true"
    with httpx.Client(timeout=120) as http, connect_sse(http, "GET", url) as source:
        jpeg = next(json.loads(event.data)["jpeg_base64"] for event in source.iter_sse() if event.event == "preview")
    client.cancel(job.id)
    with Image.open(io.BytesIO(base64.b64decode(jpeg))) as picture:
        assert picture.format == "JPEG"


def test_same_seed_same_picture(client: Client, tmp_path: Path) -> None:
    def make(seed: int) -> str:
        job = client.wait(client.submit("a blue cup", "image_fast", sample_steps=2, seed=seed).id)
        return shown_sha256(client.fetch(job.id, tmp_path)[0].read_bytes())

    assert make(5) == make(5) != make(6)


def test_cancel_frees_the_replica(client: Client, service: RunningService) -> None:
    job = client.submit("a slow river", "video_high", sample_steps=100)
    for event in client.events(job.id):
        if event.name == "progress":
            break
    client.cancel(job.id)
    assert client.wait(job.id).status == JobStatus.CANCELLED
    with pytest.raises(JobFinished):
        client.cancel(job.id)
    # The replica is free: a picture gets through at once, far sooner than the hundred steps would have taken.
    assert client.wait(client.submit("a stone", "image_fast", sample_steps=1).id).status == JobStatus.SUCCEEDED


def test_delete_removes_the_files(client: Client, service: RunningService) -> None:
    job = client.wait(client.submit("a green leaf", "image_fast", sample_steps=1).id)
    folder = service.config.parent / "data" / "artifacts" / job.id
    assert list(folder.rglob("image.png"))
    client.delete(job.id)
    assert not folder.exists()
    assert httpx.get(f"{service.url}/v1/jobs/{job.id}").status_code == 404


def test_a_killed_generator_replica_costs_an_attempt_not_the_job(client: Client, service: RunningService) -> None:
    job = client.submit("a lighthouse", "video_high", sample_steps=12, video_length=81)
    for event in client.events(job.id):
        if event.name == "progress":
            break
    service.replica("Generator").kill()
    done = client.wait(job.id)
    assert done.status == JobStatus.SUCCEEDED, done.error
    assert done.receipt is not None
    assert done.receipt["attempts"] == 2


def test_a_kill_of_everything_loses_no_job() -> None:
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        service = RunningService(write_config(Path(folder)))
        with Client(service.url) as client:
            ids = [client.submit("a paper boat", "video_fast", **SMALL).id for _ in range(5)]
            while client.get(ids[0]).status == JobStatus.QUEUED:
                time.sleep(0.05)
        service.kill()
        service.start()
        with Client(service.url) as client:
            ends = [client.wait(job_id) for job_id in ids]
        assert [job.status for job in ends] == [JobStatus.SUCCEEDED] * 5, [job.error for job in ends]
        assert service.stop() == []
        assert "graceful_shutdown" not in service.log.read_text(), "a stop is no failure to tell of"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"look_ahead_s": -1}, "look_ahead_s"),
        ({"modle": "x"}, "unknown setting 'modle'"),
        ({"store_url": "http://x"}, "store_url is 'http://x'"),
        ({"storage": "supabase"}, "supabase_url and supabase_key"),
        ({"http": {"host": "0.0.0.0"}}, "api_keys"),
        ({"http": {"prot": 80}}, "unknown key 'prot'"),
    ],
)
def test_a_wrong_setting_stops_the_start_and_is_named(changes: dict, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve_app.cli", "up", "--config", str(write_config(tmp_path, **changes))]
    ended = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert said in ended.stdout.replace("\n", " ")
    assert "Traceback" not in ended.stdout + ended.stderr
