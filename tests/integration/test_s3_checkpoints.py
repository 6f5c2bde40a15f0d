"""Checkpoints at an `s3://` URL: s3fs over real HTTP, against moto's S3 server."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from serve_app.engine.checkpoints import Checkpoint, CheckpointHeader, CheckpointStore, StoredCheckpoint
from serve_app.errors import CheckpointUnavailable


@pytest.fixture
def _endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The server, named as README tells to name Supabase's: by environment variables alone."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()
    server.stop()


def checkpoint_of(key: str, step: int) -> Checkpoint:
    latents = torch.full((1, 16, 3, 60, 80), float(step))
    return Checkpoint(CheckpointHeader(key, {"seed": 7}, step, gpu_s=2.5, step_s=(1.0, 1.5)), {"latents": latents})


@pytest.mark.usefixtures("_endpoint")
def test_written_read_listed_and_deleted() -> None:
    fsspec.filesystem("s3").mkdir("bucket")
    store = CheckpointStore("s3://bucket/checkpoints")
    assert store.list() == []
    assert store.load("a/clip-0") is None
    store.delete("a")

    keys = [f"{job}/clip-{clip}" for job in "ab" for clip in range(3)]
    with ThreadPoolExecutor(3) as threads:  # an engine writes and reads in threads of their own
        sizes = list(threads.map(lambda key: store.save(checkpoint_of(key, 2)), keys))
    store.save(checkpoint_of("a/clip-0", 3))
    assert store.list() == [StoredCheckpoint(key, size) for key, size in zip(keys, sizes, strict=True)]
    found = CheckpointStore("s3://bucket/checkpoints").load("a/clip-0")
    assert found is not None
    assert found.header == checkpoint_of("a/clip-0", 3).header
    assert torch.equal(found.tensors["latents"], checkpoint_of("a/clip-0", 3).tensors["latents"])

    store.delete("a/clip-0")
    assert store.load("a/clip-0") is None
    store.delete("b")
    assert [stored.key for stored in store.list()] == ["a/clip-1", "a/clip-2"]


@pytest.mark.usefixtures("_endpoint")
def test_a_bucket_that_is_not_there() -> None:
    store = CheckpointStore("s3://nowhere/checkpoints")
    with pytest.raises(CheckpointUnavailable, match="bucket does not exist"):
        store.save(checkpoint_of("a/clip-0", 1))


def test_without_s3fs_the_error_says_what_to_install() -> None:
    """In a process of its own, since fsspec remembers what it could import."""
    script = """
import sys
sys.modules["s3fs"] = None
from serve_app.engine.checkpoints import CheckpointStore
from serve_app.errors import InvalidValue
try:
    CheckpointStore("s3://bucket/checkpoints")
except InvalidValue as error:
    print(error.message, error.hint)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "s3://bucket/checkpoints" in ran.stdout
    assert "pip install 'wan-serve[s3]'" in ran.stdout
