"""The HTTP routes: each a few lines from a request to the store and back."""

import json
import logging
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

import serve_app
from serve_app import errors as e
from serve_app.api.admit import admit
from serve_app.api.auth import Owner
from serve_app.api.errors import documented
from serve_app.api.idempotency import REPLAYED, OnceFor
from serve_app.api.schemas import Health, JobListQuery, JobPage, JobRequest, JobView, PresetList, Readiness
from serve_app.jobs.job import JOB_ID, Job, JobEvent
from serve_app.jobs.store import Answer, JobStore
from serve_app.settings import Settings
from serve_app.storage import ArtifactStore
from serve_app.storage.keys import artifact_key
from serve_app.tracing import Tracing

logger = logging.getLogger(__name__)

EVENT_ID = re.compile(r"[0-9]{1,19}(-[0-9]{1,19})?")
"""A Redis stream's id, milliseconds and a count; `0` stands before the first."""
PING_S = 15
"""Seconds between comments on a silent event stream: proxies close what is silent for a minute."""

EVENT_STREAM = """id: 1763285400000-0
event: queued
data: {"status": "queued"}

id: 1763285401000-0
event: progress
data: {"step": 12, "steps": 25, "eta_s": 8.5}

"""


@dataclass(frozen=True)
class Services:
    """What the routes stand on."""

    settings: Settings
    store: JobStore
    artifacts: ArtifactStore
    tracing: Tracing


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Use = Annotated[Services, Depends(_services)]


async def _owned(
    job_id: Annotated[str, Path(description="The job's id.", examples=["0199f2f0a1b2c3d4e5f60718293a"])],
    owner: Owner,
    use: Use,
) -> Job:
    """The asker's job of that id. Raises `JobNotFound`, also where it is another owner's."""
    if JOB_ID.fullmatch(job_id):
        job = await use.store.get(job_id)
        if job.owner == owner:
            return job
    raise e.JobNotFound(f"there is no job {job_id[:60]!a}", param="job_id", hint="GET /v1/jobs lists yours.")


OwnedJob = Annotated[Job, Depends(_owned)]

jobs = APIRouter(
    prefix="/v1", tags=["jobs"], responses=documented(e.Unauthorized, e.InvalidRequest, e.StoreUnavailable)
)
service = APIRouter(tags=["service"])


async def _require_json(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise e.UnsupportedMediaType(
            f"the content type is {kind[:60]!a}; it must be application/json",
            hint="Send the header Content-Type: application/json.",
        )


@jobs.post(
    "/jobs",
    status_code=202,
    summary="Submit a job",
    dependencies=[Depends(_require_json)],
    responses={
        202: {
            "description": "The job is on disk and will be done.",
            "headers": {"Location": {"description": "Path of the job.", "schema": {"type": "string"}}, **REPLAYED},
        },
        **documented(
            e.InvalidJson, e.ContentRefused, e.BodyTooLarge, e.UnsupportedMediaType, e.InvalidRequest, e.InvalidValue,
            e.UnknownField, e.UnknownJobType, e.QueueFull, e.IdempotencyConflict, e.JobGone,
        ),
    },
)  # fmt: skip
async def submit(  # noqa: PLR0917 (FastAPI calls it by keyword)
    body: JobRequest, request: Request, response: Response, owner: Owner, use: Use, once: OnceFor
) -> JobView:
    """Accept a job. The answer comes once the job is on disk; nothing accepted is lost."""
    with use.tracing.span("submit", request.headers.get("traceparent"), {"job_type": body.type}) as span:
        job = admit(body, owner, use.settings, time.time())
        job.traceparent = span.traceparent
        answer = await use.store.submit(job, max_queued=use.settings.max_queued_jobs, once=once(body))
        span.say({"job_id": answer.job.id, "replayed": answer.replayed})
    logger.info("job %s of %s: %s", answer.job.id, owner, "sent again" if answer.replayed else "queued")
    response.headers["Location"] = f"/v1/jobs/{answer.job.id}"
    return _told(answer, response)


def _told(answer: Answer, response: Response) -> JobView:
    if answer.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return JobView.of(answer.job)


@jobs.get("/jobs", summary="List jobs", responses=documented(e.InvalidValue, e.UnknownField, e.UnknownJobType))
async def list_jobs(query: Annotated[JobListQuery, Query()], owner: Owner, use: Use) -> JobPage:
    """The asker's jobs, newest first, a page at a time."""
    if query.cursor is not None and not JOB_ID.fullmatch(query.cursor):
        raise e.InvalidValue(
            f"cursor is {query.cursor[:60]!a}, which no page gave out",
            param="cursor",
            hint="Use next_cursor of the page before, or leave it out to start with the newest job.",
        )
    found = await use.store.page(
        owner=owner, status=query.status, type=query.type, before=query.cursor, limit=query.limit + 1
    )
    page = found[: query.limit]
    return JobPage(
        data=[JobView.of(job) for job in page], next_cursor=page[-1].id if len(found) > query.limit else None
    )


@jobs.get("/jobs/{job_id}", summary="Read a job", responses=documented(e.JobNotFound))
async def show(job: OwnedJob) -> JobView:
    """One job, as it is now."""
    return JobView.of(job)


@jobs.get(
    "/jobs/{job_id}/events",
    summary="Follow a job",
    response_class=EventSourceResponse,
    responses={
        200: {
            "description": "Server-sent events: those that were, then those to come, until `succeeded`, `failed` or "
            "`cancelled`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}, "example": EVENT_STREAM}},
        },
        204: {"description": "The job has ended and nothing came after the event named: do not connect again."},
        **documented(e.JobNotFound, e.InvalidValue),
    },
)
async def events(
    job: OwnedJob,
    use: Use,
    last_event_id: Annotated[
        str | None,
        Header(description="Id of the last event seen; what came after it is sent.", examples=["1763285400000-0"]),
    ] = None,
    after: Annotated[
        str | None,
        Query(
            alias="last_event_id",
            description="The same, for clients that cannot set headers.",
            examples=["1763285400000-0"],
        ),
    ] = None,
    preview: Annotated[
        bool,
        Query(
            description="Also send `preview` events (`step`, `jpeg_base64`: the first frame as it would be now), which cost "
            "the job a little device time while somebody asks for them.",
            examples=[False],
        ),
    ] = False,
) -> Response:
    """Everything that happens to a job, with ids: a client that reconnects with the last one misses none."""
    last_seen = last_event_id if last_event_id is not None else after or "0"
    if not EVENT_ID.fullmatch(last_seen):
        raise e.InvalidValue(
            f"Last-Event-ID is {last_seen[:60]!a}, which no event has",
            param="last_event_id",
            hint="Send the id of the last event that you saw, or leave it out to see all.",
        )
    stream = use.store.follow(job.id, last_seen, previews=preview)
    if not job.status.is_final:
        return EventSourceResponse(_wire(stream, job.id), ping=PING_S)
    missed = [event async for event in stream]
    if not missed:
        return Response(status_code=204)  # the HTML standard's way to tell an EventSource to stay away
    return EventSourceResponse(iter([_on_wire(event) for event in missed]))


def _on_wire(event: JobEvent) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(event.data), event=event.name, id=event.id)


async def _wire(stream: AsyncIterator[JobEvent], job_id: str) -> AsyncIterator[ServerSentEvent]:
    try:
        async for event in stream:
            yield _on_wire(event)
    except e.StoreUnavailable as error:
        # The status is sent already. An early end makes the client connect again with its last id, and miss nothing.
        logger.warning("the event stream of job %s ends early: %s", job_id, error.message)


@jobs.get(
    "/jobs/{job_id}/artifacts/{name}",
    summary="Fetch a file",
    response_class=FileResponse,
    responses={
        200: {
            "description": "The file. `Range` is understood (206).",
            "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("video/mp4", "image/png", "image/jpeg")},
        },
        206: {"description": "The part of the file that `Range` asked for."},
        307: {"description": "The file lies at the signed URL in `Location`."},
        **documented(e.JobNotFound, e.ArtifactNotFound, e.RangeNotSatisfiable),
    },
)  # fmt: skip
@jobs.head("/jobs/{job_id}/artifacts/{name}", include_in_schema=False)
async def artifact(
    job: OwnedJob,
    name: Annotated[str, Path(description="The artifact's name.", examples=["video.mp4"])],
    use: Use,
) -> Response:
    """One file of a job that succeeded, or a redirect to it."""
    found = next((artifact for artifact in job.artifacts if artifact.name == name), None)
    if found is None:
        names = ", ".join(artifact.name for artifact in job.artifacts)
        raise e.ArtifactNotFound(
            f"job {job.id} has no artifact {name[:60]!a}",
            param="name",
            hint=f"It has {names}." if names else f"It has none: the job is {job.status}.",
        )
    key, download_name = artifact_key(job.id, job.fencing_token, name), f"{job.id}-{name}"
    url = await run_in_threadpool(use.artifacts.url, key, download_name)
    if url is not None:
        return RedirectResponse(url, status_code=307)
    path = await run_in_threadpool(use.artifacts.local_path, key)
    if path is None:
        raise e.ArtifactNotFound(
            f"the file of {name} is gone from the artifact store",
            param="name",
            hint="Submit the job again, with its seed.",
        )
    return FileResponse(path, media_type=found.content_type, filename=download_name)


@jobs.post(
    "/jobs/{job_id}/cancel",
    summary="Cancel a job",
    responses={
        200: {"description": "The job, cancelled or about to be.", "headers": REPLAYED},
        **documented(e.JobNotFound, e.JobFinished, e.IdempotencyConflict, e.JobGone),
    },
)
async def cancel(job: OwnedJob, response: Response, use: Use, once: OnceFor) -> JobView:
    """Stop a job: a queued one at once, a running one at its next step (`cancel_requested` is true until then)."""
    return _told(await use.store.cancel(job.id, once=once(None)), response)


@jobs.delete(
    "/jobs/{job_id}", status_code=204, summary="Delete a job", responses=documented(e.JobNotFound, e.JobNotFinished)
)
async def delete(job: OwnedJob, use: Use) -> None:
    """Remove a finished job and its files, for good."""
    if not job.status.is_final:
        raise e.JobNotFinished(f"job {job.id} is {job.status}", hint=f"Cancel it first: POST /v1/jobs/{job.id}/cancel.")
    # Files first: should the second half fail, the record still names them and the delete can be repeated.
    await run_in_threadpool(use.artifacts.delete, job.id)
    await use.store.delete(job.id)


@jobs.get("/presets", summary="List the job types", tags=["presets"])
async def presets(owner: Owner) -> PresetList:
    """What each job type stands for."""
    return PresetList.all()


@service.get("/healthz", summary="Is the process alive?")
async def healthz() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok", version=serve_app.__version__)


@service.get("/readyz", summary="Can it take jobs?", responses=documented(e.StoreUnavailable))
async def readyz(use: Use) -> Readiness:
    """Answers 503, and says what is missing, while jobs cannot be accepted."""
    await use.store.ping()
    return Readiness(
        status="ready",
        generator_replicas=len(await use.store.replicas()),
        queued_jobs=await use.store.queue_length(),
    )
