"""A small typed client of a running wan-serve: `Client`, and `AsyncClient` with the same methods.

    with Client("http://127.0.0.1:8000") as client:
        job = client.submit("a red fox in fresh snow", type="image_fast")
        job = client.wait(job.id)
        paths = client.fetch(job.id, Path("out"))

What the service refuses is raised as the error of `serve_app.errors` that its code names; `ServiceUnreachable` where no
wan-serve answers. A broken event stream is taken up again, a submission whose answer was lost is sent again under the same
idempotency key, so that it makes one job, and what only reads is asked again after a `ServiceFailing`; nothing else is
tried again.
"""

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
import tenacity
from httpx_sse import ServerSentEvent, aconnect_sse, connect_sse
from pydantic import BaseModel, TypeAdapter, ValidationError

from serve_app.api.schemas import ArtifactView, ErrorBody, JobPage, JobView, PresetList, PresetView
from serve_app.errors import (
    DownloadDamaged,
    InvalidValue,
    ServiceFailing,
    ServiceUnreachable,
    StoreUnavailable,
    WanServeError,
    error_from,
)
from serve_app.jobs.job import FINAL_EVENTS, JobEvent
from serve_app.jobs.presets import JobType

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
"""Longest silence in an answer: twice the ping interval of event streams, so that a dead one is noticed."""
PATIENCE_S = 60.0
"""How long a broken event stream is connected again before it is given up."""
RECONNECT_S = 0.5
FAILING = frozenset({500, 502, 503, 504})
"""What a proxy answers by itself while the service behind it dies, starts or moves."""

BACKOFF = tenacity.wait_exponential_jitter(initial=0.5, max=4.0, jitter=0.5)
TRIES = tenacity.stop_after_attempt(4)
"""With `BACKOFF`: four tries within about five seconds, longer where each try hangs."""

insistently = tenacity.retry(
    retry=tenacity.retry_if_exception_type((ServiceUnreachable, StoreUnavailable)),
    wait=BACKOFF,
    stop=TRIES,
    reraise=True,
)
"""For requests that carry an idempotency key."""
patiently = tenacity.retry(
    retry=tenacity.retry_if_exception_type(ServiceFailing), wait=BACKOFF, stop=TRIES, reraise=True
)
"""For requests that only read. Where nobody answers at all they end at once: the address is likely wrong."""

Model = TypeVar("Model", bound=BaseModel)
EVENT_DATA: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


class Overrides(TypedDict, total=False):
    """What a job may change of its preset; `JobRequest` describes each."""

    negative_prompt: str | None
    resolution: str | None
    video_length: int | None
    sample_steps: int | None
    guidance_scale: float | None
    sample_shift: float | None
    seed: int | None
    motion_bucket_id: int | None
    profile: str | None
    seconds: float | None
    shots: list[dict[str, Any]] | None
    transition: dict[str, Any] | None
    formats: list[str] | None
    upscale: int | None
    webhook_url: str | None


class Client:
    """The blocking client. Threads may share it."""

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self._http = httpx.Client(**_options(url, api_key, timeout_s))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(
        self,
        prompt: str | None = None,
        type: str = JobType.VIDEO_FAST,
        *,
        idempotency_key: str | None = None,
        **overrides: Unpack[Overrides],
    ) -> JobView:
        """Submit a job, once. It is on the service's disk when this returns. With `shots`, `prompt` is left out.

        The key is drawn where none is given; give your own to be sure across restarts of your program: the same key with
        the same values gets the first job again. Raises `IdempotencyConflict` where it stands for other values.
        """
        return insistently(self._ask)(
            JobView, "POST", "/v1/jobs", **_submission(prompt, type, idempotency_key, overrides)
        )

    def get(self, job_id: str) -> JobView:
        """A job as it is now."""
        return patiently(self._ask)(JobView, "GET", _path(job_id))

    def list(self, *, status: str | None = None, type: str | None = None, page_size: int = 50) -> Iterator[JobView]:
        """Every job of this owner, newest first; pages are read as they are needed."""
        query = _query(limit=page_size, status=status, type=type)
        while True:
            page = patiently(self._ask)(JobPage, "GET", "/v1/jobs", params=query)
            yield from page.data
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

    def events(self, job_id: str, after: str | None = None) -> Iterator[JobEvent]:
        """What happens to a job, from its start or after the event `after`, to its end. Reconnects and misses none."""
        stream = _Stream(job_id, after)
        while not stream.ended:
            try:
                with connect_sse(self._http, "GET", stream.path, headers=stream.headers()) as source:
                    if source.response.status_code != 200:
                        source.response.read()
                    if stream.opened(source.response):
                        for message in source.iter_sse():
                            if message.data:  # a ping is a comment and arrives as a message without data
                                yield stream.event(message)
            except (httpx.RequestError, WanServeError) as error:
                stream.broken(self._translated(error))
            if not stream.ended:
                time.sleep(RECONNECT_S)

    def wait(self, job_id: str) -> JobView:
        """The job once it has ended, however it ended."""
        for _ in self.events(job_id):
            pass
        return self.get(job_id)

    def cancel(self, job_id: str) -> JobView:
        """Ask for a job's end."""
        return self._ask(JobView, "POST", f"{_path(job_id)}/cancel")

    def delete(self, job_id: str) -> None:
        """Remove a finished job and its files."""
        self._send("DELETE", _path(job_id))

    def fetch(self, job_id: str, folder: Path) -> Sequence[Path]:
        """Download a job's files to `folder`/`job_id`; their paths. A file appears there whole and checked, or not at all."""
        job = self.get(job_id)
        return [patiently(self._download)(artifact, folder / job.id) for artifact in job.artifacts]

    def presets(self) -> Sequence[PresetView]:
        """Every job type."""
        return patiently(self._ask)(PresetList, "GET", "/v1/presets").data

    def _ask(self, model: type[Model], method: str, path: str, **parts: Any) -> Model:
        return _parsed(model, self._send(method, path, **parts))

    def _send(self, method: str, path: str, **parts: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **parts)
        except httpx.RequestError as error:
            raise self._translated(error) from error
        _check(response)
        return response

    def _download(self, artifact: ArtifactView, folder: Path) -> Path:
        try:
            with self._http.stream("GET", artifact.url, follow_redirects=True) as response:
                if response.status_code != 200:
                    response.read()
                _check(response)
                with _arriving(artifact, folder) as (path, write):
                    for chunk in response.iter_bytes():
                        write(chunk)
                return path
        except httpx.RequestError as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> WanServeError:
        return error if isinstance(error, WanServeError) else _unreachable(str(self._http.base_url), error)


class AsyncClient:
    """The client for asyncio: `Client`, with `await`."""

    def __init__(self, url: str = DEFAULT_URL, api_key: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self._http = httpx.AsyncClient(**_options(url, api_key, timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(
        self,
        prompt: str | None = None,
        type: str = JobType.VIDEO_FAST,
        *,
        idempotency_key: str | None = None,
        **overrides: Unpack[Overrides],
    ) -> JobView:
        """Submit a job, once. It is on the service's disk when this returns. See `Client.submit`."""
        submission = _submission(prompt, type, idempotency_key, overrides)
        return await insistently(self._ask)(JobView, "POST", "/v1/jobs", **submission)

    async def get(self, job_id: str) -> JobView:
        """A job as it is now."""
        return await patiently(self._ask)(JobView, "GET", _path(job_id))

    async def list(
        self, *, status: str | None = None, type: str | None = None, page_size: int = 50
    ) -> AsyncIterator[JobView]:
        """Every job of this owner, newest first; pages are read as they are needed."""
        query = _query(limit=page_size, status=status, type=type)
        while True:
            page = await patiently(self._ask)(JobPage, "GET", "/v1/jobs", params=query)
            for job in page.data:
                yield job
            if page.next_cursor is None:
                return
            query["cursor"] = page.next_cursor

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[JobEvent]:
        """What happens to a job, from its start or after the event `after`, to its end. Reconnects and misses none."""
        stream = _Stream(job_id, after)
        while not stream.ended:
            try:
                async with aconnect_sse(self._http, "GET", stream.path, headers=stream.headers()) as source:
                    if source.response.status_code != 200:
                        await source.response.aread()
                    if stream.opened(source.response):
                        async for message in source.aiter_sse():
                            if message.data:  # a ping is a comment and arrives as a message without data
                                yield stream.event(message)
            except (httpx.RequestError, WanServeError) as error:
                stream.broken(self._translated(error))
            if not stream.ended:
                await asyncio.sleep(RECONNECT_S)

    async def wait(self, job_id: str) -> JobView:
        """The job once it has ended, however it ended."""
        async for _ in self.events(job_id):
            pass
        return await self.get(job_id)

    async def cancel(self, job_id: str) -> JobView:
        """Ask for a job's end."""
        return await self._ask(JobView, "POST", f"{_path(job_id)}/cancel")

    async def delete(self, job_id: str) -> None:
        """Remove a finished job and its files."""
        await self._send("DELETE", _path(job_id))

    async def fetch(self, job_id: str, folder: Path) -> Sequence[Path]:
        """Download a job's files to `folder`/`job_id`; their paths. A file appears there whole and checked, or not at all."""
        job = await self.get(job_id)
        return [await patiently(self._download)(artifact, folder / job.id) for artifact in job.artifacts]

    async def presets(self) -> Sequence[PresetView]:
        """Every job type."""
        return (await patiently(self._ask)(PresetList, "GET", "/v1/presets")).data

    async def _ask(self, model: type[Model], method: str, path: str, **parts: Any) -> Model:
        return _parsed(model, await self._send(method, path, **parts))

    async def _send(self, method: str, path: str, **parts: Any) -> httpx.Response:
        try:
            response = await self._http.request(method, path, **parts)
        except httpx.RequestError as error:
            raise self._translated(error) from error
        _check(response)
        return response

    async def _download(self, artifact: ArtifactView, folder: Path) -> Path:
        try:
            async with self._http.stream("GET", artifact.url, follow_redirects=True) as response:
                if response.status_code != 200:
                    await response.aread()
                _check(response)
                with _arriving(artifact, folder) as (path, write):
                    async for chunk in response.aiter_bytes():
                        write(chunk)
                return path
        except httpx.RequestError as error:
            raise self._translated(error) from error

    def _translated(self, error: Exception) -> WanServeError:
        return error if isinstance(error, WanServeError) else _unreachable(str(self._http.base_url), error)


# ---- what both clients share ----------------------------------------------------------------------------------------


class _Stream:
    """Where a reader is in a job's events, through any number of connections."""

    def __init__(self, job_id: str, after: str | None) -> None:
        self.path = f"{_path(job_id)}/events"
        self.ended = False
        self._last_id = after
        self._answered = False
        self._broken_at: float | None = None

    def headers(self) -> dict[str, str]:
        return {} if self._last_id is None else {"Last-Event-ID": self._last_id}

    def opened(self, response: httpx.Response) -> bool:
        """Whether events follow. Raises what the service refused."""
        _check(response)
        ended = response.status_code == 204
        if not ended and not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise _stranger(response)
        self._answered, self._broken_at, self.ended = True, None, ended
        return not ended

    def event(self, message: ServerSentEvent) -> JobEvent:
        self._last_id = message.id
        self.ended = message.event in FINAL_EVENTS
        return JobEvent(id=message.id, name=message.event, data=EVENT_DATA.validate_json(message.data))

    def broken(self, error: WanServeError) -> None:
        """Return where connecting again may help, else raise. Where nobody ever answered it is not tried again."""
        now = time.monotonic()
        if self._broken_at is None:
            self._broken_at = now  # counted from here, not from the last event: a job may say nothing for minutes
        self._answered = self._answered or isinstance(error, ServiceFailing)
        if not self._answered or now - self._broken_at > PATIENCE_S or not error.retryable:
            raise error


@contextmanager
def _arriving(artifact: ArtifactView, folder: Path) -> Iterator[tuple[Path, Callable[[bytes], None]]]:
    """The path of a download, and what takes its bytes. The file is renamed into place if it is the one of the record."""
    path = folder / artifact.name
    if path.parent != folder:
        raise DownloadDamaged(f"the service names an artifact {artifact.name!a}, which is no plain file name")
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()

    def write(chunk: bytes) -> None:
        digest.update(chunk)
        file.write(chunk)

    with NamedTemporaryFile(dir=folder, prefix=".", suffix=".part", delete=False) as file:
        try:
            yield path, write
            if digest.hexdigest() != artifact.sha256:
                raise DownloadDamaged(
                    f"{artifact.name} arrived with SHA-256 {digest.hexdigest()}, its record says {artifact.sha256}",
                    hint="Fetch it again.",
                )
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidValue(f"{url!r} is not an HTTP address", param="url", hint=f"Such as {DEFAULT_URL}.")
    headers = {"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout_s}


def _submission(prompt: str | None, type: str, key: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Body and headers, the same for every try."""
    body = _query(type=str(type), prompt=prompt, **overrides)
    return {"json": body, "headers": {"Idempotency-Key": (str(uuid.uuid4()) if key is None else key).encode()}}


def _query(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _check(response: httpx.Response) -> None:
    """Raise the error that the service answered, if it did."""
    if response.status_code < 400:
        return
    try:
        body = ErrorBody.model_validate_json(response.content)
    except ValidationError:
        raise (_failing if response.status_code in FAILING else _stranger)(response) from None
    raise error_from(body.error)


def _parsed(model: type[Model], response: httpx.Response) -> Model:
    try:
        return model.model_validate_json(response.content)
    except ValidationError:
        raise _stranger(response) from None


def _failing(response: httpx.Response) -> ServiceFailing:
    return ServiceFailing(
        f"{_address(response)} answered HTTP {response.status_code} without a reason of wan-serve's: "
        f"{response.text[:80]!a}",
        hint="What answers there may be restarting: try again in a minute. If that does not help, check the address, and "
        "run `wan-serve doctor` where the service runs.",
    )


def _stranger(response: httpx.Response) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"what answers at {_address(response)} is no running wan-serve (HTTP {response.status_code})",
        hint="If the service is starting, try again in a few seconds; otherwise check the address.",
    )


def _address(response: httpx.Response) -> str:
    return f"{response.url.host}:{response.url.port or response.url.scheme}"


def _unreachable(url: str, error: Exception) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"no wan-serve answers at {url} ({error or type(error).__name__})",
        hint="Start one with `make serve`, or give the address of a running one with --url or WAN_SERVE_URL.",
    )
