"""The HTTP interface over a real port, a real store and real files: what it answers, and what it leaves behind."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.jobs.embedded import EmbeddedStore
from serve_app.jobs.presets import PRESETS
from serve_app.jobs.receipt import UNTRAINED_NOTICE
from serve_app.storage.local import LocalStore
from tests.service import PNG, Service, claim, serving, succeed

GOOD = {"type": "image_fast", "prompt": "a red fox in fresh snow"}


@pytest.fixture(scope="module")
def running(valkey: EmbeddedStore, short_dir: Path) -> Iterator[Service]:
    with serving(valkey.url, short_dir / "http") as service:
        yield service


@pytest.fixture
async def service(running: Service) -> AsyncIterator[Service]:
    """The module's service, with a store connection of this test's event loop; emptied afterwards."""
    async with running.connected() as service:
        yield service
        await service.empty()


def submitted(service: Service, **changes: Any) -> dict[str, Any]:
    answer = service.http.post("/v1/jobs", json=GOOD | changes)
    assert answer.status_code == 202, answer.text
    view: dict[str, Any] = answer.json()
    return view


# ---- the way of a job -----------------------------------------------------------------------------------------------


async def test_a_submitted_job_is_stored_before_the_answer(service: Service) -> None:
    answer = service.http.post("/v1/jobs", json=GOOD | {"resolution": "640x480", "seed": 7, "motion_bucket_id": 127})
    view = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == view["links"]["job"] == f"/v1/jobs/{view['id']}"
    assert (view["status"], view["resolution"], view["seed"], view["sample_steps"]) == ("queued", "640*480", 7, 25)
    assert view["motion_bucket_id"] == 127
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", view["deadline"])
    job = await service.store.get(view["id"])
    assert (job.spec.prompt, job.spec.seed, job.owner) == (GOOD["prompt"], 7, "anonymous")
    assert service.http.get(view["links"]["job"]).json() == view


async def test_a_finished_job_shows_its_artifact_receipt_and_notice(service: Service, tmp_path: Path) -> None:
    path = submitted(service)["links"]["job"]
    await succeed(service, tmp_path, trained=False)
    view = service.http.get(path).json()
    assert view["status"] == "succeeded"
    assert view["progress"]["step"] == 25
    assert view["notice"] == UNTRAINED_NOTICE
    assert view["artifacts"][0]["url"] == f"{path}/artifacts/image.png"
    assert service.http.get(view["artifacts"][0]["url"]).content == PNG

    path = submitted(service)["links"]["job"]
    await succeed(service, tmp_path, trained=True)
    assert service.http.get(path).json()["notice"] is None


async def test_an_artifact_is_served_with_its_type_its_name_and_its_ranges(service: Service, tmp_path: Path) -> None:
    job_id = submitted(service)["id"]
    await succeed(service, tmp_path)
    url = f"/v1/jobs/{job_id}/artifacts/image.png"
    whole = service.http.get(url)
    assert whole.headers["content-type"] == "image/png"
    assert whole.headers["content-disposition"] == f'attachment; filename="{job_id}-image.png"'
    assert service.http.head(url).headers["content-length"] == str(len(PNG))
    part = service.http.get(url, headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, PNG[8:16])
    beyond = service.http.get(url, headers={"Range": "bytes=99999-"})
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{len(PNG)}"
    for name in ("other.png", "..%2Fimage.png", "%2e%2e"):
        missing = service.http.get(f"/v1/jobs/{job_id}/artifacts/{name}")
        assert missing.status_code == 404, name
    assert service.http.get(f"/v1/jobs/{job_id}/artifacts/other.png").json()["error"]["code"] == "artifact_not_found"


async def test_a_file_that_was_removed_behind_our_back_is_a_404(service: Service, tmp_path: Path) -> None:
    job = submitted(service)
    await succeed(service, tmp_path)
    service.artifacts.delete(job["id"])
    assert service.http.get(f"/v1/jobs/{job['id']}/artifacts/image.png").status_code == 404


class SigningStore(LocalStore):
    def url(self, key: str, download_name: str) -> str | None:
        return f"http://files.example/{key}?name={download_name}"


async def test_an_artifact_with_a_signed_url_is_a_redirect(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with serving(valkey.url, tmp_path, SigningStore(tmp_path / "artifacts")) as service:
        job = submitted(service)
        token = (await succeed(service, tmp_path)).fencing_token
        answer = service.http.get(f"/v1/jobs/{job['id']}/artifacts/image.png")
        assert answer.status_code == 307
        name = f"{job['id']}-image.png"
        assert answer.headers["location"] == f"http://files.example/{job['id']}/{token}/image.png?name={name}"


def test_lists_are_newest_first_paged_and_filtered(service: Service) -> None:
    ids = [submitted(service)["id"] for _ in range(3)] + [submitted(service, type="video_fast")["id"]]
    service.http.post(f"/v1/jobs/{ids[0]}/cancel")

    def listed(**query: Any) -> tuple[list[str], str | None]:
        page = service.http.get("/v1/jobs", params=query).json()
        return [job["id"] for job in page["data"]], page["next_cursor"]

    assert listed() == (ids[::-1], None)
    first, cursor = listed(limit=3)
    assert (first, cursor) == ([ids[3], ids[2], ids[1]], ids[1])
    assert listed(limit=3, cursor=cursor) == ([ids[0]], None)
    assert listed(limit=4) == (ids[::-1], None)
    assert listed(status="cancelled") == ([ids[0]], None)
    assert listed(type="video_fast") == ([ids[3]], None)
    assert listed(status="queued", type="image_fast") == ([ids[2], ids[1]], None)


async def test_cancel_ends_a_queued_job_and_asks_a_running_one(service: Service) -> None:
    queued = submitted(service)
    assert service.http.post(queued["links"]["cancel"]).json()["status"] == "cancelled"
    running = submitted(service)
    await claim(service.store)
    view = service.http.post(running["links"]["cancel"]).json()
    assert (view["status"], view["cancel_requested"]) == ("running", True)


async def test_delete_removes_the_record_and_the_files(service: Service, tmp_path: Path) -> None:
    path = submitted(service)["links"]["job"]
    await succeed(service, tmp_path)
    folder = service.settings.artifacts_dir
    assert [file.name for file in folder.rglob("*") if file.is_file()] == ["image.png"]
    answer = service.http.delete(path)
    assert (answer.status_code, answer.content) == (204, b"")
    assert not [file for file in folder.rglob("*") if file.is_file()]
    assert service.http.get(path).status_code == 404
    assert service.http.get("/v1/jobs").json()["data"] == []


def test_presets_are_those_of_the_design(service: Service) -> None:
    found = {preset["type"]: preset for preset in service.http.get("/v1/presets").json()["data"]}
    assert set(found) == set(PRESETS)
    assert found["video_high"]["video_length"] == 81
    assert found["video_high"]["promised_s"] == [240, 480]


# ---- bad input: the answer, and nothing left behind -----------------------------------------------------------------

BAD_BODIES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"type": "gif"}, 422, "unknown_job_type", "type"),
    ({"type": 5}, 422, "unknown_job_type", "type"),
    ({"stepz": 3}, 422, "unknown_field", "stepz"),
    ({"\ud800": 3}, 422, "invalid_request", None),
    ({"prompt": ""}, 422, "invalid_value", "prompt"),
    ({"prompt": "   "}, 422, "invalid_value", "prompt"),
    ({"prompt": "x" * 2001}, 422, "invalid_value", "prompt"),
    ({"prompt": "a\x00b"}, 422, "invalid_value", "prompt"),
    ({"prompt": "a\ud800b"}, 422, "invalid_value", "prompt"),
    ({"prompt": None}, 422, "invalid_value", "prompt"),
    ({"resolution": "1920*1080"}, 422, "invalid_value", "resolution"),
    ({"type": "video_fast", "video_length": 40}, 422, "invalid_value", "video_length"),
    ({"type": "video_fast", "video_length": 85}, 422, "invalid_value", "video_length"),
    ({"video_length": 41}, 422, "invalid_value", "video_length"),
    ({"sample_steps": 0}, 422, "invalid_value", "sample_steps"),
    ({"sample_steps": 101}, 422, "invalid_value", "sample_steps"),
    ({"sample_steps": "25"}, 422, "invalid_value", "sample_steps"),
    ({"sample_steps": True}, 422, "invalid_value", "sample_steps"),
    ({"sample_steps": 10**400}, 422, "invalid_value", "sample_steps"),
    ({"guidance_scale": 20.5}, 422, "invalid_value", "guidance_scale"),
    ({"guidance_scale": float("nan")}, 422, "invalid_value", "guidance_scale"),
    ({"guidance_scale": float("inf")}, 422, "invalid_value", "guidance_scale"),
    ({"sample_shift": -1}, 422, "invalid_value", "sample_shift"),
    ({"seed": -1}, 422, "invalid_value", "seed"),
    ({"seed": 2**63}, 422, "invalid_value", "seed"),
    ({"profile": "turbo"}, 422, "invalid_value", "profile"),
    ({"prompt": "nude child"}, 403, "content_refused", "prompt"),
]


@pytest.mark.parametrize(("change", "status", "code", "param"), BAD_BODIES)
async def test_a_bad_field_is_named_and_nothing_is_left_behind(
    service: Service, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = service.http.post(
        "/v1/jobs", content=json.dumps(GOOD | change), headers={"Content-Type": "application/json"}
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"code", "message", "param", "hint", "retryable"}
    assert error["message"]
    assert len(error["message"]) < 600
    assert error["retryable"] is False
    assert await service.left_behind() == []


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b'{"type": "image_fast", ', "application/json", 400, "invalid_json"),
        (b"", "application/json", 422, "invalid_request"),
        (b'{"prompt": "\xff"}', "application/json", 400, "invalid_json"),
        (b"[" * 30000, "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 422, "invalid_request"),
        (b"null", "application/json", 422, "invalid_request"),
        (b'"text"', "application/json", 422, "invalid_request"),
        (b"type=image_fast&prompt=fox", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (json.dumps(GOOD).encode(), "text/plain", 415, "unsupported_media_type"),
        (json.dumps(GOOD).encode(), "", 415, "unsupported_media_type"),
    ],
)
async def test_a_bad_body_leaves_nothing_behind(
    service: Service, content: bytes, content_type: str, status: int, code: str
) -> None:
    answer = service.http.post("/v1/jobs", content=content, headers={"Content-Type": content_type})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert await service.left_behind() == []


@pytest.mark.parametrize("missing", ["type", "prompt"])
async def test_a_missing_field_is_named(service: Service, missing: str) -> None:
    answer = service.http.post("/v1/jobs", json={name: text for name, text in GOOD.items() if name != missing})
    assert answer.status_code == 422
    assert answer.json()["error"]["message"] == f"{missing} is missing"
    assert await service.left_behind() == []


def test_a_near_miss_of_a_field_is_told(service: Service) -> None:
    answer = service.http.post("/v1/jobs", json=GOOD | {"sampel_steps": 3})
    assert answer.json()["error"]["hint"] == "Did you mean sample_steps?"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_that_is_too_large_is_refused_declared_or_not(service: Service, declared: bool) -> None:
    body = json.dumps(GOOD | {"prompt": "x" * service.settings.max_body_bytes}).encode()
    chunks = (body[start : start + 4096] for start in range(0, len(body), 4096))
    answer = service.http.post(
        "/v1/jobs", content=body if declared else chunks, headers={"Content-Type": "application/json"}
    )
    assert ("content-length" in answer.request.headers) is declared
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert await service.left_behind() == []


async def test_a_chunked_body_within_the_bound_is_read_whole(service: Service) -> None:
    body = json.dumps(GOOD).encode()
    answer = service.http.post(
        "/v1/jobs", content=iter([body[:9], body[9:]]), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 202


async def test_a_full_queue_is_a_429_that_says_when_to_try_again(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with serving(valkey.url, tmp_path, max_queued_jobs=1) as service:
        first = submitted(service)["id"]
        before = sorted(await service.left_behind())
        answer = service.http.post("/v1/jobs", json=GOOD)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert answer.json()["error"]["retryable"] is True
        assert int(answer.headers["Retry-After"]) > 0
        assert sorted(await service.left_behind()) == before
        assert [job["id"] for job in service.http.get("/v1/jobs").json()["data"]] == [first]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/jobs/0199f2f0a1b2c3d4e5f60718293a", 404, "job_not_found"),
        ("GET", "/v1/jobs/no-such-job", 404, "job_not_found"),
        ("GET", "/v1/jobs/0199f2f0a1b2c3d4e5f60718293a/events", 404, "job_not_found"),
        ("GET", "/v1/jobs/0199f2f0a1b2c3d4e5f60718293a/artifacts/video.mp4", 404, "job_not_found"),
        ("POST", "/v1/jobs/0199f2f0a1b2c3d4e5f60718293a/cancel", 404, "job_not_found"),
        ("DELETE", "/v1/jobs/0199f2f0a1b2c3d4e5f60718293a", 404, "job_not_found"),
        ("GET", "/v2/jobs", 404, "not_found"),
        ("GET", "/v1/jobs/", 404, "not_found"),
        ("PUT", "/v1/jobs", 405, "method_not_allowed"),
        ("GET", "/v1/jobs?limit=0", 422, "invalid_value"),
        ("GET", "/v1/jobs?limit=101", 422, "invalid_value"),
        ("GET", "/v1/jobs?limit=many", 422, "invalid_value"),
        ("GET", "/v1/jobs?cursor=yesterday", 422, "invalid_value"),
        ("GET", "/v1/jobs?status=done", 422, "invalid_value"),
        ("GET", "/v1/jobs?type=gif", 422, "unknown_job_type"),
        ("GET", "/v1/jobs?state=queued", 422, "unknown_field"),
    ],
)
async def test_a_bad_address_is_answered_in_our_words(
    service: Service, method: str, path: str, status: int, code: str
) -> None:
    answer = service.http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert status != 405 or answer.headers["allow"] == "GET, POST"
    assert await service.left_behind() == []


async def test_cancel_of_a_finished_and_delete_of_an_unfinished_job_are_conflicts(
    service: Service, tmp_path: Path
) -> None:
    finished = submitted(service)
    await succeed(service, tmp_path)
    answer = service.http.post(finished["links"]["cancel"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_finished")
    unfinished = submitted(service)
    answer = service.http.delete(unfinished["links"]["job"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_not_finished")
    assert service.http.get(unfinished["links"]["job"]).json()["status"] == "queued"


# ---- owners ---------------------------------------------------------------------------------------------------------


async def test_each_owner_sees_only_their_own_jobs(valkey: EmbeddedStore, tmp_path: Path) -> None:
    with serving(valkey.url, tmp_path, api_keys={"alice": "key-a", "bob": "key-b"}) as service:
        as_alice, as_bob = ({"Authorization": f"Bearer key-{name}"} for name in "ab")
        for headers in ({}, {"Authorization": "Bearer key-c"}, {"Authorization": "Basic a2V5LWE="}):
            refused = service.http.post("/v1/jobs", json=GOOD, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
            assert refused.headers["www-authenticate"].startswith("Bearer")
        assert await service.left_behind() == []
        job = service.http.post("/v1/jobs", json=GOOD, headers=as_alice).json()
        await succeed(service, tmp_path)
        path = job["links"]["job"]
        for method, at in (
            ("GET", path), ("GET", f"{path}/events"), ("GET", f"{path}/artifacts/image.png"), ("POST", f"{path}/cancel"),
            ("DELETE", path),
        ):  # fmt: skip
            answer = service.http.request(method, at, headers=as_bob)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found"), (method, at)
            assert service.http.request(method, at).status_code == 401
        assert service.http.get("/v1/jobs", headers=as_bob).json()["data"] == []
        assert service.http.get(path, headers=as_alice).json()["status"] == "succeeded"
        assert service.http.get(f"{path}/artifacts/image.png", headers=as_alice).content == PNG


# ---- trouble inside -------------------------------------------------------------------------------------------------


def test_a_store_that_is_away_is_a_503_and_the_process_stays_alive(short_dir: Path, tmp_path: Path) -> None:
    server = EmbeddedStore(short_dir / "away")
    with serving(server.url, tmp_path) as service:
        assert service.http.get("/readyz").json() == {"status": "ready", "generator_replicas": 0, "queued_jobs": 0}
        server.stop()
        for answer in (service.http.post("/v1/jobs", json=GOOD), service.http.get("/readyz")):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["retryable"]) == (503, "store_unavailable", True)
            assert int(answer.headers["Retry-After"]) > 0
        assert service.http.get("/healthz").json()["status"] == "ok"
        server = EmbeddedStore(short_dir / "away")
        assert service.http.post("/v1/jobs", json=GOOD).status_code == 202
        server.stop()


class BrokenStore(LocalStore):
    def url(self, key: str, download_name: str) -> str | None:
        raise RuntimeError("a secret of the inside")


async def test_the_unexpected_is_a_500_with_a_request_id_and_a_log(
    valkey: EmbeddedStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(valkey.url, tmp_path, BrokenStore(tmp_path / "artifacts")) as service:
        job = submitted(service)
        await succeed(service, tmp_path)
        answer = service.http.get(f"/v1/jobs/{job['id']}/artifacts/image.png")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["hint"]
    assert answer.headers["x-request-id"] in caplog.text
    assert "a secret of the inside" in caplog.text
