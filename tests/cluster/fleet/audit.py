"""After the storm: what became of every accepted job, read from the store, the artifact storage and over HTTP."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from serve_app.client import Client
from serve_app.errors import JobNotFound
from serve_app.jobs.job import FINAL_EVENTS, Job, JobEvent, JobStatus
from serve_app.jobs.receipt import RECEIPT_NAME
from serve_app.jobs.store import JobStore
from tests.cluster.fleet.fleet import Fleet
from tests.cluster.fleet.load import MIX, Accepted, Order
from tests.media_content import shown_sha256

Facts = dict[str, tuple[str, int | None]]
"""Of each picture and video of a job by name: SHA-256 of what it shows, frames. Each file's signature is its own."""


@dataclass
class Story:
    """A job's record and all its events."""

    job: Job
    events: list[JobEvent]


@dataclass
class Audit:
    """What was found. Lists hold a sentence for each finding; a service that keeps its promises leaves them empty."""

    accepted: int = 0
    succeeded: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    lost: list[str] = field(default_factory=list)
    """Accepted, and now unknown."""
    stuck: list[str] = field(default_factory=list)
    """Accepted, and never ended."""
    twice: list[str] = field(default_factory=list)
    """Ended more than once, or delivered other files than its record names under the token that counts."""
    mixed_up: list[str] = field(default_factory=list)
    """Files that are not those of the record, or not those that the same order gave in quiet."""
    missed: list[str] = field(default_factory=list)
    """Followers that missed an event or got one twice."""
    unasked: list[str] = field(default_factory=list)
    """Jobs that nobody got a 202 for: a submission that was sent again made two."""
    gpu_s: float = 0.0
    wasted_gpu_s: float = 0.0
    stories: list[Story] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Every broken promise."""
        return [*self.lost, *self.stuck, *self.twice, *self.mixed_up, *self.missed, *self.unasked]


def job_ids(fleet: Fleet) -> set[str]:
    """Every job that the store knows."""

    async def read() -> set[str]:
        store = JobStore(fleet.store.url)
        try:
            return await _all_ids(store)
        finally:
            await store.close()

    return asyncio.run(read())


def quiet_run(fleet: Fleet, tell: Callable[[str], None] = lambda _: None) -> dict[Order, Facts]:
    """The files of every order of the mix, made while nothing is killed."""
    facts = {}
    with Client(fleet.url) as client, httpx.Client(base_url=fleet.url, follow_redirects=True, timeout=60) as http:
        for n, order in enumerate(MIX, 1):
            tell(f"reference {n} of {len(MIX)}")
            job = client.wait(client.submit(**order.body).id)
            assert job.status == JobStatus.SUCCEEDED, job.error
            facts[order] = {
                a.name: (shown_sha256(http.get(f"/v1/jobs/{job.id}/artifacts/{a.name}").content), a.frames)
                for a in job.artifacts
                if a.name != RECEIPT_NAME
            }
    return facts


def settle(fleet: Fleet, *, patience_s: float) -> None:
    """Wait until every job has ended, or none has for `patience_s`."""

    async def unfinished(store: JobStore) -> int:
        return int(await store.queue_length()) + len(await store.running())

    async def wait() -> None:
        store = JobStore(fleet.store.url)
        left, since = await unfinished(store), time.monotonic()
        while left and time.monotonic() - since < patience_s:
            await asyncio.sleep(0.5)
            if (now := await unfinished(store)) < left:
                left, since = now, time.monotonic()
        await store.close()

    asyncio.run(wait())


def audit(fleet: Fleet, accepted: Sequence[Accepted], references: dict[Order, Facts], known: set[str]) -> Audit:
    """Look at every accepted job. `known`: jobs that are there besides, such as those of the quiet run."""
    found = Audit(accepted=len(accepted))
    stories, ids = asyncio.run(_read(fleet, accepted))
    found.unasked = [f"nobody got a 202 for job {id}" for id in sorted(ids - {one.id for one in accepted} - known)]
    with httpx.Client(base_url=fleet.url, follow_redirects=True, timeout=60) as http:
        for one, story in zip(accepted, stories, strict=True):
            answer = http.get(f"/v1/jobs/{one.id}")
            if story is None or answer.status_code != 200 or answer.json()["id"] != one.id:
                found.lost.append(f"job {one.id}: accepted, and now HTTP {answer.status_code}")
                continue
            found.stories.append(story)
            _judge(found, one, story)
            if story.job.status == JobStatus.SUCCEEDED:
                _compare_files(found, one, story.job, references[one.order], http)
                _look_into_storage(found, fleet, story.job)
    return found


async def _read(fleet: Fleet, accepted: Sequence[Accepted]) -> tuple[list[Story | None], set[str]]:
    store = JobStore(fleet.store.url)
    stories: list[Story | None] = []
    for one in accepted:
        try:
            stories.append(Story(await store.get(one.id), await _events(store, one.id)))
        except JobNotFound:
            stories.append(None)
    ids = await _all_ids(store)
    await store.close()
    return stories, ids


async def _all_ids(store: JobStore) -> set[str]:
    ids, before = set[str](), None
    while page := await store.page(owner="anonymous", before=before, limit=500):
        ids |= {job.id for job in page}
        before = page[-1].id
    return ids


async def _events(store: JobStore, job_id: str) -> list[JobEvent]:
    """The whole stream; `follow` would end at the first final event, and a second one is what is looked for."""
    rows = await store._redis.xrange(store._key("events", job_id))
    return [JobEvent(id=id.decode(), name=row[b"name"].decode(), data=json.loads(row[b"data"])) for id, row in rows]


def _judge(found: Audit, one: Accepted, story: Story) -> None:
    job, names = story.job, [event.name for event in story.events]
    if not job.status.is_final:
        found.stuck.append(
            f"job {job.id} is {job.status} in stage {job.stage}, attempts {job.attempts}: {job.failures}"
        )
        return
    found.succeeded += job.status == JobStatus.SUCCEEDED
    found.cancelled += job.status == JobStatus.CANCELLED
    if job.error:
        found.failed[job.error.code] += 1
    found.gpu_s += job.gpu_s
    found.wasted_gpu_s += job.wasted_gpu_s
    ends = [name for name in names if name in FINAL_EVENTS]
    if ends != [job.status.value] or names[-1] != job.status.value:
        found.twice.append(f"job {job.id} is {job.status} and its final events are {ends}, its last {names[-1]}")
    if one.seen != [event.id for event in story.events][: len(one.seen)] or (
        one.followed and len(one.seen) != len(story.events)
    ):
        found.missed.append(f"job {job.id}: its follower saw {len(one.seen)} of {len(story.events)} events, or others")


def _compare_files(found: Audit, one: Accepted, job: Job, reference: Facts, http: httpx.Client) -> None:
    """Record and delivered bytes must be the same, and show what the quiet run's show."""
    spec = job.spec
    if (spec.seed, spec.sample_steps, spec.video_length) != (
        one.order.seed,
        one.order.sample_steps,
        one.order.video_length,
    ):
        found.mixed_up.append(f"job {job.id} has another spec than was asked for: {spec}")
    facts: Facts = {}
    for artifact in job.artifacts:
        answer = http.get(f"/v1/jobs/{job.id}/artifacts/{artifact.name}")
        if answer.status_code != 200 or hashlib.sha256(answer.content).hexdigest() != artifact.sha256:
            found.mixed_up.append(
                f"job {job.id}: {artifact.name} (HTTP {answer.status_code}) is not what its record says"
            )
        elif artifact.name != RECEIPT_NAME:
            facts[artifact.name] = shown_sha256(answer.content), artifact.frames
    if facts != reference:
        found.mixed_up.append(f"job {job.id}: its files do not show what {one.order} showed in quiet")


def _look_into_storage(found: Audit, fleet: Fleet, job: Job) -> None:
    folder = f"{job.id}/{job.fencing_token}/"
    names = {key.removeprefix(folder) for key in fleet.storage.buckets["wan-serve"].objects if key.startswith(folder)}
    if names != {artifact.name for artifact in job.artifacts}:
        found.twice.append(f"job {job.id}: under the token that counts lie {sorted(names)}")
