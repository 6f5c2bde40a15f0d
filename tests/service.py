"""The HTTP application on a real port, over a real store and a real folder, for tests of what speaks HTTP to it."""

import asyncio
import hashlib
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from serve_app.api.app import create_app
from serve_app.jobs.job import Artifact, Job, JobStatus, Progress, Stage, new_job_id
from serve_app.jobs.receipt import UNTRAINED_NOTICE
from serve_app.jobs.store import JobStore, Lease
from serve_app.scheduling.claim import ANY_DEADLINE
from serve_app.settings import Settings
from serve_app.storage import ArtifactStore
from serve_app.storage.local import LocalStore

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8


@dataclass
class Service:
    url: str
    settings: Settings
    store: JobStore
    """The test's own connection to the service's store."""
    artifacts: ArtifactStore
    http: httpx.Client

    @asynccontextmanager
    async def connected(self) -> AsyncIterator["Service"]:
        """The same service, with a store connection of the running event loop."""
        store = JobStore(self.settings.resolved_store_url, prefix=self.settings.store_prefix)
        yield replace(self, store=store)
        await store.close()

    async def empty(self) -> None:
        """Forget every job and file."""
        if keys := await self.left_behind():
            await self.store._redis.unlink(*keys)
        shutil.rmtree(self.settings.artifacts_dir, ignore_errors=True)

    async def left_behind(self) -> list[bytes]:
        """Every key that anybody wrote to the store."""
        return [key async for key in self.store._redis.scan_iter(f"{self.store._prefix}:*")]


@contextmanager
def serving(store_url: str, folder: Path, artifacts: ArtifactStore | None = None, **settings: Any) -> Iterator[Service]:
    """Run the application in a thread, with its own event loop, on a free port of this machine."""
    prefix = new_job_id()
    given = Settings(store_url=store_url, store_prefix=prefix, data_dir=folder, **settings)
    kept = artifacts or LocalStore(given.artifacts_dir)
    store = JobStore(store_url, prefix=prefix, timeout_s=2.0)
    # With the protocol named, asyncio turns Nagle's algorithm off; without, each answer waits 40 ms for an ACK.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    app = create_app(given, store, kept)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))

    async def run() -> None:
        await server.serve(sockets=[listening])
        await store.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=url) as http:
            yield Service(url, given, JobStore(store_url, prefix=prefix), kept, http)
    finally:
        server.should_exit = True
        thread.join()


async def claim(store: JobStore) -> tuple[Job, Lease]:
    job = await store.claim(horizons=ANY_DEADLINE, lease_s=60)
    assert job is not None
    return job, Lease(job.id, job.fencing_token)


async def report_steps(store: JobStore, lease: Lease, first: int, last: int, steps: int) -> None:
    for step in range(first, last + 1):
        progress = Progress(step=step, steps=steps, eta_s=float(steps - step))
        await store.write(lease, "progress", progress.model_dump(), progress=progress)


async def succeed(service: Service, folder: Path, *, trained: bool = False, content: bytes = PNG) -> Job:
    """Do what a conductor does for the next queued job, with given bytes for its file."""
    job, lease = await claim(service.store)
    await service.store.write(lease, "stage", {"stage": Stage.GENERATING}, stage=Stage.GENERATING)
    await report_steps(service.store, lease, 1, job.spec.sample_steps, job.spec.sample_steps)
    source = folder / f"{job.id}.png"
    source.write_bytes(content)
    service.artifacts.put(f"{job.id}/{lease.token}/image.png", source, "image/png")
    artifact = Artifact(
        name="image.png", content_type="image/png", size_bytes=len(content), width=640, height=480,
        sha256=hashlib.sha256(content).hexdigest(),
    )  # fmt: skip
    receipt = {"trained": trained, "seed": 1} | ({} if trained else {"notice": UNTRAINED_NOTICE})
    await service.store.finish(lease, JobStatus.SUCCEEDED, artifacts=[artifact], receipt=receipt, gpu_s=1.5)
    return await service.store.get(job.id)
