import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import StorageError, StorageUnavailable
from serve_app.settings import Settings
from serve_app.storage import open_store
from serve_app.storage.keys import artifact_key, checked_key
from serve_app.storage.local import LocalStore

KEY = artifact_key("job1", 3, "video.mp4")
UNSAFE = [
    "",
    ".",
    "..",
    "../x",
    "a/../b",
    "a//b",
    "/a",
    "a/",
    "a\\b",
    ".hidden",
    "a/.part",
    "%2e%2e",
    "a b",
    "ö",
    "a\n",
]


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "artifacts")


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(b"content" * 1000)
    return path


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_put_keeps_the_source_and_replaces_the_target(store, source):
    store.put(KEY, source, "video/mp4")
    assert store.local_path(KEY).read_bytes() == source.read_bytes()
    assert not store.local_path(KEY).samefile(source)
    assert store.url(KEY, "v.mp4") is None
    source.write_bytes(b"second")
    store.put(KEY, source, "video/mp4")
    assert store.local_path(KEY).read_bytes() == b"second"
    assert _files(store.root) == ["job1/3/video.mp4"]


def test_local_path_of_nothing(store, source):
    store.put(KEY, source, "video/mp4")
    assert store.local_path("job1/4/video.mp4") is None
    assert store.local_path("job1/3") is None


def test_delete_removes_the_folder_and_nothing_else(store, source):
    for key in ("job1/1/a.png", "job1/2/b.png", "job10/1/a.png"):
        store.put(key, source, "image/png")
    store.delete("job1")
    assert _files(store.root) == ["job10/1/a.png"]
    assert not (store.root / "job1").exists()
    store.delete("job1")
    LocalStore(store.root / "never-made").delete("job1")


@pytest.mark.parametrize("key", UNSAFE)
def test_unsafe_keys(key, store, source):
    for call in (
        lambda: store.put(key, source, "video/mp4"),
        lambda: store.local_path(key),
        lambda: store.delete(key),
    ):
        with pytest.raises(StorageError, match="no artifact key"):
            call()
    assert not store.root.exists()


@given(st.text(max_size=20) | st.text("./\\%a-_", max_size=12))
def test_no_accepted_key_leaves_the_folder(key):
    try:
        path = Path("/root/folder") / checked_key(key)
    except StorageError:
        return
    assert os.path.normpath(path) == str(path)
    assert path.is_relative_to("/root/folder")
    assert key.isascii()


def test_a_copy_that_fails_leaves_nothing(store, source, monkeypatch):
    store.put(KEY, source, "video/mp4")

    def full(source, target, length):
        target.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(StorageUnavailable, match="disk is full") as caught:
        store.put("job2/1/video.mp4", source, "video/mp4")
    assert "data_dir" in caught.value.hint
    assert _files(store.root) == ["job1/3/video.mp4"]


def test_check(store, tmp_path):
    store.check()
    assert _files(store.root) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Not a directory") as caught:
        LocalStore(tmp_path / "file" / "artifacts").check()
    assert "data_dir" in caught.value.hint


def test_a_missing_source_file(store, tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        store.put(KEY, tmp_path / "missing.mp4", "video/mp4")
    assert _files(store.root) == []


def test_open_store_takes_the_settings(tmp_path, source):
    store = open_store(Settings(data_dir=tmp_path))
    store.put(KEY, source, "video/mp4")
    assert store.local_path(KEY) == tmp_path / "artifacts" / "job1" / "3" / "video.mp4"
