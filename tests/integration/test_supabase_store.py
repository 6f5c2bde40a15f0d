"""The real Supabase client over real HTTP, against the stand-in server of tests/supabase_server.py."""

import pickle
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from storage3.exceptions import StorageApiError
from tenacity import wait_none

from serve_app.errors import ArtifactNotFound, StorageError, StorageUnavailable
from serve_app.settings import Settings
from serve_app.storage import open_store, supabase
from serve_app.storage.keys import artifact_key
from serve_app.storage.supabase import SupabaseStore
from tests.supabase_server import Answer, Bucket, Cut, Hang, StoredObject, SupabaseServer

KEY = artifact_key("job1", 3, "video.mp4")


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


@pytest.fixture
def video(tmp_path) -> Path:
    path = tmp_path / "video.mp4"
    path.write_bytes(bytes(range(256)) * 4096)  # 1 MiB: more than a socket buffers
    return path


def _settings(server: SupabaseServer, **changes) -> Settings:
    values = {
        "storage": "supabase",
        "supabase_url": server.url,
        "supabase_key": server.key,
        "storage_timeout_s": 5.0,
        "storage_attempts": 3,
    }
    return Settings(**(values | changes))


@pytest.fixture
def store(server) -> SupabaseStore:
    return SupabaseStore(_settings(server))


def test_put_then_download_by_signed_url(server, store, video):
    store.put(KEY, video, "video/mp4")
    (upload,) = server.seen
    assert upload.headers["x-upsert"] == "true"
    stored = server.buckets["wan-serve"].objects["job1/3/video.mp4"]
    assert (stored.content, stored.content_type) == (video.read_bytes(), "video/mp4")

    url = store.url(KEY, "ein schöner Film.mp4")
    assert store.local_path(KEY) is None
    whole = httpx.get(url)
    assert (whole.status_code, whole.content) == (200, video.read_bytes())
    assert whole.headers["content-type"] == "video/mp4"
    assert "ein%20sch%C3%B6ner%20Film.mp4" in whole.headers["content-disposition"]
    part = httpx.get(url, headers={"range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, video.read_bytes()[100:200])


def test_open_store_takes_the_settings(server):
    assert isinstance(open_store(_settings(server)), SupabaseStore)


def test_signed_url_expires(server, video):
    store = SupabaseStore(_settings(server, signed_url_ttl_s=60))
    store.put(KEY, video, "video/mp4")
    url = store.url(KEY, "v.mp4")
    server.clock_offset_s = 59
    assert httpx.get(url).status_code == 200
    server.clock_offset_s = 62
    late = httpx.get(url)
    assert (late.status_code, late.json()["error"]) == (400, "InvalidJWT")


def test_put_replaces(server, store, video):
    for content in (b"first", b"second"):
        video.write_bytes(content)
        store.put(KEY, video, "video/mp4")
    assert server.buckets["wan-serve"].objects[KEY].content == b"second"


def test_the_stand_in_refuses_a_second_upload_without_upsert(store, video):
    store.put(KEY, video, "video/mp4")
    with pytest.raises(StorageApiError) as caught:
        store._bucket.upload(KEY, video, {"content-type": "video/mp4"})
    assert (caught.value.status, caught.value.code) == ("409", "Duplicate")


def test_url_of_nothing(store):
    with pytest.raises(ArtifactNotFound):
        store.url(KEY, "v.mp4")


def test_delete_removes_the_folder_and_nothing_else(server, store, monkeypatch):
    monkeypatch.setattr(supabase, "PAGE", 3)
    objects = server.buckets["wan-serve"].objects
    gone = [f"job1/{token}/{name}" for token in range(1, 6) for name in ("a.png", "b.png", "c.png", "d.mp4")]
    kept = ["job10/1/a.png", "job2/1/a.png", "job1.png"]
    objects.update({key: StoredObject(b"", "image/png") for key in gone + kept})
    store.delete("job1")
    assert sorted(objects) == sorted(kept)
    store.delete("job1")  # nothing there is no error


@pytest.mark.parametrize(
    "fault",
    [
        Answer(500),
        Answer(400, body_status="503"),  # as the real server sends it
        Answer(544),
        Answer(502, text="<html>Bad Gateway</html>"),
        Answer(429),
        Cut(),
        Hang(),
    ],
    ids=lambda fault: repr(fault)[:60],
)
def test_what_may_pass_is_tried_again(fault, server, video):
    store = SupabaseStore(_settings(server, storage_timeout_s=0.5))
    server.faults.extend([fault, fault])
    store.put(KEY, video, "video/mp4")
    assert server.buckets["wan-serve"].objects[KEY].content == video.read_bytes()
    assert len(server.seen) == 3
    assert len({seen.client for seen in server.seen}) == 3, "each try of an upload has its own connection"


def test_other_requests_are_tried_again_too(server, store, video):
    store.put(KEY, video, "video/mp4")
    server.faults.extend([Answer(500), Cut()])
    assert store.url(KEY, "v.mp4")
    server.faults.extend([Answer(500), Cut()])
    store.delete("job1")
    assert server.buckets["wan-serve"].objects == {}


@pytest.mark.parametrize(
    ("fault", "words"), [(Answer(500), "500 Injected"), (Cut(), "no answer"), (Hang(), "ReadTimeout")]
)
def test_tries_run_out(fault, words, server, video):
    store = SupabaseStore(_settings(server, storage_timeout_s=0.3))
    server.faults.extend([fault] * 10)
    with pytest.raises(StorageUnavailable, match=words) as caught:
        store.put(KEY, video, "video/mp4")
    assert caught.value.retryable
    assert len(server.seen) == 3
    assert "storing job1/3/video.mp4" in pickle.loads(pickle.dumps(caught.value)).message


def test_nobody_listens(video):
    with socket.socket() as bound:  # bound, not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        store = SupabaseStore(
            Settings(storage="supabase", supabase_url=url, supabase_key="service-role-key", storage_attempts=2)
        )
        with pytest.raises(StorageUnavailable, match="ConnectError") as caught:
            store.check()
    assert "supabase_url" in caught.value.hint


@pytest.mark.parametrize(
    ("bucket", "changes", "said"),
    [
        (Bucket(), {"supabase_key": "another-key"}, ("403 Unauthorized", "WAN_SERVE_SUPABASE_KEY")),
        (Bucket(), {"supabase_bucket": "missing"}, ("404 Bucket not found", "supabase_bucket")),
        (Bucket(file_size_limit=1000), {}, ("413 Payload too large", "file size limit")),
        (Bucket(allowed_mime_types=["image/png"]), {}, ("415 invalid_mime_type", "video/mp4")),
    ],
)
def test_what_will_not_pass_fails_at_once(bucket, changes, said, server, video):
    server.buckets["wan-serve"] = bucket
    store = SupabaseStore(_settings(server, **changes))
    with pytest.raises(StorageError, match=said[0]) as caught:
        store.put(KEY, video, "video/mp4")
    assert not caught.value.retryable
    assert said[1] in caught.value.hint
    assert len(server.seen) == 1


def test_a_gateway_that_refuses_the_key(server, store, video):
    server.faults.append(Answer(401, text='{"message":"Invalid API key"}'))
    with pytest.raises(StorageError, match="401") as caught:
        store.put(KEY, video, "video/mp4")
    assert "WAN_SERVE_SUPABASE_KEY" in caught.value.hint


@pytest.mark.parametrize("answer", [Answer(200, text="<html>hello</html>"), Answer(404, text="no"), Answer(301)])
def test_an_address_that_is_not_supabase(answer, server, store, video):
    server.faults.append(answer)
    with pytest.raises(StorageError) as caught:
        store.put(KEY, video, "video/mp4")
    assert "supabase_url" in caught.value.hint
    assert len(server.seen) == 1


def test_a_refused_upload_does_not_hang_the_next_request(server, video):
    """Older servers never answer on the connection of a refused large upload; the stand-in does as they do."""
    store = SupabaseStore(_settings(server, storage_timeout_s=2.0, storage_attempts=1))
    bucket = server.buckets["wan-serve"]
    bucket.allowed_mime_types = ["image/png"]
    with pytest.raises(StorageError, match="415"):
        store.put(KEY, video, "video/mp4")
    assert server.dead_connections
    bucket.allowed_mime_types = None
    store.put(KEY, video, "video/mp4")
    assert store.url(KEY, "v.mp4")


@pytest.mark.parametrize(
    ("retry_after", "least_s"),
    [("1", 1.0), (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True), 0.5), ("soon", 0.0)],
    ids=["seconds", "date", "nonsense"],
)
def test_retry_after_is_honoured(retry_after, least_s, server, store, video):
    value = retry_after if isinstance(retry_after, str) else retry_after()
    server.faults.append(Answer(503, headers={"retry-after": value}))
    store.put(KEY, video, "video/mp4")
    first, second = server.seen
    assert second.at - first.at >= least_s


def test_a_long_retry_after_is_bounded(server, store, video, monkeypatch):
    monkeypatch.setattr(supabase, "MAX_RETRY_AFTER_S", 0.1)
    server.faults.append(Answer(429, headers={"retry-after": "3600"}, text="slow down"))
    store.put(KEY, video, "video/mp4")


def test_threads_share_a_store(server, store, video):
    keys = [artifact_key(f"job{number}", 1, "video.mp4") for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda key: store.put(key, video, "video/mp4"), keys))
    assert sorted(server.buckets["wan-serve"].objects) == sorted(keys)


def test_check_leaves_nothing_behind(server, store):
    store.check()
    assert server.buckets["wan-serve"].objects == {}


def test_check_finds_a_bucket_that_takes_no_videos(server, store):
    server.buckets["wan-serve"].allowed_mime_types = ["image/png", "image/jpeg"]
    with pytest.raises(StorageError, match="video/mp4"):
        store.check()


def test_check_cleans_up_after_a_refusal(server, store):
    server.buckets["wan-serve"].allowed_mime_types = ["video/mp4", "image/png"]
    with pytest.raises(StorageError, match="image/jpeg"):
        store.check()
    assert server.buckets["wan-serve"].objects == {}


def test_check_finds_a_key_that_may_not_remove(server, store):
    server.buckets["wan-serve"].may_remove = False
    with pytest.raises(StorageError, match="not remove"):
        store.check()


@pytest.mark.parametrize("key", ["service-role-key\n", "two words", "schlüssel"])
def test_an_impossible_key_is_not_repeated_in_the_error(key, server):
    with pytest.raises(StorageError, match="supabase_key") as caught:
        SupabaseStore(_settings(server, supabase_key=key))
    assert key not in str(caught.value.info)


def test_an_impossible_url(server):
    with pytest.raises(StorageError, match="supabase_url is 'example"):
        SupabaseStore(_settings(server, supabase_url="example.org"))


def test_a_missing_source_file(server, store, tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        store.put(KEY, tmp_path / "missing.mp4", "video/mp4")
    assert server.seen == []


@pytest.mark.parametrize("key", ["", "../x", "job1/../job2/x", "job1//x", "/job1", "%2e%2e/x", "jöb/1/x"])
def test_an_unsafe_key_never_reaches_the_server(key, server, store, video):
    for call in (lambda: store.put(key, video, "video/mp4"), lambda: store.url(key, "x"), lambda: store.delete(key)):
        with pytest.raises(StorageError, match="no artifact key"):
            call()
    assert server.seen == []
