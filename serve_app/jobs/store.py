"""The JobStore: every job's record, queue, lease and events, on the Redis protocol (Redis 7+ or Valkey).

Each move of a job is one server-side function (store.lua), so a reader never sees half of one. A conductor's writes
carry its fencing token and raise `LeaseLost` once another holds the job.

Keys, after the prefix: `job:{id}` hash of JSON fields · `events:{id}` stream · `queue:{model}`, `late:{model}` sorted sets
of waiting jobs by deadline, `latest_start:{model}` of those that can still be on time · `models` that have any · `leases`
by end of lease · `finished`, `unsettled` by time of the end (retention.py empties them) · sorted sets of ids
`index:{owner}:{status|*}:{type|*}` · `once:{owner}:{hash}` what an idempotency key stands for, expires · `lock:{name}`,
`watched:{id}` expire · `identity` · `replicas`, `replica_reports` ·
`scaler:{model}` expires, `scaling:{model}` stream · `fencing_token` counter · `outbox` webhook receivers by when
their first delivery is due, `outbox:{receiver}` its job ids likewise.
Channels: `events`, `work`, `cancel`, `outbox` carry job ids.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, cast

from pydantic import BaseModel
from pydantic_core import to_json
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from serve_app.errors import (
    IdempotencyConflict,
    JobFinished,
    JobGone,
    JobNotFinished,
    JobNotFound,
    LeaseLost,
    QueueFull,
    StoreUnavailable,
)
from serve_app.jobs.job import FINAL_EVENTS, Job, JobEvent, JobStatus, Stage, Webhook
from serve_app.jobs.presets import DEFAULT_MODEL_NAME, JobType
from serve_app.jobs.replica import ReplicaReport
from serve_app.jobs.scaling import ScalingNote
from serve_app.scheduling.claim import Horizons, Outstanding

logger = logging.getLogger(__name__)

_LUA = files("serve_app.jobs").joinpath("store.lua").read_text()
VERSION = hashlib.sha256(_LUA.encode()).hexdigest()[:8]
"""Part of every function's name: during an upgrade each process calls its own, whatever else the server has loaded."""
LIBRARY = _LUA.replace("VERSION", VERSION)
REPLICA_TTL_S = 5.0
"""A generator replica that was silent for so long is not counted as live."""
REFUSALS = ("MISCONF", "OOM", "READONLY", "NOREPLICAS", "CLUSTERDOWN", "MASTERDOWN", "command not allowed")
"""How a server begins its answer when it could serve, but not now (redis.io, "RESP protocol: errors"; valkey server.c)."""
WATCHED_S = 15
"""How long after a follower's last sign previews are still made; it gives one every `RECHECK_S` at least."""
SCALING_NOTES = 1000
"""How many changes of a model's number of replicas are remembered."""
RECHECK_S = 5.0
"""How often a follower looks at a stream without being told to, in case a notification was lost with a connection."""


@dataclass(frozen=True)
class Lease:
    """The right to drive one job."""

    job_id: str
    token: int


@dataclass(frozen=True)
class Once:
    """What makes a request be done once: sent again under the same name it gets the first one's job.

    `name` must begin with its owner's and holds for `ttl_s` seconds. `fingerprint` is a hash, without spaces, of all that
    the request says: the same name with another one is a conflict.
    """

    name: str
    fingerprint: str
    ttl_s: int

    @property
    def arguments(self) -> tuple[str, str, int]:
        """As the store's functions take it."""
        return self.name, self.fingerprint, self.ttl_s


ALWAYS_ANEW = Once("", "", 0)


@dataclass(frozen=True)
class Answer:
    """The job that a request made or changed, and whether an earlier one of the same name did."""

    job: Job
    replayed: bool


@dataclass(frozen=True)
class EndedJob:
    """A finished job whose leftovers are still there."""

    id: str
    status: JobStatus
    fencing_token: int
    superseded: bool
    """Whether it was claimed more than once, so that files of earlier attempts may lie around."""


@dataclass(frozen=True)
class JobWork:
    """The work of a queued or running job. `estimated_gpu_s` is on its model's reference card, over all of its `clips`."""

    id: str
    model: str
    clips: int
    deadline: float
    estimated_gpu_s: float
    stage: Stage | None
    clips_to_make: int
    """Of its clips, those that are not made yet."""

    def outstanding(self, clips: int | None = None) -> list[Outstanding]:
        """So many of its clips, by default all, which run side by side, each with its share of the work."""
        each = Outstanding(self.deadline, self.estimated_gpu_s / self.clips)
        return [each] * (self.clips if clips is None else clips)


@dataclass(frozen=True)
class Delivery:
    """The right to make one attempt at a job's webhook, for a while."""

    job: Job
    webhook: Webhook
    receiver: str
    """Host and port of its URL."""
    lease: str


def _encode(fields: dict[str, Any]) -> list[Any]:
    """Flat field, JSON, field, JSON list."""
    return [part for name, value in fields.items() for part in (name, to_json(value))]


def _fields(model: BaseModel) -> dict[str, Any]:
    return {name: getattr(model, name) for name in type(model).model_fields}


def _job(flat: Sequence[bytes] | dict[bytes, bytes]) -> Job:
    pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
    return Job.model_validate({name.decode(): json.loads(text) for name, text in pairs if not name.endswith(b"_")})


class JobStore:
    """The one place that knows about jobs. Every method may raise `StoreUnavailable`.

    One instance a process; it keeps a pool of connections and, while somebody follows events, one subscription.
    `timeout_s` bounds one round trip: there are no hidden retries, callers own that policy.
    """

    def __init__(self, url: str, *, prefix: str = "wan", timeout_s: float = 5.0) -> None:
        # A pool that waits: a burst of requests queues for a connection instead of failing.
        pool = BlockingConnectionPool.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=64,
            timeout=timeout_s,
        )
        self._redis = Redis.from_pool(pool)
        self._prefix = f"{{{prefix}}}"
        self._listeners: dict[tuple[str, str | None], set[asyncio.Event]] = defaultdict(set)
        self._listening: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Close every connection."""
        while self._listening is not None and not self._listening.done():
            self._listening.cancel()  # again, because a client that is just connecting swallows a cancellation
            await asyncio.wait([self._listening], timeout=0.2)
        await self._redis.aclose()

    # ---- users ------------------------------------------------------------------------------------------------------

    async def submit(self, job: Job, *, max_queued: int, once: Once = ALWAYS_ANEW) -> Answer:
        """Put a new job on disk and in the queue, or find the one that the same request made before.

        Raises `QueueFull` when `max_queued` jobs wait already; `IdempotencyConflict` and `JobGone` as `once` has it.
        """
        event = to_json({"status": job.status})
        answer = await self._call(
            "submit", job.id, job.owner, job.spec.type.value, job.spec.model, len(job.spec.clips),
            max_queued, event, *once.arguments, *_encode(_fields(job)),
        )  # fmt: skip
        match answer:
            case b"ok":
                return Answer(job, replayed=False)
            case b"full":
                raise QueueFull(
                    f"{max_queued} jobs are queued already",
                    hint="Wait for as long as Retry-After says and send it again.",
                )
            case b"conflict":
                raise _conflict()
        return await self._first_answer(answer.decode())

    async def get(self, job_id: str) -> Job:
        """A job's record. Raises `JobNotFound`."""
        found = await self._guard(self._redis.hgetall(self._key("job", job_id)))
        if not found:
            raise _not_found(job_id)
        return _job(found)

    async def page(
        self, *, owner: str, status: JobStatus | None = None, type: JobType | None = None,
        before: str | None = None, limit: int = 20,
    ) -> list[Job]:  # fmt: skip
        """An owner's jobs, newest first; `before` is the id of the last job of the page before."""
        key = self._key("index", owner, status.value if status else "*", type.value if type else "*")
        newest = f"({before}" if before else "+"
        ids = await self._guard(self._redis.zrevrangebylex(key, newest, "-", start=0, num=limit))
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(self._key("job", job_id.decode()))
            records = await self._guard(pipe.execute())
        return [_job(record) for record in records if record]

    async def cancel(self, job_id: str, *, once: Once = ALWAYS_ANEW) -> Answer:
        """Cancel a queued job at once, or ask for a running one's end. Raises `JobNotFound`, `JobFinished`.

        Also `IdempotencyConflict` and `JobGone`, as `once` has it.
        """
        answer = await self._call("cancel", job_id, *once.arguments)
        match answer:
            case b"missing":
                raise _not_found(job_id)
            case b"conflict":
                raise _conflict()
            case b"again":
                return await self._first_answer(job_id)
        job = await self.get(job_id)
        if answer == b"finished":
            raise JobFinished(f"job {job_id} has {job.status.value} already, so there is nothing to cancel")
        return Answer(job, replayed=False)

    async def delete(self, job_id: str) -> None:
        """Remove a finished job's record and events. Raises `JobNotFound`, `JobNotFinished`."""
        answer = await self._call("delete", job_id)
        if answer == b"missing":
            raise _not_found(job_id)
        if answer == b"active":
            raise JobNotFinished(
                f"job {job_id} is not finished", hint=f"Cancel it first: POST /v1/jobs/{job_id}/cancel."
            )

    async def follow(self, job_id: str, after: str = "0", *, previews: bool = False) -> AsyncIterator[JobEvent]:
        """Events after the one with id `after`: those that were, then those to come, until the final one.

        With `previews`, also pictures of the work under way, which are made only while somebody follows so.

        Raises `JobNotFound` where there is no such job at the start; ends when the job is deleted meanwhile.
        """
        await self.get(job_id)
        key = self._key("events", job_id)
        with self._listen("events", job_id) as changed:
            while True:
                changed.clear()
                if previews:
                    await self._guard(self._redis.set(self._key("watched", job_id), 1, ex=WATCHED_S))
                page = await self._guard(self._redis.xrange(key, min=f"({after}", count=500))
                for event_id, fields in page:
                    after = event_id.decode()
                    event = JobEvent(id=after, name=fields[b"name"].decode(), data=json.loads(fields[b"data"]))
                    if event.name == "preview" and not previews:
                        continue
                    yield event
                    if event.name in FINAL_EVENTS:
                        return
                if not page:
                    if await self._ended_before(job_id, after):
                        return
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), RECHECK_S)

    async def ping(self) -> None:
        """Raise `StoreUnavailable` unless the server answers."""
        await self._guard(self._redis.ping())

    async def queue_length(self) -> int:
        """Jobs that wait."""
        return sum((await self.queue_lengths()).values())

    async def queue_lengths(self) -> dict[str, int]:
        """Jobs that wait, by model; of every model that has any."""
        rows = await self._call("queue_lengths")
        return {model.decode(): count for model, count in zip(rows[::2], rows[1::2], strict=True)}

    # ---- conductors -------------------------------------------------------------------------------------------------

    async def claim(self, *, model: str = DEFAULT_MODEL_NAME, horizons: Horizons, lease_s: float) -> Job | None:
        """Take the model's queued job with the earliest deadline within `horizons`; a late one only where no other may be
        taken."""
        flat = await self._call("claim", model, _score(horizons.on_time), _score(horizons.late), lease_s)
        return _job(flat) if flat else None

    async def heartbeat(self, leases: Sequence[Lease], *, lease_s: float) -> Sequence[str]:
        """Renew leases; for each `ok`, `cancel` (renewed, but its user wants it stopped) or `lost`."""
        return await self._about("heartbeat", leases, lease_s)

    async def standings(self, leases: Sequence[Lease]) -> Sequence[str]:
        """For each lease `ok`, `cancel` or `lost`, without renewing any: what a replica asks about the clips it holds."""
        return await self._about("standings", leases)

    async def write(
        self, lease: Lease, event: str | None = None, data: dict[str, Any] | None = None, **fields: Any
    ) -> None:
        """Set fields of the job's record and, with it, add an event. Raises `LeaseLost`."""
        answer = await self._call(
            "write", lease.job_id, lease.token, event or "", to_json(data or {}), *_encode(fields)
        )
        _held(answer, lease)

    async def note_clips_to_make(self, lease: Lease, clips: int) -> None:
        """Tell those who plan (`JobWork`) how many of the job's clips are still to be made. Raises `LeaseLost`."""
        await self.write(lease, clips_to_make_=clips)

    async def finish(self, lease: Lease, status: JobStatus, data: dict[str, Any] | None = None, **fields: Any) -> None:
        """End the job with `status` and its last fields; the final event is named after the status. Raises `LeaseLost`."""
        event = to_json({"status": status, **(data or {})})
        answer = await self._call("finish", lease.job_id, lease.token, status.value, event, *_encode(fields))
        _held(answer, lease)

    async def requeue(self, lease: Lease, reason: str) -> None:
        """Give the job back to the queue, at its old place; the attempt does not count. Raises `LeaseLost`."""
        answer = await self._call("requeue", lease.job_id, lease.token, reason)
        _held(answer, lease)

    async def reap(self) -> Iterable[str]:
        """Queue the jobs again whose lease ran out; their ids."""
        return [job_id.decode() for job_id in await self._call("reap", "its conductor fell silent")]

    async def running(self) -> Sequence[JobWork]:
        """Every job under a lease."""
        return _work(await self._call("running"))

    async def queued(self, model: str, *, limit: int) -> tuple[int, Sequence[JobWork]]:
        """How many of the model's jobs wait, and the first `limit` of them: late ones, then others, by deadline."""
        count, flat = await self._call("queued", model, limit)
        return count, _work(flat)

    async def wait(self, channel: str, timeout_s: float) -> None:
        """Return when something is said on `channel` (`work`, `cancel`, `outbox`), or after `timeout_s`."""
        with self._listen(channel, None) as changed, contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), timeout_s)

    # ---- retention --------------------------------------------------------------------------------------------------

    async def hold(self, lock: str, holder: str, *, for_s: float, shared: bool = False) -> bool:
        """Take or renew a lock that is free again once its holder was silent for so long; whether `holder` has it.

        Shared, it is had beside other sharers. Who asks for it alone keeps further sharers out from then on, and has it
        when the last one has let go: until then it asks again and again, and releases it where it gives up.
        """
        return bool(await self._call("hold", lock, holder, for_s, int(shared)))

    async def release(self, lock: str, holder: str) -> None:
        """Give a lock back at once, if `holder` still has it."""
        await self._call("release", lock, holder)

    async def identity(self) -> str:
        """Name of this store, drawn when it was first asked for: a store that was emptied has another."""
        key = self._key("identity")
        await self._guard(self._redis.set(key, secrets.token_hex(8), nx=True))
        return cast(bytes, await self._guard(self._redis.get(key))).decode()

    async def expired(self, *, retention_s: float | None, most: int, skip: int, limit: int) -> list[str]:
        """Finished jobs, oldest first without the first `skip`, that ended over `retention_s` ago (None: never expires)
        or are too many: only the last `most` are kept."""
        kept_s = "inf" if retention_s is None else retention_s
        return [job_id.decode() for job_id in await self._call("expired", kept_s, most, skip, limit)]

    async def unsettled(self, *, age_s: float, skip: int, limit: int) -> list[EndedJob]:
        """Jobs that ended over `age_s` ago and were not settled yet, oldest first without the first `skip`."""
        flat = await self._call("unsettled", age_s, skip, limit)
        return [
            EndedJob(flat[n].decode(), JobStatus(json.loads(flat[n + 1])), int(flat[n + 2]), flat[n + 3] == b"1")
            for n in range(0, len(flat), 4)
        ]

    async def settle(self, job_id: str) -> None:
        """Drop the progress events of a finished job and keep its story."""
        await self._call("settle", job_id)

    async def statuses(self, job_ids: Sequence[str]) -> dict[str, JobStatus | None]:
        """The status of each job; None for an unknown one."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(self._key("job", job_id), "status")
            found = await self._guard(pipe.execute())
        return {
            job_id: JobStatus(json.loads(text)) if text else None for job_id, text in zip(job_ids, found, strict=True)
        }

    async def history(self) -> AsyncIterator[Job]:
        """The finished jobs that are still remembered, in order of their end."""
        first = 0
        while ids := await self._guard(self._redis.zrange(self._key("finished"), first, first + 499)):
            first += len(ids)
            async with self._redis.pipeline(transaction=False) as pipe:
                for job_id in ids:
                    pipe.hgetall(self._key("job", job_id.decode()))
                records = await self._guard(pipe.execute())
            for record in filter(None, records):
                yield _job(record)

    # ---- generators -------------------------------------------------------------------------------------------------

    async def report_replica(self, report: ReplicaReport) -> None:
        """Say that a generator replica is alive and what it holds; good for `REPLICA_TTL_S`."""
        await self._call("report_replica", report.id, REPLICA_TTL_S, report.model_dump_json())

    async def watched(self, job_ids: Sequence[str]) -> Sequence[bool]:
        """For each job, whether somebody wants previews of it now."""
        if not job_ids:
            return []
        found = await self._guard(self._redis.mget([self._key("watched", job_id) for job_id in job_ids]))
        return [value is not None for value in found]

    async def replicas(self) -> Sequence[ReplicaReport]:
        """The generator replicas that are alive."""
        return [ReplicaReport.model_validate_json(text) for text in await self._call("live_replicas")]

    # ---- autoscaling ------------------------------------------------------------------------------------------------

    async def scaler_is_here(self, model: str, *, for_s: float) -> None:
        """Say that a policy decides on the model's replicas by this store, for the next seconds."""
        await self._guard(self._redis.set(self._key("scaler", model), 1, px=math.ceil(for_s * 1000)))

    async def has_scaler(self, model: str) -> bool:
        """Whether a policy decides on the model's replicas by this store, so that none need be asked for by a request."""
        return bool(await self._guard(self._redis.exists(self._key("scaler", model))))

    async def note_scaling(self, model: str, note: ScalingNote) -> None:
        """Write down a change that was asked for; the last `SCALING_NOTES` are kept."""
        key = self._key("scaling", model)
        await self._guard(self._redis.xadd(key, {"note": note.model_dump_json()}, maxlen=SCALING_NOTES))

    async def scaling_notes(self, model: str, *, limit: int = 100) -> list[ScalingNote]:
        """The last changes that were asked for, oldest first."""
        found = await self._guard(self._redis.xrevrange(self._key("scaling", model), count=limit))
        return [ScalingNote.model_validate_json(fields[b"note"]) for _, fields in reversed(found)]

    # ---- webhooks ---------------------------------------------------------------------------------------------------

    async def take_webhooks(self, *, limit: int, lease_s: float, busy: Iterable[str] = ()) -> list[Delivery]:
        """Deliveries that are due, the longest due first and one for each receiver at most, none to those in `busy`.

        Nobody else gets them within `lease_s`; after that they are due again, unless settled.
        """
        taken = []
        for receiver, lease, flat in await self._call("take_webhooks", limit, lease_s, *busy):
            job = _job(flat)
            assert job.webhook is not None
            taken.append(Delivery(job, job.webhook, receiver.decode(), lease.decode()))
        return taken

    async def settle_webhook(self, delivery: Delivery, webhook: Webhook, *, retry_in_s: float | None) -> bool:
        """Write down how an attempt went; due again in `retry_in_s`, or with None never. False: its lease was over."""
        again = "" if retry_in_s is None else retry_in_s
        answer = await self._call("settle_webhook", delivery.job.id, delivery.lease, again, to_json(webhook))
        return bool(answer == b"ok")

    # ---- plumbing ---------------------------------------------------------------------------------------------------

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    async def _guard(self, request: Any) -> Any:
        try:
            return await request
        except ResponseError as error:
            if not str(error).startswith(REFUSALS):
                raise
            raise StoreUnavailable(
                f"the job store refuses writes: {error}", hint="Its operator must make room or repair it; see its log."
            ) from error
        except (RedisError, OSError) as error:
            raise StoreUnavailable(
                f"the job store did not answer: {error}",
                hint="Try again in a few seconds; if it lasts, run `wan-serve doctor`.",
            ) from error

    async def _call(self, function: str, *arguments: Any) -> Any:
        try:
            return await self._guard(self._redis.fcall(f"wan_{VERSION}_{function}", 1, self._prefix, *arguments))
        except ResponseError as error:
            if "unction not found" not in str(error):
                raise
        await self._guard(self._redis.function_load(LIBRARY, replace=True))
        return await self._guard(self._redis.fcall(f"wan_{VERSION}_{function}", 1, self._prefix, *arguments))

    async def _about(self, function: str, leases: Sequence[Lease], *arguments: Any) -> Sequence[str]:
        if not leases:
            return []
        flat = [part for lease in leases for part in (lease.job_id, lease.token)]
        return [answer.decode() for answer in await self._call(function, *arguments, *flat)]

    async def _first_answer(self, job_id: str) -> Answer:
        try:
            return Answer(await self.get(job_id), replayed=True)
        except JobNotFound:
            raise JobGone(
                f"job {job_id}, which this Idempotency-Key made, has been deleted",
                param="Idempotency-Key",
                hint="Send a new key to have it made again.",
            ) from None

    async def _ended_before(self, job_id: str, after: str) -> bool:
        """Whether nothing can follow: the job is gone, or ended with events up to `after`."""
        status = await self._guard(self._redis.hget(self._key("job", job_id), "status"))
        if status is None or not JobStatus(json.loads(status)).is_final:
            return status is None
        last = await self._guard(self._redis.xrevrange(self._key("events", job_id), count=1))
        return not last or cast(bytes, last[0][0]).decode() == after

    @contextlib.contextmanager
    def _listen(self, channel: str, job_id: str | None) -> Any:
        """An asyncio event that is set when `channel` names the job (or, with None, says anything)."""
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._pump())
        event = asyncio.Event()
        self._listeners[channel, job_id].add(event)
        try:
            yield event
        finally:
            self._listeners[channel, job_id].discard(event)
            if not self._listeners[channel, job_id]:
                del self._listeners[channel, job_id]

    async def _pump(self) -> None:
        """Wake listeners as the server's channels speak, over one connection; wake all after a reconnection."""
        names = {self._key(channel): channel for channel in ("events", "work", "cancel", "outbox")}
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(*names)
                    for event in [event for events in self._listeners.values() for event in events]:
                        event.set()
                    while True:
                        message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=RECHECK_S)
                        if message is None:
                            continue
                        channel, job_id = names[message["channel"].decode()], message["data"].decode()
                        for key in ((channel, job_id), (channel, None)):
                            for event in self._listeners.get(key, ()):
                                event.set()
            except (RedisError, OSError) as error:
                logger.warning("lost the job store's notifications, reconnecting: %s", error)
                await asyncio.sleep(0.5)


def _work(flat: Sequence[bytes]) -> list[JobWork]:
    return [
        JobWork(
            flat[n].decode(),
            flat[n + 1].decode(),
            int(flat[n + 2]),
            float(flat[n + 3]),
            float(flat[n + 4]),
            Stage(stage) if (stage := json.loads(flat[n + 5])) else None,
            int(flat[n + 2] if flat[n + 6] is None else flat[n + 6]),
        )
        for n in range(0, len(flat), 7)
    ]


def _score(moment: float) -> str:
    """As the server reads it: `+inf`, `-inf` or the number."""
    return f"{moment:+}" if math.isinf(moment) else repr(moment)


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id!r}", hint="GET /v1/jobs lists yours.")


def _conflict() -> IdempotencyConflict:
    return IdempotencyConflict(
        "this Idempotency-Key was sent before with another request",
        param="Idempotency-Key",
        hint="Draw a new key for each new request; repeat a key only with the same body, to the same address.",
    )


def _held(answer: bytes, lease: Lease) -> None:
    if answer == b"lost":
        raise LeaseLost(f"job {lease.job_id} is no longer driven under fencing token {lease.token}")
