"""Files and stores of checkpoints: whole or refused, on a folder and on any other fsspec file system."""

import json
import secrets
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from serve_app.engine.checkpoints import Checkpoint, CheckpointHeader, CheckpointStore, StoredCheckpoint
from serve_app.errors import CheckpointInvalid, CheckpointUnavailable, InvalidValue


def checkpoint_of(key: str = "job/clip-0", step: int = 3) -> Checkpoint:
    header = CheckpointHeader(key, {"seed": 2**63, "model": "m", "guidance_scale": 6.0}, step, 1.25, (0.5, 0.75), (2,))
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        header,
        {
            "latents": torch.randn(1, 16, 2, 6, 4, generator=generator),
            "prompt_embeds": torch.randn(1, 7, 32, generator=generator).bfloat16(),
            "empty": torch.zeros(1, 0, 32),
        },
    )


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CheckpointStore]:
    if request.param == "folder":
        yield CheckpointStore(str(tmp_path / "checkpoints"))
        return
    root = f"/{secrets.token_hex(4)}"
    yield CheckpointStore(f"memory:/{root}")
    if fsspec.filesystem("memory").exists(root):
        fsspec.filesystem("memory").rm(root, recursive=True)


def test_what_is_saved_is_loaded(store: CheckpointStore) -> None:
    saved = checkpoint_of()
    assert store.load("job/clip-0") is None
    size = store.save(saved)
    loaded = store.load("job/clip-0")
    assert loaded is not None
    assert loaded.header == saved.header
    assert loaded.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert store.list() == [StoredCheckpoint("job/clip-0", size)]


def test_a_later_one_replaces_it(store: CheckpointStore) -> None:
    store.save(checkpoint_of(step=3))
    store.save(checkpoint_of(step=4))
    loaded = store.load("job/clip-0")
    assert loaded is not None
    assert loaded.header.step == 4
    assert len(store.list()) == 1


def test_delete_takes_a_job_and_no_other(store: CheckpointStore) -> None:
    for key in ("job/clip-0", "job/clip-1", "job2/clip-0", "jo", "job/clip-10"):
        store.save(checkpoint_of(key))
    store.delete("job/clip-1")
    assert [found.key for found in store.list()] == ["jo", "job/clip-0", "job/clip-10", "job2/clip-0"]
    store.delete("job")
    assert [found.key for found in store.list()] == ["jo", "job2/clip-0"]
    store.delete("job")
    store.delete("jo")
    assert [found.key for found in store.list()] == ["job2/clip-0"]


def test_an_empty_store(store: CheckpointStore) -> None:
    assert store.list() == []
    store.delete("job")


@pytest.mark.parametrize("key", ["", "/", "../x", "a/../b", ".hidden", "a//b", "/a", "a/", "a b", "é", "a\\b"])
def test_keys_that_leave_the_store_are_refused(store: CheckpointStore, key: str) -> None:
    for call in (store.load, store.delete, lambda key: store.save(checkpoint_of(key))):
        with pytest.raises(InvalidValue, match="checkpoint_key"):
            call(key)


def test_every_flipped_byte_is_found() -> None:
    """Of any damage the answer is CheckpointInvalid, never another exception and never wrong tensors."""
    data = checkpoint_of().to_bytes()
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x41
        with pytest.raises(CheckpointInvalid):
            Checkpoint.from_bytes(bytes(damaged), "job/clip-0")


@pytest.mark.parametrize("length", [0, 3, 8, 100, -1])
def test_a_torn_file_is_found(length: int) -> None:
    with pytest.raises(CheckpointInvalid, match="job/clip-0 is damaged"):
        Checkpoint.from_bytes(checkpoint_of().to_bytes()[:length], "job/clip-0")


def test_another_version_is_refused() -> None:
    data = checkpoint_of().to_bytes()
    (length,) = struct.unpack_from("<Q", data)
    head = json.loads(data[8 : 8 + length])
    head["__metadata__"]["format"] = "wan-serve checkpoint 2"
    changed = json.dumps(head, separators=(",", ":")).encode()
    with pytest.raises(CheckpointInvalid, match="format 'wan-serve checkpoint 2', not version 1"):
        Checkpoint.from_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :], "job/clip-0")


def test_readers_see_whole_files_while_one_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path))
    store.save(checkpoint_of(step=0))
    finished = threading.Event()

    def write() -> None:
        for step in range(60):
            store.save(checkpoint_of(step=step))
        finished.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen: set[int] = set()
    while not finished.is_set():
        loaded = store.load("job/clip-0")
        assert loaded is not None
        seen.add(loaded.header.step)
    writer.join()
    assert len(seen) > 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["clip-0.safetensors"], "no litter"


def test_a_store_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(str(tmp_path / "file"))
    with pytest.raises(CheckpointUnavailable, match="job/clip-0 could not be written") as refusal:
        store.save(checkpoint_of())
    assert refusal.value.retryable
    with pytest.raises(CheckpointUnavailable, match="could not be read"):
        store.load("job/clip-0")


def test_an_unknown_kind_of_store_is_refused() -> None:
    with pytest.raises(InvalidValue, match="gopher"):
        CheckpointStore("gopher://bucket/checkpoints")
