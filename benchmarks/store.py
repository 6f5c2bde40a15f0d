"""How fast the JobStore is, how its claim grows with the queue, and whether HTTP takes 200 submissions a second.

    python -m benchmarks.store                 # a bundled Valkey server of its own, appendfsync always
    python -m benchmarks.store --quick         # half a minute, smaller everywhere
    python -m benchmarks.store --store-url redis://host:6379/0

Prints tables and writes `benchmarks/results/store.json` and `store.png`. Keys of its own prefix are removed at the end.
"""

import asyncio
import json
import multiprocessing
import os
import platform
import random
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import httpx
import matplotlib
import numpy as np
import typer
import uvicorn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve_app.api.admit import admit
from serve_app.api.app import create_app
from serve_app.api.schemas import JobRequest
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.job import Artifact, Job, JobStatus, new_job_id
from serve_app.jobs.job import Progress as Steps
from serve_app.jobs.presets import JobType
from serve_app.jobs.store import JobStore, Lease
from serve_app.scheduling.claim import ANY_DEADLINE
from serve_app.settings import Settings
from serve_app.storage.local import LocalStore

PROMPT = (
    "A red fox runs through fresh snow at dawn, side view, soft light, shallow depth of field, breath in the cold air"
)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    calls: int
    depths: tuple[int, ...]
    claims: int
    """Claims timed at each depth."""
    http_per_s: int
    http_s: int
    remembered: int
    """Jobs that the memory figures are taken over."""


FULL = Size(calls=4000, depths=(100, 1000, 10_000, 100_000), claims=2000, http_per_s=200, http_s=60, remembered=2000)
QUICK = Size(calls=400, depths=(100, 1000, 10_000), claims=300, http_per_s=200, http_s=5, remembered=300)


@dataclass(frozen=True)
class Timing:
    """Of one kind of call: how many a second, and milliseconds by quantile, seen by the caller."""

    what: str
    clients: int
    per_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class ClaimAt:
    """Claims at one length of the queue. `server_us`: median microseconds inside the server, without network and disk."""

    queued: int
    p50_ms: float
    p99_ms: float
    server_us: float


@dataclass(frozen=True)
class Submissions:
    """POST /v1/jobs at a fixed rate. Latency counts from the moment at which the request was due, so waiting counts too."""

    per_s: int
    seconds: float
    sent: int
    errors: dict[str, int]
    p50_ms: float
    p99_ms: float
    longest_ms: float
    late_start_p99_ms: float
    """How late the load generator itself was: part of the figures above."""


def a_job(settings: Settings, *, later_s: float = 0.0) -> Job:
    """A job of a random type, as the API makes it `later_s` from now."""
    return admit(JobRequest(type=random.choice(list(JobType)), prompt=PROMPT), "bench", settings, time.time() + later_s)


# ---- rates ----------------------------------------------------------------------------------------------------------


async def timed(
    what: str, clients: int, calls: Sequence[Callable[[], Awaitable[Any]]], tick: Callable[[], None]
) -> Timing:
    """Make all `calls` from so many concurrent callers."""
    seconds: list[float] = []
    waiting = iter(calls)

    async def caller() -> None:
        for call in waiting:
            began = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - began)
            tick()

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(clients)))
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
    return Timing(what, clients, len(calls) / (time.perf_counter() - began), float(p50), float(p99))


async def rates(
    store: JobStore, settings: Settings, size: Size, bar: Callable[[str, int], Callable[[], None]]
) -> list[Timing]:
    """The life of `size.calls` jobs, one kind of call after the other, by one caller and by 16."""
    found = []
    for clients in (1, 16):
        n = size.calls if clients > 1 else size.calls // 4
        jobs = [a_job(settings) for _ in range(n)]
        tick = bar(f"rates, {clients} at once", 5 * n)
        leases: list[Lease] = []

        async def claim(leases: list[Lease] = leases) -> None:
            job = await store.claim(horizons=ANY_DEADLINE, lease_s=600)
            assert job is not None
            leases.append(Lease(job.id, job.fencing_token))

        def write(lease: Lease, step: int) -> Callable[[], Awaitable[None]]:
            progress = Steps(step=step % 40, steps=40, eta_s=1.5)
            return lambda: store.write(lease, "progress", progress.model_dump(), progress=progress)

        submits = [lambda job=job: store.submit(job, max_queued=10**9) for job in jobs]
        found.append(await timed("submit", clients, submits, tick))
        found.append(await timed("claim", clients, [claim] * n, tick))
        beats = [lambda lease=lease: store.heartbeat([lease], lease_s=600) for lease in leases]
        found.append(await timed("heartbeat", clients, beats, tick))
        found.append(await timed("event", clients, [write(lease, step) for step, lease in enumerate(leases)], tick))
        ends = [lambda lease=lease: store.finish(lease, JobStatus.SUCCEEDED) for lease in leases]
        found.append(await timed("finish", clients, ends, tick))
        for lease in leases:
            await store.delete(lease.job_id)
    return found


# ---- claims by length of the queue ----------------------------------------------------------------------------------


async def server_us(store: JobStore) -> float:
    """Microseconds that the server has spent in functions so far."""
    return float((await store._redis.info("commandstats"))["cmdstat_fcall"]["usec"])


async def growth(
    store: JobStore, settings: Settings, size: Size, bar: Callable[[str, int], Callable[[], None]]
) -> list[ClaimAt]:
    """Time a claim while the queue holds at each depth: each claimed job ends and is replaced, untimed."""
    day_s = 86_400.0  # deadlines that none of the jobs misses while the queue is filled
    found, queued = [], 0
    for depth in size.depths:
        tick = bar(f"queueing up to {depth:,}", depth - queued)
        more = [a_job(settings, later_s=day_s) for _ in range(depth - queued)]
        await timed("", 64, [lambda job=job: store.submit(job, max_queued=10**9) for job in more], tick)
        queued = depth
        tick = bar(f"claims at {depth:,}", size.claims)
        seconds, inside_us = [], []
        for _ in range(size.claims):
            before_us = await server_us(store)
            began = time.perf_counter()
            job = await store.claim(horizons=ANY_DEADLINE, lease_s=600)
            seconds.append(time.perf_counter() - began)
            inside_us.append(await server_us(store) - before_us)
            assert job is not None
            await store.finish(Lease(job.id, job.fencing_token), JobStatus.SUCCEEDED)
            await store.delete(job.id)
            await store.submit(a_job(settings, later_s=day_s), max_queued=10**9)
            tick()
        assert await store.queue_length() == depth
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1000
        found.append(ClaimAt(depth, float(p50), float(p99), float(np.median(inside_us))))
    return found


# ---- memory ---------------------------------------------------------------------------------------------------------


async def memory(
    store: JobStore, settings: Settings, size: Size, bar: Callable[[str, int], Callable[[], None]]
) -> dict[str, int]:
    """Bytes of the server's memory that a job costs: queued, finished with 40 reported steps, and settled."""

    async def used() -> int:
        return int((await store._redis.info("memory"))["used_memory"])

    n, empty = size.remembered, await used()
    tick = bar("memory a job", 3 * n)
    receipt = {
        "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "spec": a_job(settings).spec.model_dump(mode="json"),
        "gpu_s": 49.8,
    }
    artifact = Artifact(name="video.mp4", content_type="video/mp4", size_bytes=482133, width=640, height=480, frames=41,
                        fps=16.0, duration_s=2.5625, codec="h264", sha256="9f" * 32)  # fmt: skip

    async def life() -> None:
        job = await store.claim(horizons=ANY_DEADLINE, lease_s=600)
        assert job is not None
        lease = Lease(job.id, job.fencing_token)
        for step in range(40):
            await store.write(lease, "progress", Steps(step=step, steps=40, eta_s=step / 3).model_dump())
        await store.finish(lease, JobStatus.SUCCEEDED, artifacts=[artifact], receipt=receipt)

    await timed("", 64, [lambda: store.submit(a_job(settings), max_queued=10**9)] * n, tick)
    queued = await used()
    await timed("", 64, [life] * n, tick)
    finished = await used()
    ended = await store.unsettled(age_s=0, skip=0, limit=n)
    await timed("", 64, [lambda job=job: store.settle(job.id) for job in ended], tick)
    settled = await used()
    for job in ended:
        await store.delete(job.id)
    return {"queued": (queued - empty) // n, "finished": (finished - empty) // n, "settled": (settled - empty) // n}


# ---- submissions over HTTP ------------------------------------------------------------------------------------------


def serve(store_url: str, prefix: str, folder: str, ready: Connection) -> None:
    """The real application under uvicorn, in a process of its own, until it is terminated."""
    settings = Settings(store_url=store_url, store_prefix=prefix, data_dir=Path(folder), max_queued_jobs=10**6)
    app = create_app(settings, JobStore(store_url, prefix=prefix), LocalStore(settings.artifacts_dir))
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))

    def stop_with_the_benchmark() -> None:
        ready.poll(None)  # its end of the pipe closes when it dies, however it dies
        server.should_exit = True

    threading.Thread(target=stop_with_the_benchmark, daemon=True).start()
    ready.send(listening.getsockname()[1])
    server.run(sockets=[listening])


@asynccontextmanager
async def service(store_url: str, prefix: str, folder: Path) -> AsyncIterator[str]:
    """The address of the running application."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(store_url, prefix, str(folder), theirs), daemon=True)
    process.start()
    try:
        url = f"http://127.0.0.1:{await asyncio.to_thread(ours.recv)}"
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=20)) as http:
            (await http.get(f"{url}/readyz")).raise_for_status()
        yield url
    finally:
        process.terminate()
        process.join()


async def submissions(url: str, size: Size, tick: Callable[[], None]) -> tuple[Submissions, list[float]]:
    """An open loop: requests start when they are due, however long the others take. Also each latency in seconds."""
    latencies: list[float] = []
    late: list[float] = []
    errors: dict[str, int] = {}

    async def one(http: aiohttp.ClientSession, due: float, number: int) -> None:
        late.append(time.perf_counter() - due)
        body = {"type": random.choice(list(JobType)), "prompt": PROMPT}
        try:
            async with http.post("/v1/jobs", json=body, headers={"Idempotency-Key": f"{due}-{number}"}) as answer:
                await answer.read()
                said = "" if answer.status == 202 else f"HTTP {answer.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            said = type(error).__name__
        latencies.append(time.perf_counter() - due)
        if said:
            errors[said] = errors.get(said, 0) + 1
        tick()

    connections = aiohttp.TCPConnector(limit=500)
    async with aiohttp.ClientSession(url, connector=connections) as http, asyncio.TaskGroup() as tasks:
        began = time.perf_counter()
        for number in range(size.http_per_s * size.http_s):
            due = began + number / size.http_per_s
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(http, due, number))
    p50, p99 = np.quantile(latencies, [0.5, 0.99]) * 1000
    seconds = time.perf_counter() - began
    return Submissions(
        size.http_per_s, seconds, len(latencies), errors, float(p50), float(p99), max(latencies) * 1000,
        float(np.quantile(late, 0.99)) * 1000,
    ), latencies  # fmt: skip


# ---- what comes out -------------------------------------------------------------------------------------------------


def show(console: Console, found: dict[str, Any]) -> None:
    """The tables."""
    table = Table("call", "callers", "a second", "p50 ms", "p99 ms", title="JobStore", title_justify="left")
    for timing in found["rates"]:
        table.add_row(
            timing.what, str(timing.clients), f"{timing.per_s:,.0f}", f"{timing.p50_ms:.2f}", f"{timing.p99_ms:.2f}"
        )
    console.print(table)
    table = Table(
        "queued", "p50 ms", "p99 ms", "in the server µs", title="Claim by length of the queue", title_justify="left"
    )
    for at in found["claims"]:
        table.add_row(f"{at.queued:,}", f"{at.p50_ms:.2f}", f"{at.p99_ms:.2f}", f"{at.server_us:.0f}")
    console.print(table)
    table = Table(
        "a second", "sent", "errors", "p50 ms", "p99 ms", "longest ms", title="POST /v1/jobs", title_justify="left"
    )
    http = found["http"]
    errors = ", ".join(f"{count} {what}" for what, count in http.errors.items()) or "none"
    table.add_row(
        str(http.per_s), f"{http.sent:,}", errors, f"{http.p50_ms:.1f}", f"{http.p99_ms:.1f}", f"{http.longest_ms:.1f}"
    )
    console.print(table)
    bytes_ = found["memory_bytes_per_job"]
    console.print("Memory of the store a job: " + ", ".join(f"{what} {count:,} B" for what, count in bytes_.items()))


def plot(found: dict[str, Any], latencies: Sequence[float], path: Path) -> None:
    """Claim time by queue length, and the distribution of submission latencies."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    queued = [at.queued for at in found["claims"]]
    left.loglog(queued, [at.p99_ms for at in found["claims"]], "o--", label="p99, caller")
    left.loglog(queued, [at.p50_ms for at in found["claims"]], "o-", label="median, caller")
    left.loglog(queued, [at.server_us / 1000 for at in found["claims"]], "o-", label="median, in the server")
    left.set(xlabel="queued jobs", ylabel="ms", title="One claim")
    left.legend()
    left.grid(alpha=0.3)
    ordered = np.sort(latencies) * 1000
    right.semilogx(ordered, np.arange(1, len(ordered) + 1) / len(ordered))
    right.axvline(250, color="grey", linestyle=":", label="250 ms")
    right.axvline(found["http"].p99_ms, color="tab:red", linestyle="--", label=f"p99 {found['http'].p99_ms:.0f} ms")
    right.set(
        xlabel="ms from the moment it was due", ylabel="share", title=f"POST /v1/jobs at {found['http'].per_s} a second"
    )
    right.legend()
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def machine(server: dict[str, Any], store_url: str | None) -> dict[str, Any]:
    """What the figures were measured on."""
    version = server.get("valkey_version") or server["redis_version"]
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg(),
        "python": platform.python_version(),
        "server": f"{server.get('server_name', 'redis')} {version}"
        + ("" if store_url else ", bundled, appendfsync always"),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


async def measure(
    size: Size, store_url: str | None, folder: Path, console: Console
) -> tuple[dict[str, Any], list[float]]:
    """Everything, on a server of its own under `folder` or on the one at `store_url`."""
    server = None if store_url else EmbeddedStore(folder)
    url = store_url or (server.url if server else "")
    prefix = f"bench-{new_job_id()}"
    store, settings = JobStore(url, prefix=prefix, timeout_s=30), Settings(store_url=url, data_dir=folder)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as bars:

            def bar(what: str, total: int) -> Callable[[], None]:
                task: TaskID = bars.add_task(what, total=total)
                return lambda: bars.advance(task)

            found: dict[str, Any] = {"machine": machine(await store._redis.info("server"), store_url)}
            async with service(url, prefix, folder) as address:
                tick = bar(f"POST at {size.http_per_s} a second", size.http_per_s * size.http_s)
                found["http"], latencies = await submissions(address, size, tick)
            assert await store.queue_length() == found["http"].sent - sum(found["http"].errors.values())
            await forget(store)
            found["memory_bytes_per_job"] = await memory(store, settings, size, bar)
            found["rates"] = await rates(store, settings, size, bar)
            found["claims"] = await growth(store, settings, size, bar)
            return found, latencies
    finally:
        await forget(store)
        await store.close()
        if server:
            server.stop()


async def forget(store: JobStore) -> None:
    """Remove every key of the benchmark."""
    keys = [key async for key in store._redis.scan_iter(f"{store._prefix}:*", count=5000)]
    for start in range(0, len(keys), 1000):
        await store._redis.unlink(*keys[start : start + 1000])


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller everywhere.")] = False,
    store_url: Annotated[str | None, typer.Option(help="A server to measure instead of a bundled one.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for store.json and store.png.")] = RESULTS,
) -> None:
    """Measure the JobStore."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="wan-", dir="/tmp"))  # short: a Unix socket's path takes a hundred bytes
    try:
        found, latencies = asyncio.run(measure(QUICK if quick else FULL, store_url, folder, console))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(console, found)
    out.mkdir(parents=True, exist_ok=True)
    (out / "store.json").write_text(json.dumps({"quick": quick, **found}, default=asdict, indent=2) + "\n")
    plot(found, latencies, out / "store.png")
    console.print(f"written to {out / 'store.json'} and store.png", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
