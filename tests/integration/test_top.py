"""`wan-serve top` over a real store with real reports."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import JobStatus, Stage
from serve_app.jobs.replica import ClipReport, ReplicaReport
from serve_app.jobs.scaling import ScalingNote
from serve_app.jobs.store import JobStore
from serve_app.settings import ModelSettings, Settings
from serve_app.top import look, shown
from tests.factories import make_job, make_spec
from tests.service import claim

ROOT = Path(__file__).parents[2]
PRICED = {"wan-1.3b": ModelSettings(gpu_price_per_hour=0.4), "wan-14b": ModelSettings()}


def page(now: object) -> str:
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown(now))  # type: ignore[arg-type]
    return console.export_text()


async def report(store: JobStore, clip: ClipReport) -> None:
    """As two replicas do, of which the first runs the clip."""
    idle = ReplicaReport(id="replica-b", node="10.0.0.7", device="cuda", model="wan-1.3b", source="hub", trained=True)
    await store.report_replica(idle)
    runs = {"id": "replica-a", "clips": [clip], "running": clip.clip_id, "busy_share": 0.93}
    await store.report_replica(idle.model_copy(update=runs))


async def busy(store: JobStore) -> ClipReport:
    """A late running job, an on-time queued one, two replicas of which one runs the first: its clip."""
    await store.submit(make_job(deadline_in_s=-300.0), max_queued=10)
    running, lease = await claim(store)
    await store.write(lease, stage=Stage.GENERATING)
    waiting = make_job(deadline_in_s=60.0, estimated_gpu_s=12.0)
    await store.submit(waiting, max_queued=10)
    clip = ClipReport(clip_id=f"{running.id}.1.0-1", job_id=running.id, deadline=running.deadline, step=7, steps=25,
                      remaining_s=3.0)  # fmt: skip
    report = ReplicaReport(id="replica-a", node="10.0.0.7", device="cuda", model="wan-1.3b", source="hub", trained=True)
    await store.report_replica(report.model_copy(update={"clips": [clip], "running": clip.clip_id, "busy_share": 0.93}))
    await store.report_replica(report.model_copy(update={"id": "replica-b"}))
    await store.note_scaling("wan-1.3b", ScalingNote(at=time.time() - 300, had=1, wanted=2, reason="1 [clip] was late"))
    return clip


async def test_what_is_there_is_shown(store: JobStore) -> None:
    running = (await busy(store)).job_id
    now = await look(store, Settings(models=PRICED, data_dir=Path("x")))
    small, large = now.models
    assert (small.queued, small.queued_gpu_s, small.running, small.replicas) == (1, 12.0, 1, 2)
    assert small.cost_per_hour == pytest.approx(0.8)
    assert (large.queued, large.replicas, large.cost_per_hour, large.scaling) == (0, 0, None, None)
    assert [job.id for job in now.late] == [running]
    text = page(now)
    assert f"{running} step 7 of 25" in text
    assert "93%" in text
    assert "1 to 2, 5 min ago: 1 [clip] was late" in text
    assert "0.80" in text
    (late,) = [line for line in text.splitlines() if line.startswith(f" {running}") or line.startswith(running)]
    assert "generating" in late
    assert "5 min" in late


async def test_nothing_is_shown_as_nothing(store: JobStore) -> None:
    text = page(await look(store, Settings(data_dir=Path("x"))))
    assert "no generator replica is alive" in text
    assert "late job" not in text


async def test_a_job_that_ended_late_is_not_late_any_more(store: JobStore) -> None:
    await store.submit(make_job(deadline_in_s=-300.0, spec=make_spec()), max_queued=10)
    _, lease = await claim(store)
    await store.finish(lease, JobStatus.SUCCEEDED)
    assert (await look(store, Settings(data_dir=Path("x")))).late == []


async def test_the_command_prints_it_once(store: JobStore, valkey: EmbeddedStore, tmp_path: Path) -> None:
    clip = await busy(store)

    async def report_on() -> None:  # replicas are forgotten after five seconds, and a command may take longer to start
        while True:
            await report(store, clip)
            await asyncio.sleep(1)

    def top(store_url: str) -> subprocess.CompletedProcess[str]:
        args = {"data_dir": str(tmp_path), "store_url": store_url, "store_prefix": store._prefix.strip("{}")}
        config = {"applications": [{"import_path": "serve_app.app:build", "args": args}]}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "serve_app.cli", "top", "--once", "--config", str(tmp_path / "config.yaml")]
        return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)

    reporting = asyncio.create_task(report_on())
    try:
        ended = await asyncio.to_thread(top, valkey.url)
    finally:
        reporting.cancel()
    assert ended.returncode == 0, ended.stderr
    assert f"{clip.job_id} step 7 of 25" in ended.stdout
    assert (await asyncio.to_thread(top, "redis://127.0.0.1:1/0")).returncode == 3
