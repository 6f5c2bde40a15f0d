"""The Python client and the command line against the real service."""

import asyncio
import hashlib
import http.server
import json
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

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
    ServiceUnreachable,
    Unauthorized,
)
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import JobStatus
from serve_app.jobs.receipt import UNTRAINED_NOTICE
from serve_app.storage.local import LocalStore
from tests.service import PNG, Service, claim, serving, succeed

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
