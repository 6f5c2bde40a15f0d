"""`wan-serve top`: what the service is doing now, from the job store: replicas and what each runs, queues, late jobs, scaling, cost."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from serve_app.errors import StoreUnavailable
from serve_app.jobs.replica import ReplicaReport
from serve_app.jobs.scaling import ScalingNote
from serve_app.jobs.store import JobStore, JobWork
from serve_app.settings import Settings

MOST_QUEUED = 1000
"""Queued jobs of a model that are read one by one; were there more, the rest are taken to be like them."""
MOST_LATE = 8
SCRIPTS_WIDTH = 240
"""Columns where no terminal says how many: nothing is cut."""


@dataclass(frozen=True)
class ModelNow:
    """One model's queue and replicas. `cost_per_hour` is that of its replicas, None where its price is not known."""

    name: str
    queued: int
    queued_gpu_s: float
    running: int
    replicas: int
    cost_per_hour: float | None
    scaling: ScalingNote | None
    """The last change that the autoscaling policy asked for."""


@dataclass(frozen=True)
class Now:
    """The service at Unix second `at`. `late` are jobs past their deadline, the latest first."""

    at: float
    replicas: Sequence[ReplicaReport]
    models: Sequence[ModelNow]
    late: Sequence[JobWork]


async def look(store: JobStore, settings: Settings) -> Now:
    """Read it all. Raises StoreUnavailable."""
    at, replicas, running = time.time(), await store.replicas(), await store.running()
    models, late = [], [job for job in running if job.deadline < at]
    for name, model in settings.models.items():
        count, queued = await store.queued(name, limit=MOST_QUEUED)
        late += [job for job in queued if job.deadline < at]
        here = sum(replica.model == name for replica in replicas)
        models.append(
            ModelNow(
                name=name,
                queued=count,
                queued_gpu_s=sum(job.estimated_gpu_s for job in queued) * count / max(1, len(queued)),
                running=sum(job.model == name for job in running),
                replicas=here,
                cost_per_hour=model.cost_of(3600 * here),
                scaling=next(iter(await store.scaling_notes(name, limit=1)), None),
            )
        )
    by_name = sorted(replicas, key=lambda replica: (replica.model, replica.node, replica.id))
    return Now(at, by_name, models, sorted(late, key=lambda job: job.deadline))


def shown(now: Now) -> RenderableType:
    """The page."""
    parts: list[RenderableType] = [_models(now), Text(), _replicas(now)]
    if now.late:
        parts += [Text(), _late(now)]
    return Group(*parts)


def _models(now: Now) -> Table:
    table = Table("model", "queued", "GPU-seconds queued", "running", "replicas", "cost/h", "last scaling", box=None)
    for model in now.models:
        table.add_row(
            model.name,
            str(model.queued),
            f"{model.queued_gpu_s:.0f}",
            str(model.running),
            str(model.replicas),
            "-" if model.cost_per_hour is None else f"{model.cost_per_hour:.2f}",
            "-" if model.scaling is None else _scaling(model.scaling, now.at),
        )
    return table


def _scaling(note: ScalingNote, at: float) -> str:
    return escape(f"{note.had} to {note.wanted}, {_age(at - note.at)} ago: {note.reason}")


def _replicas(now: Now) -> RenderableType:
    if not now.replicas:
        return Text("no generator replica is alive")
    table = Table("replica", "model", "node", "device", "busy", "runs", "waits", "GPU-seconds left", box=None)
    for replica in now.replicas:
        runs = next((clip for clip in replica.clips if clip.clip_id == replica.running), None)
        waiting = len(replica.clips) - (runs is not None)
        table.add_row(
            replica.id,
            replica.model,
            replica.node,
            escape(replica.device),
            f"{replica.busy_share:.0%}",
            f"{runs.job_id} step {runs.step} of {runs.steps}" if runs else "-",
            str(waiting) if waiting else "-",
            f"{sum(clip.remaining_s for clip in replica.clips):.0f}",
        )
    return table


def _late(now: Now) -> Table:
    table = Table("late job", "model", "doing", "late by", box=None, header_style="bold red")
    for job in now.late[:MOST_LATE]:
        table.add_row(job.id, job.model, job.stage or "queued", _age(now.at - job.deadline))
    if (more := len(now.late) - MOST_LATE) > 0:
        table.add_row(f"and {more} more")
    return table


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


async def watch(settings: Settings, console: Console, *, once: bool, every_s: float) -> None:
    """Show it until Ctrl-C, or once. Raises StoreUnavailable with `once`; otherwise the page says so, and goes on."""
    store = JobStore(settings.resolved_store_url, prefix=settings.store_prefix)
    try:
        if once:
            if not console.is_terminal:
                console.width = SCRIPTS_WIDTH
            console.print(shown(await look(store, settings)))
            return
        with Live(console=console, screen=True, auto_refresh=False) as page:
            while True:
                try:
                    page.update(shown(await look(store, settings)), refresh=True)
                except StoreUnavailable as error:
                    page.update(Text(error.message, style="red"), refresh=True)
                await asyncio.sleep(every_s)
    finally:
        await store.close()
