"""A disk that is really full: a tmpfs of a few megabytes, in a mount namespace of its own."""

import os
import subprocess
import sys
from pathlib import Path

NAMESPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]

ARTIFACTS = """
import pathlib, subprocess, sys
from serve_app.errors import StorageUnavailable
from serve_app.storage.local import LocalStore

root = pathlib.Path(sys.argv[1])
small, large = root / "small", root / "large"
small.write_bytes(b"x" * 1000)
large.write_bytes(b"x" * 5_000_000)
disk = root / "disk"
disk.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
store = LocalStore(disk / "artifacts")
store.put("job/1/a.bin", small, "application/octet-stream")
try:
    store.put("job/1/b.bin", large, "application/octet-stream")
    raise SystemExit("5 MB went onto a disk of 1 MB")
except StorageUnavailable as error:
    assert "full" in error.message, error.message
assert [path.name for path in disk.rglob("*") if path.is_file()] == ["a.bin"]
store.put("job/1/b.bin", small, "application/octet-stream")
print("as it should be")
"""

JOBS = """
import asyncio, pathlib, subprocess, sys
from serve_app.errors import StoreUnavailable
from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.store import JobStore
from tests.factories import make_job, make_spec

async def main():
    disk = pathlib.Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    server = EmbeddedStore(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * 3_000_000)
    store, acknowledged = JobStore(server.url), []
    try:
        while len(acknowledged) < 5000:
            job = make_job(spec=make_spec(prompt="x" * 2000))
            await store.submit(job, max_queued=10_000)
            acknowledged.append(job)
        raise SystemExit("5,000 jobs went onto a disk of 4 MB")
    except StoreUnavailable:
        pass
    ballast.unlink()
    server.ensure_alive()
    for job in acknowledged:
        assert await store.get(job.id) == job
    await store.submit(make_job(), max_queued=10_000)
    await store.close()
    server.stop()
    print("as it should be")

asyncio.run(main())
"""


def run_in_namespace(script: str, folder: Path) -> None:
    command = [*NAMESPACE, sys.executable, "-c", script, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "as it should be\n"), ended.stdout + ended.stderr


def test_artifacts_on_a_full_disk(tmp_path: Path) -> None:
    run_in_namespace(ARTIFACTS, tmp_path)


def test_the_embedded_store_on_a_full_disk_loses_nothing_acknowledged(short_dir: Path) -> None:
    disk = short_dir / "disk"
    disk.mkdir()
    run_in_namespace(JOBS, disk)
