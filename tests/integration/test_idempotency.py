"""One job of many identical requests: the header over HTTP, under concurrency, and the client that lost an answer."""

import asyncio
import http.server
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from serve_app.client import AsyncClient, Client
from serve_app.errors import IdempotencyConflict, QueueFull, ServiceUnreachable
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.store import JobStore, Once
from tests.factories import make_job
from tests.service import Service, claim, serving, succeed

GOOD = {"type": "image_fast", "prompt": "a red fox in fresh snow"}


@pytest.fixture(scope="module")
def running(valkey: EmbeddedStore, short_dir: Path) -> Iterator[Service]:
    with serving(valkey.url, short_dir / "once") as service:
        yield service


@pytest.fixture
async def service(running: Service) -> AsyncIterator[Service]:
    async with running.connected() as service:
        yield service
        await service.empty()


def post(service: Service, key: str | None, path: str = "/v1/jobs", **body: Any) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return service.http.post(path, headers=headers, json=GOOD | body if path == "/v1/jobs" else None)


def count(service: Service) -> int:
    return len(service.http.get("/v1/jobs").json()["data"])


# ---- submit ---------------------------------------------------------------------------------------------------------


async def test_the_same_request_again_is_the_first_job_as_it_is_now(service: Service) -> None:
    first = post(service, "a key")
    assert "Idempotent-Replayed" not in first.headers
    again = post(service, "a key")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (202, "true")
    assert again.headers["Location"] == first.headers["Location"]
    assert again.json() == first.json()  # the seed too, which was drawn once
    await claim(service.store)
    assert post(service, "a key").json()["status"] == "running"
    assert (count(service), post(service, "another key").json()["id"] != first.json()["id"]) == (1, True)
    assert post(service, None).json()["id"] != post(service, None).json()["id"]


def test_what_counts_is_what_the_body_says_not_how_it_is_written(service: Service) -> None:
    first = post(service, "k", guidance_scale=6)
    text = '{"guidance_scale": 6.0, "seed": null,\n "prompt": "a red fox in fresh snow", "type": "image_fast"}'
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json; charset=utf-8"}
    assert service.http.post("/v1/jobs", content=text, headers=headers).json()["id"] == first.json()["id"]


@pytest.mark.parametrize("other", [{"prompt": "a blue fox"}, {"seed": 1}, {"type": "image_high"}])
def test_another_body_is_a_conflict_and_makes_nothing(service: Service, other: dict[str, Any]) -> None:
    post(service, "k")
    answer = post(service, "k", **other)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert "new key" in answer.json()["error"]["hint"]
    assert count(service) == 1


@pytest.mark.parametrize("bad", [b"", b"x" * 256, b"caf\xe9", b"a\tb"])
async def test_a_key_that_is_none_is_refused_and_leaves_nothing(service: Service, bad: bytes) -> None:
    answer = service.http.post("/v1/jobs", json=GOOD, headers={b"Idempotency-Key": bad})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_value", "Idempotency-Key")
    assert await service.left_behind() == []


async def test_two_keys_are_refused(service: Service) -> None:
    answer = service.http.post("/v1/jobs", json=GOOD, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")])
    assert answer.status_code == 422
    assert await service.left_behind() == []


def test_the_longest_key_works(service: Service) -> None:
    key = "".join(chr(33 + n % 94) for n in range(255))
    assert post(service, key).json()["id"] == post(service, key).json()["id"]


async def test_many_at_once_make_one_job(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, limits=httpx.Limits(max_connections=50)) as http:
        answers = await asyncio.gather(
            *(http.post("/v1/jobs", json=GOOD, headers={"Idempotency-Key": "k"}) for _ in range(50))
        )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len({answer.json()["seed"] for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert await service.store.queue_length() == count(service) == 1


async def test_many_stores_at_once_make_one_job(store: JobStore) -> None:
    once = Once("me:k", "f", 60)
    answers = await asyncio.gather(*(store.submit(make_job(), max_queued=100, once=once) for _ in range(200)))
    assert len({answer.job.id for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1
    assert await store.queue_length() == 1


async def test_a_key_belongs_to_its_owner(valkey: EmbeddedStore, tmp_path: Path) -> None:
    keys = {"a": "key-a", "a:b": "key-b"}
    with serving(valkey.url, tmp_path, api_keys=keys) as service:
        ids = []
        for api_key, key in (("key-a", "b:c"), ("key-b", "c"), ("key-b", "b:c")):
            headers = {"Authorization": f"Bearer {api_key}", "Idempotency-Key": key}
            ids.append(service.http.post("/v1/jobs", json=GOOD, headers=headers).json()["id"])
        assert len(set(ids)) == 3


async def test_a_full_queue_still_answers_for_what_it_took(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with serving(valkey.url, tmp_path, max_queued_jobs=1) as service:
        first = post(service, "k")
        assert post(service, "other").status_code == 429
        assert (post(service, "k").status_code, post(service, "k").json()["id"]) == (202, first.json()["id"])
        service.http.post(f"{first.headers['Location']}/cancel")
        assert post(service, "other").status_code == 202  # a refused request did not use its key up


async def test_after_a_delete_the_key_says_so_and_makes_nothing(service: Service, tmp_path: Path) -> None:
    path = post(service, "k").headers["Location"]
    await succeed(service, tmp_path)
    assert service.http.delete(path).status_code == 204
    answer = post(service, "k")
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "job_gone")
    assert count(service) == 0


async def test_a_key_is_forgotten_in_time(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with serving(valkey.url, tmp_path, idempotency_ttl_s=1) as service:
        first = post(service, "k").json()["id"]
        for _ in range(100):
            await asyncio.sleep(0.05)
            if (later := post(service, "k").json()["id"]) != first:
                break
        assert later != first


# ---- cancel ---------------------------------------------------------------------------------------------------------


async def test_a_cancel_again_is_no_conflict_with_itself(service: Service) -> None:
    job = post(service, None).json()
    cancel = job["links"]["cancel"]
    assert "Idempotent-Replayed" not in post(service, "c", cancel).headers
    again = post(service, "c", cancel)
    assert (again.status_code, again.json()["status"], again.headers["Idempotent-Replayed"]) == (
        200,
        "cancelled",
        "true",
    )
    assert post(service, "new", cancel).json()["error"]["code"] == "job_finished"
    assert post(service, "new", cancel).json()["error"]["code"] == "job_finished"  # a refusal is not remembered


def test_a_key_stands_for_one_address(service: Service) -> None:
    one, other = post(service, "k").json(), post(service, None).json()
    for path in (one["links"]["cancel"], other["links"]["cancel"]):
        assert post(service, "k", path).json()["error"]["code"] == "idempotency_conflict"
    assert post(service, "c", one["links"]["cancel"]).status_code == 200
    assert post(service, "c", other["links"]["cancel"]).status_code == 409
    assert service.http.get(other["links"]["job"]).json()["status"] == "queued"


# ---- the client -----------------------------------------------------------------------------------------------------


class Forgetful(http.server.BaseHTTPRequestHandler):
    """A proxy that passes each submission on and loses the first answers, in several ways."""

    target: ClassVar[str]
    losses: ClassVar[list[str]]
    keys: ClassVar[list[str]]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        names = ("Content-Type", "Idempotency-Key")
        self.keys.append(self.headers["Idempotency-Key"])
        answer = httpx.post(f"{self.target}{self.path}", content=body, headers={n: self.headers[n] for n in names})
        loss = self.losses.pop(0) if self.losses else ""
        if loss == "cut":
            self.close_connection = True
            return
        self.send_response(502 if loss == "502" else answer.status_code)
        content = b"<html>bad gateway</html>" if loss == "502" else answer.content
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def forgetful(service: Service) -> Iterator[str]:
    Forgetful.target, Forgetful.losses, Forgetful.keys = service.url, [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forgetful) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("losses", [["cut"], ["502", "cut"]])
async def test_a_lost_answer_makes_no_second_job(service: Service, forgetful: str, losses: list[str]) -> None:
    Forgetful.losses = list(losses)
    with Client(forgetful) as client:
        job = await asyncio.to_thread(client.submit, "a red fox", "image_fast")
    assert [listed["id"] for listed in service.http.get("/v1/jobs").json()["data"]] == [job.id]
    assert (len(Forgetful.keys), len(set(Forgetful.keys))) == (len(losses) + 1, 1)
    Forgetful.losses = list(losses)
    async with AsyncClient(forgetful) as client:
        other = await client.submit("a red fox", "image_fast")
    assert other.id != job.id
    assert count(service) == 2


async def test_the_tries_are_bounded(service: Service, forgetful: str) -> None:
    Forgetful.losses = ["cut"] * 20
    async with AsyncClient(forgetful) as client:
        with pytest.raises(ServiceUnreachable):
            await client.submit("a red fox", "image_fast")
    assert len(Forgetful.keys) == 4


async def test_the_clients_own_key(service: Service) -> None:
    with Client(service.url) as client:
        job = client.submit("a red fox", "image_fast", idempotency_key="mine")
        assert client.submit("a red fox", "image_fast", idempotency_key="mine").id == job.id
        with pytest.raises(IdempotencyConflict):
            client.submit("a blue fox", "image_fast", idempotency_key="mine")
        assert client.submit("a red fox", "image_fast").id != job.id


async def test_a_full_queue_is_not_tried_again(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with serving(valkey.url, tmp_path, max_queued_jobs=1) as service, Client(service.url) as client:
        client.submit("a red fox")
        with pytest.raises(QueueFull):
            client.submit("a red fox")
