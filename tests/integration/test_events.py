"""Server-sent events over real HTTP: history, live, resumed, and cut by a bad network."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx_sse import ServerSentEvent, aconnect_sse

from serve_app.client import AsyncClient
from serve_app.errors import JobNotFound, ServiceUnreachable
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import JobStatus
from serve_app.jobs.store import Lease
from tests.service import Service, claim, report_steps, serving, succeed


@pytest.fixture(scope="module")
def running(valkey: EmbeddedStore, short_dir: Path) -> Iterator[Service]:
    with serving(valkey.url, short_dir / "events") as service:
        yield service


@pytest.fixture
async def service(running: Service) -> AsyncIterator[Service]:
    async with running.connected() as service:
        yield service
        await service.empty()


async def started(service: Service) -> tuple[str, Lease]:
    view = service.http.post("/v1/jobs", json={"type": "image_fast", "prompt": "a red fox"}).json()
    return view["id"], (await claim(service.store))[1]


async def read(service: Service, job_id: str, count: int | None = None, **request: Any) -> list[ServerSentEvent]:
    """The next `count` events, or all until the service closes the stream; then disconnect."""
    events: list[ServerSentEvent] = []
    async with (
        httpx.AsyncClient(base_url=service.url, timeout=20) as http,
        aconnect_sse(http, "GET", f"/v1/jobs/{job_id}/events", **request) as source,
    ):
        async for event in source.aiter_sse():
            events.append(event)
            if len(events) == count:
                break
    return events


async def test_events_tell_the_life_of_a_job_and_end_with_it(service: Service, tmp_path: Path) -> None:
    view = service.http.post("/v1/jobs", json={"type": "image_fast", "prompt": "a red fox", "sample_steps": 2}).json()
    live = asyncio.create_task(read(service, view["id"]))
    await succeed(service, tmp_path)
    events = await live
    assert [event.event for event in events] == ["queued", "running", "stage", "progress", "progress", "succeeded"]
    assert json.loads(events[3].data) == {"step": 1, "steps": 2, "eta_s": 1.0, "stage": None}
    assert len({event.id for event in events}) == len(events)
    again = await read(service, view["id"])
    assert [event.id for event in again] == [event.id for event in events]


async def test_a_reader_that_comes_back_misses_none_and_sees_none_twice(service: Service) -> None:
    job_id, lease = await started(service)
    await report_steps(service.store, lease, 1, 3, 10)
    seen = await read(service, job_id, count=4)
    await report_steps(service.store, lease, 4, 6, 10)
    resumed = asyncio.create_task(read(service, job_id, headers={"Last-Event-ID": seen[-1].id}))
    await report_steps(service.store, lease, 7, 10, 10)
    await service.store.finish(lease, JobStatus.SUCCEEDED)
    events = seen + await resumed
    assert [event.id for event in events] == [event.id for event in await read(service, job_id)]
    assert [json.loads(e.data)["step"] for e in events if e.event == "progress"] == list(range(1, 11))
    assert events[-1].event == "succeeded"
    by_query = await read(service, job_id, params={"last_event_id": seen[-1].id})
    assert [event.id for event in by_query] == [event.id for event in events[4:]]


async def test_after_the_last_event_there_is_nothing_and_the_reader_is_told_to_stay_away(service: Service) -> None:
    job_id, lease = await started(service)
    await service.store.finish(lease, JobStatus.FAILED)
    last = (await read(service, job_id))[-1]
    answer = service.http.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last.id}, timeout=20)
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("bad", ["yesterday", "1-2-3", "-1", "9" * 30, "(5", "$"])
async def test_an_id_that_no_event_has_is_refused(service: Service, bad: str) -> None:
    job_id, _ = await started(service)
    for request in ({"headers": {"Last-Event-ID": bad}}, {"params": {"last_event_id": bad}}):
        answer = service.http.get(f"/v1/jobs/{job_id}/events", **request)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_value", "last_event_id")


@asynccontextmanager
async def cutting_proxy(service: Service, bytes_each: list[int]) -> AsyncIterator[tuple[str, list[int]]]:
    """A network that cuts connection n after `bytes_each[n]` bytes of answer, and lets later ones live."""
    host, port = service.url.removeprefix("http://").split(":")
    cut: list[int] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        allowed = bytes_each.pop(0) if bytes_each else None
        from_service, to_service = await asyncio.open_connection(host, port)
        upward = asyncio.create_task(pump(reader, to_service, None))
        whole = await pump(from_service, writer, allowed)
        if not whole:
            cut.append(allowed or 0)
        upward.cancel()
        to_service.transport.abort()
        writer.transport.abort() if not whole else writer.close()
        tasks.discard(task)

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, allowed: int | None) -> bool:
        sent = 0
        while chunk := await source.read(64):
            if allowed is not None and sent + len(chunk) > allowed:
                return False
            target.write(chunk)
            await target.drain()
            sent += len(chunk)
        return True

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", cut
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_client_reconnects_through_a_network_that_cuts_and_misses_none(service: Service) -> None:
    job_id, lease = await started(service)
    await report_steps(service.store, lease, 1, 10, 20)

    async with cutting_proxy(service, [700, 900, 1200]) as (url, cut), AsyncClient(url) as client:
        stream = client.events(job_id)
        events = [await anext(stream) for _ in range(3)]
        await report_steps(service.store, lease, 11, 20, 20)
        await service.store.finish(lease, JobStatus.SUCCEEDED)
        events += [event async for event in stream]
    assert len(cut) == 3
    assert [event.id for event in events] == [event.id for event in await read(service, job_id)]
    assert [event.data["step"] for event in events if event.name == "progress"] == list(range(1, 21))


async def test_the_client_does_not_insist_where_it_cannot_help(service: Service) -> None:
    async with AsyncClient(service.url) as client:
        with pytest.raises(JobNotFound):
            await anext(client.events("0199f2f0a1b2c3d4e5f60718293a"))
    async with AsyncClient("http://127.0.0.1:9") as client:
        with pytest.raises(ServiceUnreachable):
            await anext(client.events("0199f2f0a1b2c3d4e5f60718293a"))
