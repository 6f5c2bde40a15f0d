"""Files over 6 MB go to Supabase in chunks and survive what networks do, against the stand-in of tests/supabase_server.py."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tenacity import wait_none
from tusclient.client import TusClient

from serve_app.errors import StorageError, StorageUnavailable
from serve_app.settings import Settings
from serve_app.storage import supabase
from serve_app.storage.keys import artifact_key
from serve_app.storage.local import LocalStore
from serve_app.storage.resumable import CHUNK_BYTES
from serve_app.storage.supabase import SupabaseStore
from tests.supabase_server import Answer, Bucket, Cut, CutMidway, Hang, SupabaseServer

KEY = artifact_key("job1", 3, "video.mp4")
SIZE = 20_000_000
"""Four chunks, the last one short."""


@pytest.fixture(scope="module")
def running_server() -> Iterator[SupabaseServer]:
    with SupabaseServer() as running:
        yield running


@pytest.fixture
def server(running_server) -> SupabaseServer:
    running_server.reset()
    return running_server


@pytest.fixture(autouse=True)
def _no_waiting_between_tries(monkeypatch):
    monkeypatch.setattr(supabase, "BACKOFF", wait_none())


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "video.mp4"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


def _store(server: SupabaseServer, **changes) -> SupabaseStore:
    values = {"supabase_url": server.url, "supabase_key": server.key, "storage_timeout_s": 5.0, "storage_attempts": 3}
    return SupabaseStore(Settings(storage="supabase", **(values | changes)))


def _methods(server: SupabaseServer) -> list[str]:
    return [seen.method for seen in server.seen]


def _stored(server: SupabaseServer) -> bytes:
    return server.buckets["wan-serve"].objects[KEY].content


def test_a_large_file_goes_in_chunks_and_tells_how_far_it_is(server, video):
    heard: list[int] = []
    _store(server).put(KEY, video, "video/mp4", heard.append)
    assert _stored(server) == video.read_bytes()
    assert server.buckets["wan-serve"].objects[KEY].content_type == "video/mp4"
    assert heard == [CHUNK_BYTES, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES, SIZE]
    assert _methods(server) == ["POST", "PATCH", "PATCH", "PATCH", "PATCH"]
    assert {size for _, size in server.received[:-1]} == {CHUNK_BYTES}
    assert server.seen[0].headers["x-upsert"] == "true"


@pytest.mark.parametrize(("size", "first"), [(CHUNK_BYTES, "/object/"), (CHUNK_BYTES + 1, "/upload/resumable")])
def test_the_size_decides_the_way(size, first, server, tmp_path):
    (tmp_path / "v.mp4").write_bytes(bytes(size))
    heard: list[int] = []
    _store(server).put(KEY, tmp_path / "v.mp4", "video/mp4", heard.append)
    assert first in server.seen[0].path
    assert heard[-1] == size == len(_stored(server))


def test_a_local_store_reports_too(video, tmp_path):
    heard: list[int] = []
    LocalStore(tmp_path).put(KEY, video, "video/mp4", heard.append)
    assert heard == [SIZE]


@pytest.mark.parametrize("kept", [0, 1, 2_500_000], ids=["nothing kept", "a byte kept", "all kept"])
def test_cuts_cost_no_more_than_a_chunk_each(kept, server, video):
    cuts = [CutMidway(after=2_500_000, kept=kept)] * 2
    server.cuts.extend(cuts)
    _store(server).put(KEY, video, "video/mp4")
    assert _stored(server) == video.read_bytes()
    assert not server.cuts
    assert _methods(server).count("POST") == 1, "it goes on and does not begin again"
    assert _methods(server).count("HEAD") == 2
    assert sum(size for _, size in server.received) <= SIZE + len(cuts) * CHUNK_BYTES
    assert [offset for offset, _ in server.received[:3]] == [0, kept, 2 * kept], "from where the server is"


def test_a_network_that_lets_little_through_at_a_time_is_enough(server, video):
    """Many more cuts than `storage_attempts`, but each try brings the upload on."""
    server.cuts.extend([CutMidway(after=1_500_000, kept=1_500_000)] * 12)
    _store(server, storage_attempts=2).put(KEY, video, "video/mp4")
    assert _stored(server) == video.read_bytes()
    assert not server.cuts


@pytest.mark.parametrize("fault", [Cut(), Hang(), Answer(500), Answer(429), Answer(423)], ids=repr)
@pytest.mark.parametrize("request_number", [0, 1, 2, 4], ids=["create", "first chunk", "second chunk", "last chunk"])
def test_any_request_may_fail(request_number, fault, server, video):
    server.spoil_after(request_number, fault)
    _store(server, storage_timeout_s=1.0).put(KEY, video, "video/mp4")
    assert _stored(server) == video.read_bytes()


def test_tries_run_out_where_nothing_arrives(server, video):
    server.cuts.extend([CutMidway(after=100_000, kept=0)] * 10)
    with pytest.raises(StorageUnavailable, match=f"storing {KEY}: no answer from Supabase"):
        _store(server).put(KEY, video, "video/mp4")
    assert len(server.cuts) == 10 - 3
    assert KEY not in server.buckets["wan-serve"].objects


@pytest.mark.parametrize("forget", [True, False], ids=["404", "410"])
def test_an_expired_upload_begins_again(forget, server, video):
    def expire(offset: int) -> None:
        if offset == 2 * CHUNK_BYTES and len(server.uploads) == 1:
            if forget:
                server.uploads["another"] = server.uploads.pop(next(iter(server.uploads)))
            else:
                next(iter(server.uploads.values())).is_expired = True

    _store(server).put(KEY, video, "video/mp4", expire)
    assert _stored(server) == video.read_bytes()
    assert _methods(server).count("POST") == 2


def test_a_server_that_forgets_every_upload_is_given_up(server, video):
    def expire(_: int) -> None:
        for upload in server.uploads.values():
            upload.is_expired = True

    with pytest.raises(StorageUnavailable, match="once too often"):
        _store(server).put(KEY, video, "video/mp4", expire)
    assert _methods(server).count("POST") == 3


def test_an_end_that_was_not_confirmed_is_not_believed(server, video):
    """All bytes are there, and then the server fails to make an object of them."""
    server.fail_to_finish = 1
    _store(server).put(KEY, video, "video/mp4")
    assert _stored(server) == video.read_bytes()
    assert _methods(server).count("POST") == 2


@pytest.mark.parametrize(
    ("bucket", "changes", "said"),
    [
        (Bucket(), {"supabase_key": "another-key"}, ("403 Unauthorized", "WAN_SERVE_SUPABASE_KEY")),
        (Bucket(), {"supabase_bucket": "missing"}, ("404 .*Bucket not found", "supabase_bucket")),
        (Bucket(file_size_limit=1000), {}, ("413 .*Maximum size exceeded", "file size limit")),
        (Bucket(allowed_mime_types=["image/png"]), {}, ("415 .*not supported", "video/mp4")),
    ],
)
def test_what_will_not_pass_fails_at_once(bucket, changes, said, server, video):
    server.buckets["wan-serve"] = bucket
    with pytest.raises(StorageError, match=said[0]) as caught:
        _store(server, **changes).put(KEY, video, "video/mp4")
    assert not caught.value.retryable
    assert said[1] in caught.value.hint
    assert len(server.seen) == 1


def test_a_key_that_is_refused_midway(server, video):
    def revoke(_: int) -> None:
        server.key = "another-key"

    try:
        with pytest.raises(StorageError, match="403 Unauthorized") as caught:
            _store(server).put(KEY, video, "video/mp4", revoke)
    finally:
        server.key = "service-role-key"
    assert not caught.value.retryable
    assert _methods(server) == ["POST", "PATCH", "PATCH"]


@pytest.mark.parametrize("answer", [Answer(200, text="<html>hello</html>"), Answer(404, text="no"), Answer(301)])
def test_an_address_that_is_not_supabase(answer, server, video):
    server.faults.append(answer)
    with pytest.raises(StorageError) as caught:
        _store(server).put(KEY, video, "video/mp4")
    assert "supabase_url" in caught.value.hint
    assert len(server.seen) == 1


def test_a_server_behind_a_proxy_names_an_address_that_nobody_reaches(server, video):
    server.named_host = "storage.internal:5000"
    _store(server).put(KEY, video, "video/mp4")
    assert _stored(server) == video.read_bytes()


def test_a_file_that_shrinks_meanwhile(server, tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(bytes(2 * CHUNK_BYTES))

    def shrink(_: int) -> None:
        path.write_bytes(b"")

    with pytest.raises(StorageError, match="became shorter"):
        _store(server).put(KEY, path, "video/mp4", shrink)


def test_the_stand_in_satisfies_another_client(server, video):
    """tuspy is known to work with the real server."""
    client = TusClient(f"{server.url}/storage/v1/upload/resumable", {"authorization": f"Bearer {server.key}"})
    metadata = {"bucketName": "wan-serve", "objectName": KEY, "contentType": "video/mp4"}
    first = client.uploader(str(video), chunk_size=CHUNK_BYTES, metadata=metadata)
    first.upload_chunk()
    resumed = client.uploader(str(video), chunk_size=CHUNK_BYTES, url=first.url)
    assert resumed.offset == CHUNK_BYTES
    resumed.upload()
    assert _stored(server) == video.read_bytes()
