"""A finisher with its upscaler: frames in order, few of them on the way, told about, and nothing left where the job is no longer wanted."""

import asyncio
import json
import math
import random
import tempfile
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tenacity
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from deployments.finisher import Finisher
from deployments.upscaling import BLOCK_FRAMES, BLOCKS_IN_FLIGHT, Upscaling
from serve_app.errors import MediaError, StorageUnavailable
from serve_app.jobs.job import Delivered, Job, Stage, StageProgress
from serve_app.jobs.presets import JobType
from serve_app.jobs.store import Lease
from serve_app.scheduling.claim import ANY_DEADLINE
from serve_app.settings import Settings
from tests.factories import make_job, make_spec
from tests.media_content import decode_rgb, moving_frames, psnr_db

RECEIPT = {"job_id": "01a2", "model": "a model", "model_revision": None}
ABOUT = {"model": "fake", "sha256": "0" * 64, "model_scale": 2, "provider": "none"}


class FakeUpscaler:
    """The Upscaler's handle, without Serve: repeats pixels as `work` lets it."""

    def __init__(self, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        self._work, self.calls, self.now, self.most = work, 0, 0, 0
        self.about = self.upscale = self

    def remote(self, *arguments: Any) -> "asyncio.Task[Any]":
        return asyncio.ensure_future(self._upscaled(*arguments) if arguments else self._about())

    async def _about(self) -> dict[str, Any]:
        return ABOUT

    async def _upscaled(self, frames: np.ndarray, factor: int) -> np.ndarray:
        assert 1 <= len(frames) <= BLOCK_FRAMES
        self.calls, self.now = self.calls + 1, self.now + 1
        self.most = max(self.most, self.now)
        try:
            await self._work(self.calls)
        finally:
            self.now -= 1
        return frames.repeat(factor, 1).repeat(factor, 2)


async def at_random(_: int) -> None:
    await asyncio.sleep(random.random() * 0.02)


def job(frames: int = 41, **changes: Any) -> Job:
    spec = make_spec(JobType.VIDEO_FAST, video_length=frames, resolution="96*64", **{"upscale": 2, **changes})
    return make_job(spec=spec, fencing_token=1)


def finisher(folder: Path, upscaler: FakeUpscaler | None = None) -> Any:
    return Finisher.func_or_class(Settings(data_dir=folder), upscaler)


def given(frames: np.ndarray) -> list["asyncio.Future[np.ndarray]"]:
    """As the object store does it."""
    future = asyncio.get_running_loop().create_future()
    future.set_result(frames)
    return [future]


@pytest.fixture
def impatient(monkeypatch) -> None:
    for call in (Upscaling._upscaled, Upscaling.about):
        monkeypatch.setattr(call.retry, "wait", tenacity.wait_none())


async def test_frames_come_in_order_and_few_are_on_the_way(tmp_path):
    all_that_may_be = asyncio.Barrier(BLOCKS_IN_FLIGHT)

    async def wait_for_company(call: int) -> None:
        if call <= BLOCKS_IN_FLIGHT:
            await all_that_may_be.wait()
        await at_random(call)

    upscaler, frames, wanted = FakeUpscaler(wait_for_company), moving_frames(41, 96, 64), job()
    updates = [one async for one in finisher(tmp_path, upscaler).finish(wanted, given(frames), RECEIPT)]
    assert upscaler.most == BLOCKS_IN_FLIGHT
    folder = tmp_path / "artifacts" / wanted.id / "1"
    expected = frames.repeat(2, 1).repeat(2, 2)
    assert min(psnr_db(*pair) for pair in zip(decode_rgb(folder / "video.mp4"), expected, strict=True)) > 33

    delivered = updates[-1]
    assert isinstance(delivered, Delivered)
    assert delivered.receipt == {**RECEIPT, "upscale": {"factor": 2, **ABOUT}}
    assert json.loads((folder / "receipt.json").read_text()) == delivered.receipt
    uploading = updates.index(Stage.UPLOADING)
    counted, sent = updates[:uploading], updates[uploading + 1 : -1]
    assert all(isinstance(one, StageProgress) and (one.unit, one.total) == ("frames", 41) for one in counted)
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert all(isinstance(one, StageProgress) and (one.unit, one.total) == ("bytes", total) for one in sent)
    for news in (counted, sent):
        assert [one.done for one in news] == sorted(one.done for one in news)
        assert news[-1].done == news[-1].total


async def test_progress_is_told_a_few_times_a_second_at_most(tmp_path, monkeypatch):
    monkeypatch.setattr("deployments.thread_work.TELL_EVERY_S", math.inf)
    wanted = job(81, upscale=None)
    updates = [one async for one in finisher(tmp_path).finish(wanted, given(moving_frames(81, 96, 64)), RECEIPT)]
    frames, uploading, sent, delivered = updates
    assert (frames.done, frames.total, uploading) == (81, 81, Stage.UPLOADING)
    assert sent.done == sent.total == sum(artifact.size_bytes for artifact in delivered.artifacts)


async def test_a_block_goes_again_where_its_replica_died(tmp_path, impatient):
    async def dying(call: int) -> None:
        if call % 3 == 0:
            raise ActorDiedError

    upscaler, frames, wanted = FakeUpscaler(dying), moving_frames(9, 96, 64), job(9)
    *_, delivered = [one async for one in finisher(tmp_path, upscaler).finish(wanted, given(frames), RECEIPT)]
    assert isinstance(delivered, Delivered)
    assert upscaler.calls > 5
    shown = decode_rgb(tmp_path / "artifacts" / wanted.id / "1" / "video.mp4")
    assert min(psnr_db(*pair) for pair in zip(shown, frames.repeat(2, 1).repeat(2, 2), strict=True)) > 33


async def test_a_block_that_kills_replica_after_replica_ends_the_attempt(tmp_path, impatient):
    async def dying(_: int) -> None:
        raise ActorDiedError

    upscaler = FakeUpscaler(dying)
    with pytest.raises(RayActorError):
        [one async for one in finisher(tmp_path, upscaler).finish(job(1), given(moving_frames(1, 96, 64)), RECEIPT)]
    assert upscaler.calls == 5


async def test_what_the_network_says_against_a_frame_is_the_jobs_error(tmp_path):
    async def failing(_: int) -> None:
        raise RayTaskError("upscale", "traceback", MediaError("not such a frame")).as_instanceof_cause()

    with pytest.raises(MediaError, match="not such a frame") as caught:
        [
            one
            async for one in finisher(tmp_path, FakeUpscaler(failing)).finish(
                job(5), given(moving_frames(5, 96, 64)), RECEIPT
            )
        ]
    assert type(caught.value) is MediaError


async def test_a_job_that_is_no_longer_wanted_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stuck = asyncio.Event()

    async def at_last_stuck(call: int) -> None:
        if call > 20:
            stuck.set()
            await asyncio.sleep(3600)

    upscaler = FakeUpscaler(at_last_stuck)
    updates = finisher(tmp_path, upscaler).finish(job(81), given(moving_frames(81, 96, 64)), RECEIPT)

    async def read() -> None:
        async with aclosing(updates):
            async for _ in updates:
                pass

    reading = asyncio.create_task(read())
    await stuck.wait()
    assert any("ffmpeg" in child.name() for child in psutil.Process().children())
    assert list(tmp_path.glob("wan-serve-*"))
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await asyncio.sleep(0)
    assert upscaler.now == 0
    assert [child for child in psutil.Process().children() if "ffmpeg" in child.name()] == []
    assert list(tmp_path.glob("wan-serve-*")) == []
    assert not (tmp_path / "artifacts").exists()


async def test_a_job_whose_conductor_is_gone_is_stopped(tmp_path, valkey, store, monkeypatch):
    monkeypatch.setattr("deployments.finisher.STANDING_EVERY_S", 0.02)
    stuck = asyncio.Event()

    async def stuck_at_once(_: int) -> None:
        stuck.set()
        await asyncio.sleep(3600)

    await store.submit(job(5), max_queued=1)
    claimed = await store.claim(horizons=ANY_DEADLINE, lease_s=60)
    settings, upscaler = (
        Settings(data_dir=tmp_path, store_url=valkey.url, store_prefix=store._prefix.strip("{}")),
        FakeUpscaler(stuck_at_once),
    )
    here = Finisher.func_or_class(settings, upscaler)

    async def read() -> list[Any]:
        return [one async for one in here.finish(claimed, given(moving_frames(5, 96, 64)), RECEIPT)]

    reading = asyncio.create_task(read())
    await stuck.wait()
    await asyncio.sleep(0.1)
    assert not reading.done()
    await store.requeue(Lease(claimed.id, claimed.fencing_token), "its conductor was killed")
    with pytest.raises(CancelledError):
        await reading
    assert upscaler.now == 0


async def test_a_job_that_waits_for_its_turn_can_go_away(tmp_path):
    async def slow(_: int) -> None:
        await asyncio.sleep(3600)

    busy = finisher(tmp_path, FakeUpscaler(slow))

    async def read(job: Job) -> list[Any]:
        return [one async for one in busy.finish(job, given(moving_frames(5, 96, 64)), RECEIPT)]

    videos = [asyncio.create_task(read(job(5))) for _ in range(3)]
    *_, delivered = await read(job(5, upscale=None))  # others do not wait for them
    assert isinstance(delivered, Delivered)
    for video in reversed(videos):
        video.cancel()
        with pytest.raises(asyncio.CancelledError):
            await video


async def test_a_broken_upload_is_the_jobs_error(tmp_path, monkeypatch):
    broken = finisher(tmp_path)

    def put(*_: object) -> None:
        raise StorageUnavailable("nobody there")

    monkeypatch.setattr(broken._artifacts, "put", put)
    with pytest.raises(StorageUnavailable, match="nobody there"):
        [one async for one in broken.finish(job(5, upscale=None), given(moving_frames(5, 96, 64)), RECEIPT)]
