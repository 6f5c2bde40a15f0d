"""The `wan-serve` command.

Exit codes: 0 done, 1 the job failed or was cancelled (or `verify` found a reason for doubt), 2 the request or the call was
wrong, 3 the service is away or in trouble, 130 stopped by Ctrl-C.
"""

import asyncio
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serve_app.client import DEFAULT_URL, AsyncClient, Client
from serve_app.errors import WanServeError
from serve_app.jobs.job import JobStatus
from serve_app.jobs.presets import JobType
from serve_app.planner.command import plan_command
from serve_app.terminal import Ended, print_facts, print_provenance, watch_jobs

if TYPE_CHECKING:
    from serve_app.settings import Settings

JOB_FAILED, BAD_REQUEST, SERVICE_TROUBLE, INTERRUPTED = 1, 2, 3, 130
PROVENANCE_DOUBTFUL = 1

Url = Annotated[str, typer.Option(envvar="WAN_SERVE_URL", help="Address of the service.")]
ApiKey = Annotated[str | None, typer.Option(envvar="WAN_SERVE_API_KEY", help="API key, where the service wants one.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Files go to a folder in here, named after the job.")]

app = typer.Typer(name="wan-serve", help=__doc__.splitlines()[0], no_args_is_help=True, add_completion=False)
console = Console()
errors = Console(stderr=True)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    try:
        app(arguments)
    except WanServeError as error:
        errors.print(f"[red]error:[/] {escape(error.message)} ({error.code})", highlight=False, soft_wrap=True)
        if error.hint:
            errors.print(f"  {escape(error.hint)}", highlight=False, soft_wrap=True)
        sys.exit(SERVICE_TROUBLE if error.retryable or error.http_status >= 500 else BAD_REQUEST)
    sys.exit(0)


# ---- jobs -----------------------------------------------------------------------------------------------------------


@app.command()
def submit(  # noqa: PLR0917 (typer calls it by keyword)
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...", help="What to show, in words. Several: a video of so many shots.", show_default=False
        ),
    ],
    type: Annotated[JobType, typer.Option(help="The preset.")] = JobType.VIDEO_FAST,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    resolution: Annotated[str | None, typer.Option(help="640x480, 832x480 or 480x640.")] = None,
    video_length: Annotated[int | None, typer.Option(help="Frames: 1 to 81, of the form 4k+1.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length of the video, or of each of several shots.")] = None,
    transition: Annotated[
        str | None, typer.Option(help="Between clips: crossfade, cut, fadeblack, wipeleft ...")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="mp4, h265, av1, webm, gif, webp, contact_sheet; repeatable.")
    ] = None,
    upscale: Annotated[int | None, typer.Option(help="2 or 4 times as wide and as high.")] = None,
    sample_steps: Annotated[int | None, typer.Option(help="Denoising steps: 1 to 100.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How strictly to follow the prompt: 0 to 20.")] = None,
    sample_shift: Annotated[float | None, typer.Option(help="The noise scheduler's flow_shift.")] = None,
    seed: Annotated[int | None, typer.Option(help="Start of the random numbers; drawn if left out.")] = None,
    motion_bucket_id: Annotated[int | None, typer.Option(help="Recorded for old clients, without effect.")] = None,
    profile: Annotated[str | None, typer.Option(help="How the model is run: exact.")] = None,
    webhook_url: Annotated[str | None, typer.Option(help="Where to POST the job once it has ended.")] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Watch the job to its end and fetch its files.")] = False,
    out: Out = Path("out"),
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Submit a job and print its id."""
    shots = [{"prompt": prompt, "seconds": seconds} for prompt in prompts] if len(prompts) > 1 else None
    with Client(url, api_key) as client:
        job = client.submit(
            None if shots else prompts[0],
            type,
            shots=shots,
            seconds=None if shots else seconds,
            transition={"kind": transition} if transition else None,
            formats=formats,
            upscale=upscale,
            negative_prompt=negative_prompt,
            resolution=resolution,
            video_length=video_length,
            sample_steps=sample_steps,
            guidance_scale=guidance_scale,
            sample_shift=sample_shift,
            seed=seed,
            motion_bucket_id=motion_bucket_id,
            profile=profile,
            webhook_url=webhook_url,
        )
    print(job.id, flush=True)  # noqa: T201 (for scripts: on a line of its own, without markup)
    if wait:
        _watch(job.id, url, api_key, out)


@app.command()
def watch(
    job_id: JobId,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Fetch the files too, to a folder in here.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show a job's progress until it ends."""
    _watch(job_id, url, api_key, out)


@app.command("list")
def list_jobs(
    status: Annotated[JobStatus | None, typer.Option(help="Only jobs of this status.")] = None,
    type: Annotated[JobType | None, typer.Option(help="Only jobs of this type.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many jobs.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List jobs, newest first."""
    table = Table("id", "type", "status", "progress", "submitted (UTC)", "prompt", box=None)
    for name in ("id", "status"):
        next(column for column in table.columns if column.header == name).no_wrap = True
    with Client(url, api_key) as client:
        for job in itertools.islice(client.list(status=status, type=type, page_size=min(limit, 100)), limit):
            progress = f"{job.stage or ''} {job.progress.step}/{job.progress.steps}" if job.status == "running" else ""
            prompt = escape(job.prompt if len(job.prompt) <= 40 else f"{job.prompt[:37]}...")
            table.add_row(job.id, job.type, job.status, progress, f"{job.created_at:%Y-%m-%d %H:%M:%S}", prompt)
    console.print(table)


@app.command()
def show(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Print everything about a job, as JSON."""
    with Client(url, api_key) as client:
        console.print_json(client.get(job_id).model_dump_json())


@app.command()
def cancel(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Cancel a job: a queued one at once, a running one at its next step."""
    with Client(url, api_key) as client:
        job = client.cancel(job_id)
    console.print(f"{job.id} {'stops at its next step' if job.status == JobStatus.RUNNING else job.status}")


@app.command()
def fetch(job_id: JobId, out: Out = Path("out"), url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Download a job's files."""
    with Client(url, api_key) as client:
        paths, job = client.fetch(job_id, out), client.get(job_id)
    print_facts(console, Ended(job, paths))
    if job.status != JobStatus.SUCCEEDED:
        raise typer.Exit(JOB_FAILED)


@app.command()
def delete(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Remove a finished job and its files from the service."""
    with Client(url, api_key) as client:
        client.delete(job_id)
    console.print(f"{job_id} deleted")


def _watch(job_id: str, url: str, api_key: str | None, out: Path | None) -> None:
    """Watch a job to its end, print its facts, and exit with 1 unless it succeeded."""

    async def watched() -> Ended:
        async with AsyncClient(url, api_key) as client:
            return (await watch_jobs(client, [job_id], console, out))[0]

    try:
        ended = asyncio.run(watched())
    except KeyboardInterrupt:
        errors.print(f"\nThe job goes on. See it again with: wan-serve watch {job_id}")
        raise typer.Exit(INTERRUPTED) from None
    print_facts(console, ended)
    if ended.job.status != JobStatus.SUCCEEDED:
        raise typer.Exit(JOB_FAILED)


# ---- files ----------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A picture or video.", show_default=False)],
    receipt: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="The job's receipt.json.")] = None,
    trust: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Root certificates (PEM) to trust, and no others.")
    ] = None,
    data_dir: Annotated[
        Path, typer.Option(envvar="WAN_SERVE_DATA_DIR", help="Without --trust: whose development root is trusted.")
    ] = Path("data"),
) -> None:
    """Say who made a file, and whether that can be believed: exit code 0 if it is signed, trusted and unchanged, else 1."""
    from serve_app.media.certificates import development_root, read_roots
    from serve_app.media.verify import read_provenance

    roots = trust or development_root(data_dir / "provenance")
    try:
        anchors = read_roots(roots) if roots.is_file() else None
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--trust") from None
    found = read_provenance(file, anchors_pem=anchors, receipt=receipt)
    print_provenance(console, file, found)
    raise typer.Exit(PROVENANCE_DOUBTFUL if found.problems else 0)


# ---- the service ----------------------------------------------------------------------------------------------------

Config = Annotated[Path, typer.Option("--config", "-c", help="A Serve YAML file.")]
LOCAL_CONFIG = Path("cluster/local.yaml")


@app.command("up")
def up_command(
    config: Config = LOCAL_CONFIG,
    port: Annotated[int | None, typer.Option(help="Instead of the file's http_options.port.")] = None,
) -> None:
    """Run the whole service on this machine until Ctrl-C."""
    from serve_app import up

    raise typer.Exit(up.run(config, port))


@app.command()
def demo(config: Config = LOCAL_CONFIG, out: Out = Path("out")) -> None:
    """Start the service, make a picture and a video over HTTP, show their progress, and say where the files are."""
    from serve_app import up

    raise typer.Exit(up.demo(config, out, console))


@app.command()
def doctor(config: Config = LOCAL_CONFIG) -> None:
    """Check everything that the service needs, and say what to do about each failure."""
    from serve_app.doctor import Verdict, examine

    colours = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.FAILED: "red"}
    failed = False
    for finding in examine(_settings_in(config)):
        failed |= finding.verdict == Verdict.FAILED
        colour = colours[finding.verdict]
        console.print(f"[{colour}]{finding.verdict:<7}[/]{finding.name:<10} {escape(finding.found)}", soft_wrap=True)
        if finding.advice:
            console.print(f"                 {escape(finding.advice)}", soft_wrap=True, highlight=False)
    raise typer.Exit(JOB_FAILED if failed else 0)


@app.command()
def top(
    config: Config = LOCAL_CONFIG,
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
    every_s: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show what the service does now: replicas and what each runs, queues, late jobs, autoscaling, cost."""
    from serve_app.top import watch as watch_service

    try:
        asyncio.run(watch_service(_settings_in(config), console, once=once, every_s=every_s))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


app.command("plan")(plan_command)


def _settings_in(config: Path) -> "Settings":
    """The settings in a Serve YAML file, or exit code 2 after saying what is wrong there."""
    from serve_app import up

    try:
        return up.load_config(config)[1]
    except ValueError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(BAD_REQUEST) from None


if __name__ == "__main__":
    main()
