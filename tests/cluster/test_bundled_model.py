"""The bundled model in the running service: prompts become pictures, after a crash too, and a spoilt size is made again."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from serve_app.api.schemas import JobView
from serve_app.client import Client
from serve_app.engine.load import WAN_SHAPES
from serve_app.jobs.job import JobStatus
from serve_app.jobs.presets import DEFAULT_MODEL_NAME
from tests.cluster.running_service import RunningService, write_config
from tests.pictures import one_thing_at_a_place
from training.evaluate import judge, load
from training.reader import Reader

NEVER_LIGHT = "never-light"


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """With the default model, and for image_high one of the same weights whose decoder makes everything black."""
    with tempfile.TemporaryDirectory(prefix="wan-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        black = model_whose_decoder_is_black(Path(folder) / NEVER_LIGHT)
        models = {DEFAULT_MODEL_NAME: {}, NEVER_LIGHT: {"source": str(black)}}
        job_types = {"image_high": {"model": NEVER_LIGHT}}
        service = RunningService(write_config(Path(folder), models=models, job_types=job_types, checkpoint_every_s=0.5))
        yield service
        assert service.stop() == []


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader()


def model_whose_decoder_is_black(folder: Path) -> Path:
    shutil.copytree(WAN_SHAPES, folder)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float16)
    vae.decoder.conv_out.weight.data.zero_()
    vae.decoder.conv_out.bias.data.fill_(-1.0)
    vae.save_pretrained(folder / "vae")
    return folder


def file_of(client: Client, job: JobView, name: str) -> np.ndarray:
    assert job.status == JobStatus.SUCCEEDED, (job.error, job.failures)
    with tempfile.TemporaryDirectory() as folder:
        (path,) = (path for path in client.fetch(job.id, Path(folder)) if path.name == name)
        return load(path)


def test_pictures_show_what_their_prompts_say(client: Client, reader: Reader) -> None:
    chosen = one_thing_at_a_place(6)
    ids = [client.submit(item.prompt, "image_fast", seed=item.number).id for item in chosen]
    readings = [reader.read(file_of(client, client.wait(job_id), "image.png")) for job_id in ids]
    marks = [judge(item.scene, reading) for item, reading in zip(chosen, readings, strict=True)]
    assert all(mark["colour"] and mark["position"] for mark in marks)
    assert sum(mark["shape"] for mark in marks) >= len(chosen) - 1
    swapped = [judge(item.scene, reading) for item, reading in zip(chosen, readings[1:] + readings[:1], strict=True)]
    assert sum(mark["colour"] and mark["shape"] and mark["position"] for mark in swapped) <= 1


def test_a_video_shows_its_colour_throughout_and_moves_as_told(client: Client, reader: Reader) -> None:
    job = client.wait(
        client.submit(
            "a large blue square moving to the right, white background", "video_fast", seed=3, sample_steps=10
        ).id
    )
    frames = file_of(client, job, "video.mp4")
    assert len(frames) == 41
    for frame in frames[[0, 20, 40]]:
        assert reader.things(frame)[0].colour == "blue"
    assert reader.motion(frames) == "right"


def test_a_crash_is_not_seen_in_the_picture(client: Client, service: RunningService, reader: Reader) -> None:
    (item,) = one_thing_at_a_place(1)
    ask = {"seed": item.number, "sample_steps": 30}
    quiet = file_of(client, client.wait(client.submit(item.prompt, "image_fast", **ask).id), "image.png")
    job_id = client.submit(item.prompt, "image_fast", **ask).id
    for event in client.events(job_id):
        if event.name == "progress" and event.data["step"] >= 15:
            break
    service.replica("Generator").kill()
    job = client.wait(job_id)
    assert job.receipt is not None
    assert job.receipt["resumed_from_steps"]
    crashed = file_of(client, job, "image.png")
    assert (crashed == quiet).all()
    assert judge(item.scene, reader.read(crashed))["colour"]


def test_a_size_that_comes_out_black_is_made_again_at_the_stable_one(client: Client) -> None:
    job = client.wait(client.submit("a red circle, white background", "image_high", seed=1, sample_steps=10).id)
    frames = file_of(client, job, "image.png")
    assert frames.shape == (1, 480, 640, 3)
    assert frames.max() < 16
    assert job.degraded is not None
    assert "black" in job.degraded
    assert [failure.then for failure in job.failures] == ["made again at 640*480"]


def test_a_sound_picture_keeps_its_size(client: Client) -> None:
    job = client.wait(client.submit("a red circle, white background", "image_fast", seed=1, resolution="832*480").id)
    assert file_of(client, job, "image.png").shape == (1, 480, 832, 3)
    assert job.degraded is None
