"""The Python client and the command line against the real service."""

import asyncio
import hashlib
import http.server
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from serve_app.api.schemas import JobRequest
from serve_app.cli import main
from serve_app.client import AsyncClient, Client, Overrides
from serve_app.errors import (
    ContentRefused,
    DownloadDamaged,
    InvalidValue,
    JobFinished,
    JobNotFound,
    NotFound,
    ServiceFailing,
    ServiceUnreachable,
    Unauthorized,
)
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import JobStatus
from serve_app.jobs.receipt import UNTRAINED_NOTICE
from serve_app.storage.local import LocalStore
from tests.service import PNG, Service, claim, report_steps, serving, succeed

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def running(valkey: EmbeddedStore, short_dir: Path) -> Iterator[Service]:
    with serving(valkey.url, short_dir / "client") as service:
        yield service


@pytest.fixture
async def service(running: Service) -> AsyncIterator[Service]:
    async with running.connected() as service:
        yield service
        await service.empty()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


# ---- the client -----------------------------------------------------------------------------------------------------


def test_overrides_are_the_fields_of_the_request() -> None:
    assert set(Overrides.__annotations__) | {"type", "prompt"} == set(JobRequest.model_fields)


async def test_both_clients_take_a_job_from_prompt_to_file(service: Service, client: Client, tmp_path: Path) -> None:
    job = client.submit("a red fox", type="image_fast", sample_steps=3)
    waiting = asyncio.create_task(asyncio.to_thread(client.wait, job.id))
    await succeed(service, tmp_path)
    assert (await waiting).status == JobStatus.SUCCEEDED
    assert [event.name for event in client.events(job.id)][-2:] == ["progress", "succeeded"]
    (path,) = client.fetch(job.id, tmp_path / "out")
    assert path == tmp_path / "out" / job.id / "image.png"
    assert path.read_bytes() == PNG
    assert client.presets()[0].type == "image_fast"
    client.delete(job.id)

    async with AsyncClient(service.url) as other:
        job = await other.submit("a red fox", type="image_fast", sample_steps=3)
        await succeed(service, tmp_path)
        assert (await other.wait(job.id)).status == JobStatus.SUCCEEDED
        (path,) = await other.fetch(job.id, tmp_path / "out")
        assert path.read_bytes() == PNG
        assert [found.id async for found in other.list()] == [job.id]
        await other.delete(job.id)
        with pytest.raises(JobNotFound):
            await other.get(job.id)


async def test_list_reads_every_page(service: Service, client: Client) -> None:
    ids = [client.submit("a red fox", type="image_fast").id for _ in range(5)]
    client.cancel(ids[0])
    assert [job.id for job in client.list(page_size=2)] == ids[::-1]
    assert [job.id for job in client.list(page_size=2, status="cancelled")] == [ids[0]]


def test_errors_arrive_as_what_they_were(client: Client) -> None:
    with pytest.raises(InvalidValue) as invalid:
        client.submit("a red fox", sample_steps=0)
    assert invalid.value.param == "sample_steps"
    assert invalid.value.hint
    with pytest.raises(ContentRefused):
        client.submit("nude child")
    with pytest.raises(NotFound):
        client.get("../presets")
    job = client.submit("a red fox")
    client.cancel(job.id)
    with pytest.raises(JobFinished):
        client.cancel(job.id)
    with pytest.raises(ServiceUnreachable, match=NOWHERE), Client(NOWHERE) as other:
        other.get(job.id)
    for address in ("localhost:8000", "http://", "http://a:b:c", ""):
        with pytest.raises(InvalidValue, match="address"):
            Client(address)


async def test_an_api_key_is_sent_and_a_wrong_one_told(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with serving(valkey.url, tmp_path, api_keys={"alice": "key-a"}) as service:
        with Client(service.url, "key-a") as client:
            assert client.submit("a red fox").status == JobStatus.QUEUED
        with Client(service.url, "key-b") as client, pytest.raises(Unauthorized):
            client.submit("a red fox")


async def test_a_damaged_download_leaves_no_file(service: Service, client: Client, tmp_path: Path) -> None:
    job = client.submit("a red fox", type="image_fast")
    done = await succeed(service, tmp_path)
    stored = service.settings.artifacts_dir / job.id / str(done.fencing_token) / "image.png"
    stored.write_bytes(PNG[:-1] + b"?")
    with pytest.raises(DownloadDamaged, match=hashlib.sha256(PNG).hexdigest()):
        client.fetch(job.id, tmp_path / "out")
    assert list((tmp_path / "out" / job.id).iterdir()) == []


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """Another HTTP server over the same folder, as a cloud storage is."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "elsewhere"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


class SigningStore(LocalStore):
    address = ""

    def url(self, key: str, download_name: str) -> str | None:
        return f"{self.address}/{key}"


async def test_a_download_follows_the_redirect_to_a_signed_url(
    valkey: EmbeddedStore, tmp_path: Path, file_server: str
) -> None:
    store = SigningStore(tmp_path / "elsewhere")
    store.address = file_server
    with serving(valkey.url, tmp_path, store) as service, Client(service.url) as client:
        job = client.submit("a red fox", type="image_fast")
        await succeed(service, tmp_path)
        (path,) = client.fetch(job.id, tmp_path / "out")
        assert path.read_bytes() == PNG


def test_a_stranger_at_the_address_is_no_wan_serve(tmp_path: Path, file_server: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    with Client(file_server) as client, pytest.raises(ServiceUnreachable, match=r"no running wan-serve \(HTTP 404\)"):
        client.get("0199f2f0a1b2c3d4e5f60718293a")


def test_a_stranger_that_answers_a_page_sends_no_events(tmp_path: Path, file_server: str) -> None:
    jobs = tmp_path / "elsewhere/v1/jobs/0199f2f0a1b2c3d4e5f60718293a"
    jobs.mkdir(parents=True)
    (jobs / "events").write_text("It works!")
    with Client(file_server) as client, pytest.raises(ServiceUnreachable, match=r"no running wan-serve \(HTTP 200\)"):
        list(client.events("0199f2f0a1b2c3d4e5f60718293a"))


# ---- a proxy whose service is away for a while ----------------------------------------------------------------------


class Failing(http.server.BaseHTTPRequestHandler):
    """A proxy that answers as Ray Serve's does while a node dies, before it passes a request on."""

    target: ClassVar[str]
    each: ClassVar[int]
    """How often each address fails at first, and again after a cut."""
    failures: ClassVar[dict[str, int]]
    """How often an address still fails."""
    quiet_s: ClassVar[float]
    """A stream is cut after so much silence."""
    statuses: ClassVar[Iterator[int]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        left = self.failures.setdefault(self.path, self.each)
        self.failures[self.path] -= 1
        if left > 0:
            self.send_response(next(self.statuses))
            self.send_header("Content-Type", "text/plain")
            self.end_headers()
            self.wfile.write(b"Internal Server Error")
            return
        after = {name: self.headers[name] for name in ("Last-Event-ID",) if name in self.headers}
        try:
            with httpx.stream("GET", f"{self.target}{self.path}", headers=after, timeout=self.quiet_s) as answer:
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers["Content-Type"])
                self.end_headers()
                for chunk in answer.iter_raw():
                    self.wfile.write(chunk)
        except httpx.ReadTimeout:
            self.failures[self.path] = self.each

    do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def failing(service: Service) -> Iterator[str]:
    Failing.target, Failing.failures, Failing.each, Failing.quiet_s, Failing.asked = service.url, {}, 1, 20.0, []
    Failing.statuses = cycle([500, 502, 503, 504])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


async def test_what_only_reads_is_asked_again(service: Service, client: Client, failing: str, tmp_path: Path) -> None:
    job = client.submit("a red fox", type="image_fast", sample_steps=3)
    await succeed(service, tmp_path)
    events = list(client.events(job.id))
    with Client(failing) as through:
        assert list(through.events(job.id)) == events
        assert [found.id for found in through.list()] == [job.id]
        assert through.presets() == client.presets()
        (path,) = through.fetch(job.id, tmp_path / "out")
        assert path.read_bytes() == PNG
    assert list(Counter(Failing.asked).values()) == [2] * 5

    Failing.failures.clear()
    async with AsyncClient(failing) as other:
        assert [event async for event in other.events(job.id)] == events
        assert [found.id async for found in other.list()] == [job.id]
        assert await other.presets() == client.presets()
        (path,) = await other.fetch(job.id, tmp_path / "other")
        assert path.read_bytes() == PNG


async def test_a_stream_that_breaks_after_a_long_silence_has_all_the_patience(
    service: Service, client: Client, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.client.PATIENCE_S", 1.0)
    Failing.quiet_s = 2.0
    job = client.submit("a red fox", type="image_fast")
    _, lease = await claim(service.store)
    Failing.failures[f"/v1/jobs/{job.id}/events"] = 0
    async with AsyncClient(failing) as other:
        stream = other.events(job.id)
        events = [await anext(stream) for _ in range(2)]
        following = asyncio.create_task(anext(stream))
        while len(Failing.asked) < 3:  # the stream, the failure after the silence, and the stream again
            assert not following.done(), following.exception()
            await asyncio.sleep(0.05)
        await report_steps(service.store, lease, 1, 1, 1)
        await service.store.finish(lease, JobStatus.SUCCEEDED)
        events += [await following, *[event async for event in stream]]
    assert events == list(client.events(job.id))


async def test_a_proxy_that_goes_on_failing_is_told(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.client.PATIENCE_S", 1.0)
    Failing.each, Failing.statuses = 100, cycle([500])
    job_id = "0199f2f0a1b2c3d4e5f60718293a"
    said = r"127\.0\.0\.1:\d+ answered HTTP 500 .* 'Internal Server Error'"
    async with AsyncClient(failing) as client:
        with pytest.raises(ServiceFailing, match=said) as failed:
            await client.get(job_id)
        assert "try again" in failed.value.hint
        assert Failing.asked == 4 * [f"GET /v1/jobs/{job_id}"]
        Failing.asked.clear()
        with pytest.raises(ServiceFailing, match=said):
            await anext(client.events(job_id))
        assert 2 <= len(Failing.asked) <= 4
        Failing.asked.clear()
        with pytest.raises(ServiceFailing, match=said):
            await client.cancel(job_id)
        with pytest.raises(ServiceFailing, match=said):
            await client.delete(job_id)
        assert Failing.asked == [f"POST /v1/jobs/{job_id}/cancel", f"DELETE /v1/jobs/{job_id}"]


# ---- the command line -----------------------------------------------------------------------------------------------


def wan_serve(*arguments: str) -> int:
    """Run the command line; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


async def test_submit_and_wait_shows_the_way_and_ends_with_the_facts(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAN_SERVE_URL", service.url)
    monkeypatch.setenv("COLUMNS", "200")
    command = [
        "submit",
        "a red fox",
        "--type",
        "image_fast",
        "--sample-steps",
        "4",
        "--wait",
        "--out",
        str(tmp_path / "out"),
    ]
    running = asyncio.create_task(asyncio.to_thread(wan_serve, *command))
    while not await service.store.queue_length():
        await service.store.wait("work", 0.1)
    job = await succeed(service, tmp_path, trained=False)
    assert await running == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == job.id
    assert "step 4 of 4" in printed
    path = tmp_path / "out" / job.id / "image.png"
    assert f"{path}  2.1 kB, 640x480" in printed
    assert "1.5 GPU-seconds" in printed
    assert UNTRAINED_NOTICE in printed
    assert path.read_bytes() == PNG


async def test_a_failed_job_is_exit_code_1_with_the_reason(
    service: Service, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    job = client.submit("a red fox", type="image_fast")
    watching = asyncio.create_task(asyncio.to_thread(wan_serve, "watch", job.id, "--url", service.url))
    _, lease = await claim(service.store)
    error = InvalidValue("the latents are not finite", hint="Try another seed.").info
    await service.store.finish(lease, JobStatus.FAILED, error=error)
    assert await watching == 1
    printed = capsys.readouterr().out
    assert "the latents are not finite" in printed
    assert "Try another seed." in printed
    assert wan_serve("fetch", job.id, "--url", service.url) == 1


async def test_the_other_commands(
    service: Service,
    client: Client,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WAN_SERVE_URL", service.url)
    monkeypatch.setenv("COLUMNS", "200")
    first, second = (client.submit(f"a [bold]{colour} fox", type="image_fast").id for colour in ("red", "grey"))
    assert wan_serve("list") == 0
    listed = capsys.readouterr().out
    assert listed.index(second) < listed.index(first)
    assert "a [bold]red fox" in listed
    assert wan_serve("list", "--status", "succeeded") == 0
    assert first not in capsys.readouterr().out
    assert wan_serve("list", "--limit", "1") == 0
    assert first not in capsys.readouterr().out
    assert wan_serve("show", first) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a [bold]red fox"
    assert wan_serve("cancel", first) == 0
    assert wan_serve("cancel", first) == 2
    assert "job_finished" in capsys.readouterr().err
    await succeed(service, tmp_path)
    assert wan_serve("fetch", second, "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / second / "image.png").read_bytes() == PNG
    assert wan_serve("delete", second) == 0
    assert wan_serve("show", second) == 2


def test_exit_codes_tell_a_bad_request_from_an_absent_service(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wan_serve("submit", "a red fox", "--sample-steps", "0", "--url", service.url) == 2
    assert "sample_steps is 0; it must be 1 to 100" in capsys.readouterr().err
    assert wan_serve("submit", "a red fox", "--type", "gif") == 2
    assert wan_serve("submit", "a red fox", "--url", NOWHERE) == 3
    assert "make serve" in capsys.readouterr().err
    assert wan_serve("watch", "0199f2f0a1b2c3d4e5f60718293a", "--url", NOWHERE) == 3
