"""Webhooks from a job's end to its receiver: a real store, real connections, receivers of every character."""

import asyncio
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpcore
import pytest
import trustme
from pydantic import SecretStr

from serve_app.client import Client
from serve_app.errors import InvalidValue
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import Job, JobStatus, Webhook, WebhookState
from serve_app.jobs.store import JobStore
from serve_app.webhooks.deliver import Deliverer
from serve_app.webhooks.loop import Courier
from serve_app.webhooks.network import PublicNetwork, Resolve, Resolver
from tests.factories import make_job
from tests.receiver import SECRET, answer, endless, receiving, silence
from tests.service import Service, claim, serving

SECRETS = {"anonymous": SecretStr(SECRET)}
QUICK = (0.05, 0.05, 0.05)
PUBLIC = "93.184.215.14"


def resolving(*answers: Sequence[str]) -> tuple[Resolve, list[str]]:
    """A fake resolver that gives one answer after the other, the last again and again; and the names it was asked for."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolve, asked


class Unplugged(httpcore.AsyncNetworkBackend):
    """A fake network that notes whom it was to connect to and reaches nobody."""

    def __init__(self) -> None:
        self.dialled: list[str] = []

    async def connect_tcp(self, host: str, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        self.dialled.append(host)
        raise httpcore.ConnectError("unplugged")


def deliverer(*, allow_private: bool = True, resolve: Resolve | None = None, **given: Any) -> Deliverer:
    dial, given = given.get("dial"), {name: value for name, value in given.items() if name != "dial"}
    return Deliverer(SECRETS, PublicNetwork(resolve or Resolver(4), allow_private=allow_private, dial=dial), **given)


@asynccontextmanager
async def delivering(store: JobStore, sender: Deliverer | None = None, **given: Any) -> AsyncIterator[Courier]:
    """A courier at work, as a conductor runs it."""
    courier = Courier(store, sender or deliverer(), **({"retry_in_s": QUICK} | given))

    async def forever() -> None:
        while True:
            await courier.turn()

    task = asyncio.create_task(forever())
    try:
        yield courier
    finally:
        while not task.done():
            task.cancel()  # again, because a store's client that is just connecting swallows a cancellation
            await asyncio.wait([task], timeout=0.2)
        await courier.close()
        if not task.cancelled():
            task.result()


async def submitted(store: JobStore, url: str) -> Job:
    job = make_job(webhook=Webhook(url=url))
    await store.submit(job, max_queued=1000)
    return job


async def ended(store: JobStore, url: str, status: JobStatus = JobStatus.SUCCEEDED) -> Job:
    """A job that ran and ended."""
    job = await submitted(store, url)
    _, lease = await claim(store)
    await store.finish(lease, status)
    return job


async def settled(store: JobStore, job: Job) -> Webhook:
    """The webhook's part of the record, once it is delivered or given up."""
    for _ in range(1000):
        webhook = (await store.get(job.id)).webhook
        assert webhook is not None
        if webhook.state != WebhookState.PENDING:
            return webhook
        await asyncio.sleep(0.01)
    raise AssertionError(f"still pending: {webhook}")


async def attempted(store: JobStore, job: Job, attempts: int = 1) -> Webhook:
    """The webhook's part of the record, once so many attempts are written down."""
    for _ in range(1000):
        webhook = (await store.get(job.id)).webhook
        assert webhook is not None
        if webhook.attempts >= attempts:
            return webhook
        await asyncio.sleep(0.01)
    raise AssertionError(f"no attempt {attempts}: {webhook}")


async def outbox(store: JobStore) -> list[bytes]:
    return [key async for key in store._redis.scan_iter(f"{store._prefix}:outbox*")]


# ---- what a receiver gets -------------------------------------------------------------------------------------------


async def test_the_end_of_a_job_is_delivered_signed(store: JobStore) -> None:
    async with receiving() as receiver, delivering(store):
        job = await ended(store, receiver.url)
        assert await settled(store, job) == Webhook(url=receiver.url, state=WebhookState.DELIVERED, attempts=1)
    (request,) = receiver.requests
    payload = request.verified()
    assert request.line == "POST /hook HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == f"msg_{job.id}"
    assert (payload["type"], payload["timestamp"]) == ("job.succeeded", payload["data"]["finished_at"])
    assert (payload["data"]["id"], payload["data"]["prompt"]) == (job.id, job.spec.prompt)
    assert "webhook" not in payload["data"]
    assert await outbox(store) == []


async def test_every_kind_of_end_is_told(store: JobStore) -> None:
    async with receiving() as receiver:
        failed = await ended(store, receiver.url, JobStatus.FAILED)
        queued = await submitted(store, receiver.url)
        await store.cancel(queued.id)
        running = await submitted(store, receiver.url)
        _, lease = await claim(store)
        await store.heartbeat([lease], lease_s=0.01)
        await store.cancel(running.id)
        await asyncio.sleep(0.05)
        await store.reap()
        async with delivering(store):
            for job in (failed, queued, running):
                await settled(store, job)
    told = {request.verified()["data"]["id"]: request.verified()["type"] for request in receiver.requests}
    assert told == {failed.id: "job.failed", queued.id: "job.cancelled", running.id: "job.cancelled"}


async def test_nothing_is_told_before_the_end(store: JobStore) -> None:
    async with receiving() as receiver, delivering(store):
        job = await submitted(store, receiver.url)
        _, lease = await claim(store)
        await store.requeue(lease, "its replica died")
        assert await outbox(store) == []
        await store.cancel(job.id)
        await settled(store, job)
    assert len(receiver.requests) == 1


async def test_a_receiver_that_recovers_gets_it_once_under_one_id(store: JobStore) -> None:
    async with receiving(answer(500), answer(503), answer(200)) as receiver, delivering(store):
        job = await ended(store, receiver.url)
        webhook = await settled(store, job)
        await asyncio.sleep(0.2)
    assert (webhook.state, webhook.attempts, webhook.last_error) == (WebhookState.DELIVERED, 3, None)
    assert len(receiver.requests) == 3
    assert {request.headers["webhook-id"] for request in receiver.requests} == {f"msg_{job.id}"}
    assert len({request.body for request in receiver.requests}) == 1
    assert all(request.verified() for request in receiver.requests)


async def test_a_receiver_that_never_recovers_is_given_up(store: JobStore) -> None:
    async with receiving(answer(500)) as receiver, delivering(store):
        webhook = await settled(store, await ended(store, receiver.url))
    assert (webhook.state, webhook.attempts, webhook.last_error) == (WebhookState.FAILED, 1 + len(QUICK), "HTTP 500")
    assert len(receiver.requests) == 1 + len(QUICK)
    assert await outbox(store) == []


async def test_gone_is_final(store: JobStore) -> None:
    async with receiving(answer(410)) as receiver, delivering(store):
        webhook = await settled(store, await ended(store, receiver.url))
    assert (webhook.state, webhook.attempts, webhook.last_error) == (WebhookState.FAILED, 1, "HTTP 410")


@pytest.mark.parametrize(
    ("asked", "least_s", "most_s"),
    [("600", 500, 700), ("Fri, 01 Jan 2100 00:00:00 GMT", 38000, 48000), ("9" * 30, 38000, 48000), ("soon", 2, 7)],
)
async def test_retry_after_is_honoured_up_to_a_bound(
    store: JobStore, asked: str, least_s: float, most_s: float
) -> None:
    async with receiving(answer(429, f"Retry-After: {asked}")) as receiver:
        job = await ended(store, receiver.url)
        async with delivering(store, retry_in_s=(5.0,)):
            await attempted(store, job)
        seconds, _ = await store._redis.time()
        due = await store._redis.zscore(f"{store._prefix}:outbox", receiver.url.split("/")[2])
    assert least_s <= due - seconds <= most_s


# ---- receivers that do harm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (silence, "no answer within 0.3 s"),
        (endless(b"", b"H", 0.02), "no answer within 0.3 s"),
        (endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000), "the head of the answer is over 65536 bytes"),
        (endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 100), "the head of the answer is over 65536 bytes"),
        (endless(b"not HTTP at all\r\n\r\n", b"x"), "RemoteProtocolError"),
        (answer(302, "Location: http://169.254.169.254/latest/meta-data"), "HTTP 302"),
    ],
    ids=["silent", "slow drip", "endless headers", "endless interim answers", "another protocol", "redirect inside"],
)  # fmt: skip
async def test_a_hostile_receiver_fails_and_the_next_is_served(store: JobStore, behaviour: Any, error: str) -> None:
    async with (
        receiving(behaviour) as hostile,
        receiving() as friendly,
        # Only who waits for the time limit gets a short one: a busy machine must not run into it.
        delivering(store, deliverer(timeout_s=0.3 if "0.3 s" in error else 10.0), retry_in_s=()),
    ):
        bad = await ended(store, hostile.url)
        good = await ended(store, friendly.url)
        assert (await settled(store, good)).state == WebhookState.DELIVERED
        webhook = await settled(store, bad)
    assert webhook.state == WebhookState.FAILED
    assert webhook.last_error is not None
    assert error in webhook.last_error


@pytest.mark.parametrize("pause_s", [0.0, 0.02], ids=["huge", "slow"])
async def test_a_body_is_left_unread(store: JobStore, pause_s: float) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"
    async with receiving(endless(head, b"x" * 65536, pause_s)) as receiver, delivering(store):
        webhook = await settled(store, await ended(store, receiver.url))
    assert (webhook.state, webhook.attempts) == (WebhookState.DELIVERED, 1)


async def test_redirects_are_not_followed(store: JobStore) -> None:
    async with (
        receiving() as inside,
        receiving(answer(307, f"Location: {inside.url}")) as receiver,
        delivering(store, retry_in_s=()),
    ):
        webhook = await settled(store, await ended(store, receiver.url))
    assert webhook.last_error == "HTTP 307"
    assert inside.connections == 0


async def test_nobody_listens(store: JobStore) -> None:
    async with receiving() as receiver:
        url = receiver.url
    async with delivering(store, retry_in_s=()):
        webhook = await settled(store, await ended(store, url))
    assert webhook.last_error is not None
    assert "ConnectError" in webhook.last_error


async def test_a_dead_receiver_with_many_jobs_holds_up_no_other_and_no_job(store: JobStore) -> None:
    async with receiving(silence) as dead, receiving() as alive:
        for _ in range(50):
            await ended(store, dead.url)
        async with delivering(store, deliverer(timeout_s=30)):
            await dead.heard(2)
            for _ in range(3):
                assert (await settled(store, await ended(store, alive.url))).state == WebhookState.DELIVERED
            last = await ended(store, dead.url)
            assert (await store.get(last.id)).status == JobStatus.SUCCEEDED
    assert dead.most_open == dead.connections == 2


# ---- private addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0.0.0.0", "[::ffff:127.0.0.1]"])
async def test_a_url_that_leads_inside_is_refused_at_the_connection_too(store: JobStore, host: str) -> None:
    async with receiving() as receiver:
        job = await ended(store, f"http://{host}:{receiver.port}/hook")
        async with delivering(store, deliverer(allow_private=False), retry_in_s=()):
            webhook = await settled(store, job)
    assert receiver.connections == 0
    assert webhook.last_error is not None
    assert webhook.last_error.endswith("does not resolve to a public address")


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1"], ["fe80::1%lo"], ["64:ff9b::7f00:1"]]
)
async def test_a_name_that_resolves_inside_is_refused_whole(store: JobStore, addresses: list[str]) -> None:
    network = Unplugged()
    sender = deliverer(allow_private=False, resolve=resolving(addresses)[0], dial=network)
    async with delivering(store, sender, retry_in_s=()):
        webhook = await settled(store, await ended(store, "https://hooks.example/"))
    assert network.dialled == []
    assert webhook.last_error == "hooks.example does not resolve to a public address"


async def test_a_name_that_changes_after_the_check_gains_nothing(store: JobStore) -> None:
    """The name is asked for once an attempt, and what was vetted is what is connected to."""
    resolve, asked = resolving([PUBLIC], ["127.0.0.1"])
    network = Unplugged()
    async with delivering(store, deliverer(allow_private=False, resolve=resolve, dial=network), retry_in_s=(0.05,)):
        job = await ended(store, "https://rebinding.example/")
        assert (await attempted(store, job)).last_error == "ConnectError: unplugged"
        assert (await settled(store, job)).last_error == "rebinding.example does not resolve to a public address"
    assert network.dialled == [PUBLIC]
    assert asked == ["rebinding.example"] * 2


async def test_an_unknown_name_sounds_like_a_private_one(store: JobStore) -> None:
    async with delivering(store, retry_in_s=()):
        webhook = await settled(store, await ended(store, "https://no-such-name.invalid/"))
    assert webhook.last_error == "no-such-name.invalid does not resolve to a public address"


async def test_the_next_address_is_tried(store: JobStore) -> None:
    resolve, _ = resolving(["::1", "127.0.0.1"])
    async with receiving() as receiver, delivering(store, deliverer(resolve=resolve)):
        job = await ended(store, f"http://hooks.example:{receiver.port}/")
        assert (await settled(store, job)).attempts == 1
    assert receiver.requests[0].headers["host"] == f"hooks.example:{receiver.port}"


async def test_the_certificate_must_be_the_name_s(store: JobStore) -> None:
    authority = trustme.CA()
    theirs, ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("hooks.example").configure_cert(theirs)
    authority.configure_trust(ours)
    sender = deliverer(resolve=resolving(["127.0.0.1"])[0], tls=ours)
    async with receiving(tls=theirs) as receiver, delivering(store, sender, retry_in_s=()):
        right = await ended(store, f"https://hooks.example:{receiver.port}/")
        wrong = await ended(store, f"https://other.example:{receiver.port}/")
        assert (await settled(store, right)).state == WebhookState.DELIVERED
        error = (await settled(store, wrong)).last_error
    assert error is not None
    assert "certificate verify failed: Hostname mismatch" in error
    assert len(receiver.requests) == 1
    receiver.requests[0].verified()


# ---- when things die ------------------------------------------------------------------------------------------------


async def test_each_attempt_has_one_sender(store: JobStore) -> None:
    for n in range(20):
        await ended(store, f"http://receiver-{n}/")
    takes = await asyncio.gather(*(store.take_webhooks(limit=5, lease_s=60) for _ in range(8)))
    taken = [delivery.job.id for take in takes for delivery in take]
    assert len(taken) == len(set(taken)) == 20


async def test_a_sender_that_wakes_up_late_writes_nothing(store: JobStore) -> None:
    job = await ended(store, "http://receiver/")
    (late,) = await store.take_webhooks(limit=5, lease_s=0.05)
    assert await store.take_webhooks(limit=5, lease_s=0.05) == []
    await asyncio.sleep(0.1)
    (second,) = await store.take_webhooks(limit=5, lease_s=60)
    assert late.lease != second.lease
    failed = late.webhook.model_copy(update={"state": WebhookState.FAILED})
    assert not await store.settle_webhook(late, failed, retry_in_s=None)
    assert (await store.get(job.id)).webhook == job.webhook
    assert await store.settle_webhook(second, failed, retry_in_s=None)
    assert (await store.get(job.id)).webhook == failed


async def test_a_job_that_is_gone_is_told_to_nobody(store: JobStore) -> None:
    deleted = await ended(store, "http://receiver/")
    await store.delete(deleted.id)
    assert await outbox(store) == []
    vanished = await ended(store, "http://receiver/")
    await store._redis.unlink(f"{store._prefix}:job:{vanished.id}")
    assert await store.take_webhooks(limit=5, lease_s=60) == []
    assert await outbox(store) == []
    meanwhile = await ended(store, "http://receiver/")
    (delivery,) = await store.take_webhooks(limit=5, lease_s=60)
    await store.delete(meanwhile.id)
    assert not await store.settle_webhook(delivery, delivery.webhook, retry_in_s=1.0)
    assert await outbox(store) == []


async def test_nothing_is_lost_with_the_store(short_dir: Path) -> None:
    """SIGKILL the server after a job's end, start another over the same folder: the webhook is still delivered."""
    folder = short_dir / "webhooks"
    server = EmbeddedStore(folder)
    store = JobStore(server.url)
    async with receiving() as receiver:
        job = await ended(store, receiver.url)
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        await store.close()
        server = EmbeddedStore(folder)
        store = JobStore(server.url)
        try:
            async with delivering(store):
                assert (await settled(store, job)).state == WebhookState.DELIVERED
        finally:
            await store.close()
            server.stop()


SENDER = """
import asyncio, sys
from pydantic import SecretStr
from serve_app.jobs.store import JobStore
from serve_app.webhooks.deliver import Deliverer
from serve_app.webhooks.loop import Courier
from serve_app.webhooks.network import PublicNetwork, Resolver

async def main(url, prefix, secret):
    deliverer = Deliverer({"anonymous": SecretStr(secret)}, PublicNetwork(Resolver(1), allow_private=True))
    courier = Courier(JobStore(url, prefix=prefix), deliverer, lease_s=1.0)
    while True:
        await courier.turn()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_sender_s_delivery_is_made_again_under_the_same_id(
    store: JobStore, valkey: EmbeddedStore
) -> None:
    """SIGKILL a real sender after the receiver has its request and before it can write that down."""
    async with receiving(silence, answer(200)) as receiver:
        job = await ended(store, receiver.url)
        arguments = [sys.executable, "-c", SENDER, valkey.url, store._prefix.strip("{}"), SECRET]
        sender = subprocess.Popen(arguments)  # noqa: ASYNC220 (takes no time)
        try:
            await receiver.heard(1)
        finally:
            sender.kill()
            sender.wait()
        async with delivering(store):
            webhook = await settled(store, job)
    assert (webhook.state, webhook.attempts) == (WebhookState.DELIVERED, 1)
    first, second = receiver.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == f"msg_{job.id}"


# ---- over HTTP ------------------------------------------------------------------------------------------------------

OWNERS: dict[str, Any] = {"api_keys": {"alice": "key-a", "bob": "key-b"}, "webhook_secrets": {"alice": SECRET}}


@pytest.fixture(scope="module")
def service(valkey: EmbeddedStore, short_dir: Path) -> Iterator[Service]:
    with serving(valkey.url, short_dir / "webhooks-http", **OWNERS) as service:
        yield service


def test_a_job_shows_its_webhook(service: Service) -> None:
    with Client(service.url, "key-a") as alice:
        job = alice.submit("a red fox", "image_fast", webhook_url="https://Hooks.example.com/wan")
        assert job.webhook == Webhook(url="https://hooks.example.com/wan")
        assert alice.get(job.id).webhook == job.webhook
        assert alice.submit("a red fox", "image_fast").webhook is None


def test_a_webhook_needs_a_secret(service: Service) -> None:
    with Client(service.url, "key-b") as bob, pytest.raises(InvalidValue, match="not enabled for bob") as refused:
        bob.submit("a red fox", "image_fast", webhook_url="https://hooks.example.com/wan")
    assert refused.value.param == "webhook_url"
    assert "webhook_secrets" in refused.value.hint


@pytest.mark.parametrize("url", ["https://169.254.169.254/", "http://hooks.example.com/", "https://localhost/", "x"])
async def test_a_webhook_that_leads_inside_is_refused_at_once(service: Service, url: str) -> None:
    async with service.connected() as connected:
        await connected.empty()
        with Client(service.url, "key-a") as alice, pytest.raises(InvalidValue) as refused:
            alice.submit("a red fox", "image_fast", webhook_url=url)
        assert refused.value.param == "webhook_url"
        assert await connected.left_behind() == []
