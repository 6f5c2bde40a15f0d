"""Planning from what a real store remembers."""

import asyncio
import json
import time

from typer.testing import CliRunner

from serve_app.cli import app
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import JobStatus
from serve_app.jobs.presets import DEFAULT_MODEL_NAME, JobType
from serve_app.jobs.store import JobStore, Lease
from serve_app.planner.demand import Costs, read_history
from serve_app.scheduling.claim import ANY_DEADLINE
from tests.factories import make_job, make_spec


async def test_the_finished_jobs_of_a_model_come_again(store: JobStore) -> None:
    now = time.time()
    kept = []
    for number, (model, status) in enumerate(
        [(DEFAULT_MODEL_NAME, JobStatus.SUCCEEDED), ("large", JobStatus.SUCCEEDED), (DEFAULT_MODEL_NAME, JobStatus.FAILED),
         (DEFAULT_MODEL_NAME, JobStatus.CANCELLED), (DEFAULT_MODEL_NAME, None)]
    ):  # fmt: skip
        spec = make_spec(JobType.VIDEO_FAST, model=model, sample_steps=10)
        job = make_job(spec=spec, created_at=now - number, deadline_in_s=240.0)
        await store.submit(job, max_queued=100)
        if status is None:
            continue
        claimed = await store.claim(model=model, horizons=ANY_DEADLINE, lease_s=60)
        assert claimed is not None
        await store.finish(Lease(job.id, claimed.fencing_token), status)
        if model == DEFAULT_MODEL_NAME and status is not JobStatus.CANCELLED:
            kept.append(job)
    found = (await read_history(store, DEFAULT_MODEL_NAME, Costs("H100"))).known
    assert [(job.job_id, job.arrived_at, job.deadline) for job in found] == [
        (job.id, job.created_at, job.deadline) for job in reversed(kept)
    ]
    expected = Costs("H100").job("any", 0.0, "video_fast", sample_steps=10)
    assert {(job.kind, job.phases) for job in found} == {("video_fast", expected.phases)}


async def test_the_command_plans_it(store: JobStore, valkey: EmbeddedStore) -> None:
    job = make_job()
    await store.submit(job, max_queued=100)
    claimed = await store.claim(horizons=ANY_DEADLINE, lease_s=60)
    assert claimed is not None
    await store.finish(Lease(job.id, claimed.fencing_token), JobStatus.SUCCEEDED)
    prefix = store._prefix.strip("{}")
    arguments = ["plan", "--history", "--store-url", valkey.url, "--store-prefix", prefix, "--json", "-"]
    done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["best"]["types"]["image_fast"]["jobs"] == 1
