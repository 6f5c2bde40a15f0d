"""Jobs on a terminal: a live bar for each while they run, and the facts of what they made."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from serve_app.api.schemas import ArtifactView, JobView
from serve_app.client import AsyncClient
from serve_app.jobs.job import JobEvent, JobStatus
from serve_app.jobs.job import Progress as JobProgress

if TYPE_CHECKING:
    from serve_app.media.verify import Provenance


@dataclass(frozen=True)
class Ended:
    """A job that has ended, and where its files were put (in the order of its artifacts; empty if not fetched)."""

    job: JobView
    paths: Sequence[Path]


async def watch_jobs(
    client: AsyncClient, job_ids: Sequence[str], console: Console, folder: Path | None = None
) -> list[Ended]:
    """Show a live bar for each job until all have ended, and fetch the files of those that succeeded to `folder`.

    Raises what `AsyncClient.events` and `fetch` raise.
    """
    columns = (
        TextColumn("{task.description}"),
        TextColumn("[cyan]{task.fields[doing]:<10}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[steps]:<17}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console) as bars:
        return await asyncio.gather(*(_watch(client, job_id, bars, folder) for job_id in job_ids))


async def _watch(client: AsyncClient, job_id: str, bars: Progress, folder: Path | None) -> Ended:
    job = await client.get(job_id)
    task = bars.add_task(
        f"{job.type:<10}",
        total=sum(shot.sample_steps for shot in job.shots) or job.sample_steps,
        doing=job.status.value,
        steps="",
        left="",
    )
    async for event in client.events(job.id):
        _show(bars, task, event)
    job = await client.get(job.id)
    paths = await client.fetch(job.id, folder) if folder and job.status == JobStatus.SUCCEEDED else []
    return Ended(job, paths)


def _show(bars: Progress, task: TaskID, event: JobEvent) -> None:
    """Bring a bar up to an event."""
    match event.name:
        case "progress":
            progress = JobProgress.model_validate(event.data)
            left = "" if progress.eta_s is None else f"{progress.eta_s:.0f} s left"
            done, total, counted = progress.step, progress.steps, f"step {progress.step} of {progress.steps}"
            if stage := progress.stage:
                done, total, counted = stage.done, stage.total, f"frame {stage.done} of {stage.total}"
                if stage.unit == "bytes":
                    counted = f"{_size(done)} of {_size(total)}"
            bars.update(task, completed=done, total=total, steps=counted, left=left)
        case "stage":
            bars.update(task, doing=event.data["stage"], left="")
        case "queued":
            bars.update(task, doing="queued", completed=0, steps="", left="")
        case "running":
            bars.update(task, doing="running")
        case JobStatus.SUCCEEDED | JobStatus.FAILED | JobStatus.CANCELLED:
            bars.update(task, doing=event.name, left="")


def print_facts(console: Console, ended: Ended) -> None:
    """Say how a job ended: its files with their facts, or what went wrong."""
    job = ended.job
    took = ""
    if job.finished_at is not None:
        took = f" after {(job.finished_at - job.created_at).total_seconds():.1f} s"
    colour = "green" if job.status == JobStatus.SUCCEEDED else "red"
    console.print(f"[{colour}]{job.type} {job.id} {job.status}[/]{took}, {job.gpu_s:.1f} GPU-seconds", highlight=False)
    if job.error:
        console.print(f"  {escape(job.error.message)} ({job.error.code})", highlight=False)
        if job.error.hint:
            console.print(f"  {escape(job.error.hint)}", highlight=False)
    if job.degraded:
        console.print(f"  [yellow]made otherwise than asked for: {escape(job.degraded)}[/]", highlight=False)
    for number, artifact in enumerate(job.artifacts):
        place = str(ended.paths[number]) if ended.paths else artifact.url
        console.print(f"  {escape(place)}  {facts(artifact)}", highlight=False, soft_wrap=True)
    if job.notice:
        console.print(f"  [bold yellow]{escape(job.notice)}[/]", highlight=False)


def facts(artifact: ArtifactView) -> str:
    """A file in a few words: size, and what it shows."""
    parts = [_size(artifact.size_bytes)]
    if artifact.width and artifact.height:
        parts.append(f"{artifact.width}x{artifact.height}")
    if artifact.frames and artifact.fps and artifact.duration_s:
        parts.append(f"{artifact.frames} frames at {artifact.fps:g} fps, {artifact.duration_s:.2f} s")
    if artifact.codec:
        parts.append(artifact.codec)
    return ", ".join(parts)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def print_provenance(console: Console, path: Path, found: "Provenance") -> None:
    """Say what a file says about its origin, and every reason not to believe it."""
    if found.problems:
        console.print(f"[red]{escape(path.name)}: its origin is not proven[/]", highlight=False, soft_wrap=True)
    elif found.is_development:
        console.print(
            f"[yellow]{escape(path.name)}: made by AI, unchanged; signed with a development certificate, "
            "which proves nothing to others[/]",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(
            f"[green]{escape(path.name)}: made by AI, unchanged, signed by a trusted signer[/]", highlight=False
        )
    for problem in found.problems:
        console.print(f"  [red]{escape(problem)}[/]", highlight=False, soft_wrap=True)
    made_by = " ".join(part for part in (found.model, found.model_version) if part)
    when = f"{found.timestamped_at}, by a timestamp authority" if found.timestamped_at else None
    if found.made_at and not when:
        when = f"{found.made_at}, by the signer's own clock"
    facts = {
        "model": made_by,
        "upscaled by": found.upscaled_by,
        "made through": found.service,
        "signed by": found.signer,
        "when": when,
        "job": found.job_id,
        "its receipt": f"SHA-256 {found.receipt_sha256}" if found.receipt_sha256 else None,
        "XMP": "made by AI (IPTC digital source type)" if found.says_ai_in_xmp else "says nothing of AI",
    }
    for name, value in facts.items():
        if value:
            console.print(f"  {name:<13} {escape(value)}", highlight=False, soft_wrap=True)
